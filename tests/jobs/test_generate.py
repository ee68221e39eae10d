"""The batch job: settings, exactly-once output on real Ray Data, resume, refusals."""

import dataclasses
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml

from cascade_model.engine_config import EngineConfig
from cascade_model.errors import CheckpointMismatch, InputError, Unavailable
from cascade_model.sampling import SamplingParams
from jobs import generate
from jobs.cli import build
from jobs.generate_settings import GenerateConfig, job_identity
from pipelines import generation
from pipelines.answers import Answered

RECIPE = Path(generate.__file__).parent / "recipes/demo/generate.yaml"
NUM_ROWS = 11


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    from tests.tiny_models import saved_text_model

    return saved_text_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"prompt {row}"}) for row in range(NUM_ROWS - 1)]
    path.write_text("\n".join([*lines[:4], "{broken", *lines[4:]]) + "\n")
    return path


def arguments(model: str, prompts: Path, output: Path, *more: str) -> list[str]:
    words = ["--model", model, "--input", str(prompts), "--output", str(output)]
    words += ["--rows-per-shard", "3", "--num-workers", "2", "--threads-per-worker", "1"]
    words += ["--max-dead-rate", "0.1"]
    words += ["--sampling.max-tokens", "9", "--sampling.temperature", "1", *more]
    return words


def said(capsys) -> str:
    """The box on stderr as one line."""
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_shipped_recipe_parses():
    settings = {"model": "m", "input": "i", "output": "o", **yaml.safe_load(RECIPE.read_text())}
    config = build(GenerateConfig, settings, str(RECIPE))
    assert config.sampling.confidence_threshold < 0.9


@pytest.mark.ray
def test_every_prompt_is_completed_once_and_a_second_run_does_nothing(
    tmp_path, model, prompts, ray_local, capsys
):
    output = tmp_path / "out"
    assert generate.main(arguments(model, prompts, output)) == 0
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["counts"]["rows_in"] == NUM_ROWS
    assert manifest["counts"]["rows_out"] == NUM_ROWS - 1
    assert manifest["counts"]["dead_by_reason"] == {"broken_json": 1}
    rows = [
        json.loads(line)
        for file in manifest["files"]
        for line in (output / file["object"]).read_text().splitlines()
    ]
    assert [file["name"] for file in manifest["dead_files"]] == ["dead-000001.jsonl"]
    expected = [f"prompt {row}" for row in range(NUM_ROWS - 1)]
    assert [row["prompt"] for row in rows] == expected
    assert set(rows[0]) == {
        "id",
        "prompt",
        "completion",
        "num_tokens",
        "passes",
        "tokens_per_forward",
        "finish_reason",
        "seed",
    }
    before = contents(output)
    capsys.readouterr()
    assert generate.main(arguments(model, prompts, output)) == 0
    assert "finished already" in capsys.readouterr().out
    assert contents(output) == before


@pytest.mark.ray
def test_a_run_that_was_cut_off_does_only_the_rest_and_ends_equal(
    tmp_path, model, prompts, ray_local
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for output in (whole, cut):
        assert generate.main(arguments(model, prompts, output)) == 0
    (cut / "manifest.json").unlink()
    (cut / "completions-000002.jsonl").unlink()
    (cut / "completions-000002.jsonl.record.json").unlink()
    (cut / "completions-000003.jsonl.record.json").unlink()
    kept = (cut / "completions-000000.jsonl").stat().st_mtime_ns
    assert generate.main(arguments(model, prompts, cut)) == 0
    assert (cut / "completions-000000.jsonl").stat().st_mtime_ns == kept
    assert contents(cut) == contents(whole)


@pytest.mark.ray
def test_another_job_in_the_same_folder_is_refused_and_changes_nothing(
    tmp_path, model, prompts, ray_local, capsys
):
    output = tmp_path / "out"
    assert generate.main(arguments(model, prompts, output)) == 0
    before = contents(output)
    assert generate.main(arguments(model, prompts, output, "--sampling.seed", "9")) == 2
    told = (
        "belongs to another job: sampling.seed=9, the folder was made with 0; give another output"
    )
    assert told in said(capsys)
    with prompts.open("a") as file:
        file.write('{"prompt": "one more"}\n')
    assert generate.main(arguments(model, prompts, output)) == 2
    assert f"job: input={prompts} is not what the folder was made with; give" in said(capsys)
    assert contents(output) == before


@pytest.mark.ray
def test_damaged_weights_are_told_in_one_sentence(tmp_path, model, prompts, ray_local, capsys):
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    with (damaged / "model.safetensors").open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"12345678")
    code = generate.main(arguments(str(damaged), prompts, tmp_path / "out"))
    assert code == CheckpointMismatch.exit_code
    assert "model.safetensors with sha256" in said(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
def test_what_is_offered_against_too_many_dead_rows_works(
    tmp_path, model, prompts, ray_local, capsys
):
    output, other = tmp_path / "out", tmp_path / "other"
    strict = arguments(model, prompts, output, "--max-dead-rate", "0.01")
    assert generate.main(strict) == 2
    told = said(capsys)
    assert "1 of 11 rows cannot be answered ({'broken_json': 1}, the first is row 4" in told
    assert "raise max_dead_rate and run the same command again" in told
    assert "for a mended input or another prompt_column give another output" in told
    assert not (output / "manifest.json").exists()
    assert generate.main(strict) == 2
    assert generate.main(arguments(model, prompts, output)) == 0
    assert json.loads((output / "manifest.json").read_text())["counts"]["rows_out"] == 10
    prompts.write_text(prompts.read_text().replace("{broken", '{"prompt": "mended"}'))
    capsys.readouterr()
    assert generate.main(strict) == 2
    assert "give another output" in said(capsys)
    assert generate.main(arguments(model, prompts, other, "--max-dead-rate", "0.01")) == 0
    assert json.loads((other / "manifest.json").read_text())["counts"]["rows_out"] == 11


@pytest.mark.ray
def test_a_job_without_one_answer_leaves_nothing(tmp_path, model, ray_local, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": ""}\n')
    assert generate.main(arguments(model, path, tmp_path / "out")) == 2
    told = said(capsys)
    assert "'empty_prompt': 1" in told
    assert "mend the input, set prompt_column, or raise max_dead_rate" in told
    assert not (tmp_path / "out").exists()
    path.write_text('{"text": "mended"}\n')
    other = ["--prompt-column", "text"]
    assert generate.main([*arguments(model, path, tmp_path / "out"), *other]) == 0


@pytest.mark.ray
def test_a_mistake_that_comes_late_keeps_what_is_answered_and_the_job_goes_on(
    tmp_path, model, prompts, ray_local, capsys, monkeypatch
):
    def changed_after_the_first(parts, work, num_workers):
        worker = generation.PartWorker(work)
        yield worker.answer(parts[0]), 0.0
        prompts.write_text('{"prompt": "other"}\n' * NUM_ROWS)
        yield worker.answer(parts[1]), 0.0

    before, output = prompts.read_bytes(), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(generation, "run_on_ray", changed_after_the_first)
        assert generate.main(arguments(model, prompts, output)) == 2
    assert f"changed while the job ran; start a new output; what is answered stays in {output}" in (
        said(capsys)
    )
    assert (output / "completions-000000.jsonl.record.json").exists()
    prompts.write_bytes(before)
    assert generate.main(arguments(model, prompts, output)) == 0
    assert generate.main(arguments(model, prompts, tmp_path / "whole")) == 0
    assert contents(output) == contents(tmp_path / "whole")


@dataclasses.dataclass(frozen=True)
class Deadly:
    """Where answers come from that end their process, as a row too large for its memory does; only
    when the other parts lie there, so that which rows are without an answer is no race."""

    deadly: str
    others: tuple[str, ...] = ()
    finished: str = ""
    """A folder whose completions it leaves in `output` before it dies: a commit told to nobody."""
    output: str = ""
    num_cpus: float = 1
    num_gpus: int = 0
    rows_at_once: int = 1

    def open(self) -> "Deadly":
        return self

    def answer(self, prompts):
        if any(prompt.text == self.deadly for prompt in prompts):
            give_up = time.monotonic() + 60.0
            while not all(map(os.path.exists, self.others)) and time.monotonic() < give_up:
                time.sleep(0.05)
            if self.finished:
                for path in Path(self.finished).glob("completions-*"):
                    shutil.copy(path, self.output)
            os.kill(os.getpid(), signal.SIGKILL)
        answered = {"num_tokens": 1, "passes": 1, "finish_reason": "stop"}
        return [Answered(prompt=p.text, completion="", **answered) for p in prompts]

    def close(self) -> None:
        """Nothing runs."""


def all_but_the_third(output: Path) -> tuple[str, ...]:
    return tuple(str(output / f"completions-{part:06d}.jsonl.record.json") for part in (0, 1, 3))


@pytest.mark.ray
def test_rows_that_kill_every_worker_end_the_job_and_are_named(
    tmp_path, model, prompts, ray_local, capsys, monkeypatch
):
    answerer = {"weights_sha256": "none"}
    deadly = Deadly("prompt 6", all_but_the_third(tmp_path / "out"))
    monkeypatch.setattr(generate, "source_of", lambda config: (deadly, answerer))
    assert generate.main(arguments(model, prompts, tmp_path / "out")) == 2
    assert "the first rows without an answer are 6 to 8, in" in said(capsys)
    kept = sorted(path.name for path in (tmp_path / "out").glob("completions-*.jsonl"))
    assert kept == [f"completions-{part:06d}.jsonl" for part in (0, 1, 3)]
    monkeypatch.setattr(generate, "source_of", lambda config: (Deadly("none"), answerer))
    assert generate.main(arguments(model, prompts, tmp_path / "out")) == 0
    counts = json.loads((tmp_path / "out/manifest.json").read_text())["counts"]
    assert counts["rows_out"] == NUM_ROWS - 1


@pytest.mark.ray
def test_a_part_that_was_committed_before_its_worker_died_is_answered(
    tmp_path, model, prompts, ray_local, monkeypatch
):
    def answered(deadly: Deadly, output: Path) -> int:
        source = (deadly, {"weights_sha256": "none"})
        monkeypatch.setattr(generate, "source_of", lambda config: source)
        return generate.main(arguments(model, prompts, output))

    whole, output = tmp_path / "whole", tmp_path / "out"
    assert answered(Deadly("none"), whole) == 0
    monkeypatch.setattr(generation, "MAX_TASK_RETRIES", 0)
    deadly, control = Deadly("prompt 6", all_but_the_third(output)), tmp_path / "control"
    told = dataclasses.replace(deadly, finished=str(whole), output=str(output))
    assert answered(told, output) == 0
    assert answered(dataclasses.replace(deadly, others=()), control) == 2
    assert contents(output) == contents(whole)


@pytest.mark.ray
def test_workers_that_no_machine_can_hold_are_refused_and_leave_nothing(
    tmp_path, model, prompts, ray_local, capsys
):
    more = ["--threads-per-worker", "9"]
    assert generate.main([*arguments(model, prompts, tmp_path / "out"), *more]) == 2
    sentence = "num_workers=2 with 9 threads each on cpu needs 18 CPUs and this Ray has 4"
    assert sentence in said(capsys)
    assert not (tmp_path / "out").exists()


def test_how_the_work_is_shared_out_is_no_part_of_the_jobs_identity(model):
    settings = {"model": model, "input": "i", "output": "o"}

    def identity(input_sha256="i", **changes):
        config = GenerateConfig(**(settings | changes))
        return job_identity(config, generate.source_of(config)[1], input_sha256)

    one = identity()
    assert identity(num_workers=2, threads_per_worker=3, max_dead_rate=0.5) == one
    assert identity(engine=EngineConfig(cache_bytes=1 << 20)) == one
    for change in (
        {"stop": ("x",)},
        {"input_sha256": "j"},
        {"engine": EngineConfig(precision="bfloat16")},
        {"chat_template": "{{ messages[0].content }}"},
        {"setting_columns": ("temperature",)},
    ):
        assert identity(**change) != one


def test_bad_input_leaves_nothing_behind(tmp_path, model, prompts, capsys):
    output = tmp_path / "out"
    assert generate.main(arguments(model, tmp_path / "none.jsonl", output)) == 2
    assert "does not exist" in said(capsys)
    code = generate.main(arguments(str(tmp_path / "no-model"), prompts, output))
    assert code == 2
    (tmp_path / "empty.jsonl").touch()
    assert generate.main(arguments(model, tmp_path / "empty.jsonl", output)) == 2
    capsys.readouterr()
    words = ["--prompt-column", "promt", "--messages-column", "chat"]
    assert generate.main(arguments(model, prompts, output, *words)) == 2
    assert "prompt_column=promt and messages_column=chat are not in" in said(capsys)
    assert generate.main(arguments(model, "nonsense://x", output)) == 2
    assert "input=nonsense://x cannot be opened" in said(capsys)
    assert not output.exists()


@pytest.mark.parametrize(
    ("most", "changes", "cure"),
    [
        (127, {}, r"in the context of 128 that model=.* has; lower it to 127 at most"),
        (
            31,
            {"cache_bytes": 8192},
            r"36 tokens .*engine\.cache_bytes=8192 holds those of 32; lower",
        ),
    ],
)
def test_what_the_engine_could_give_to_no_row_is_refused_before_it_starts(
    model, most, changes, cure
):
    from cascade_model.llm import LLM

    engine = EngineConfig(**changes)

    def settings(max_tokens):
        params = SamplingParams(max_tokens=max_tokens)
        return GenerateConfig(model=model, input="i", output="o", sampling=params, engine=engine)

    source, _ = generate.source_of(settings(most))
    generate.require_room(settings(most), source)
    with pytest.raises(InputError, match=rf"^sampling\.max_tokens={most + 1} .*{cure}"):
        generate.require_room(settings(most + 1), source)
    with LLM.load(model, engine) as llm:  # the engine's own bounds are these
        [fits] = llm.answers([[65]], settings(most).sampling)
        [refused] = llm.answers([[65]], settings(most + 1).sampling)
    assert not isinstance(fits.result, InputError)
    assert isinstance(refused.result, InputError)


def test_a_job_whose_answers_fit_nowhere_writes_nothing(tmp_path, model, prompts, capsys):
    from cascade_model.llm import LLM
    from jobs.routes import build_api
    from tests.jobs.tiny_endpoint import endpoint
    from tests.pipelines.http_server import serving

    output, long = tmp_path / "out", ["--sampling.max-tokens", "999"]
    assert generate.main(arguments(model, prompts, output, *long)) == 2
    assert "sampling.max_tokens=999 leaves a prompt no place in the context of 128" in said(capsys)
    with LLM.load(model) as llm, serving(build_api(endpoint(llm, keys=None))) as url:
        asked = [*arguments(model, prompts, output, *long)[2:], "--endpoint", url]
        assert generate.main(asked) == 2
    told = f"no place in the 128 tokens that endpoint={url} gives a request (max_model_len); lower"
    assert told in said(capsys)
    assert not output.exists()


@pytest.mark.ray
def test_rows_with_lengths_of_their_own_are_not_judged_by_the_jobs(tmp_path, model, ray_local):
    prompts, output = tmp_path / "own.jsonl", tmp_path / "out"
    prompts.write_text(json.dumps({"prompt": "a", "params": {"max_tokens": 4}}) + "\n")
    assert generate.main(arguments(model, prompts, output, "--sampling.max-tokens", "999")) == 0
    assert json.loads((output / "manifest.json").read_text())["counts"]["rows_out"] == 1


@pytest.mark.parametrize("output", ["/dev/null/x", "/proc/x/out"])
def test_an_output_that_cannot_be_written_is_one_sentence(model, prompts, capsys, output):
    assert generate.main(arguments(model, prompts, output)) == 2
    assert f"output={output} cannot be written" in said(capsys)


@pytest.mark.ray
def test_a_job_at_an_endpoint_writes_what_the_model_writes_and_no_key(
    tmp_path, model, prompts, ray_local, capsys, monkeypatch
):
    from cascade_model.llm import LLM
    from jobs.routes import build_api
    from tests.jobs.tiny_endpoint import endpoint
    from tests.pipelines.http_server import serving

    here, there = tmp_path / "here", tmp_path / "there"
    monkeypatch.setenv("CASCADE_API_KEY", "right")
    more = ["--rows-per-shard", "4", "--num-workers", "1"]
    assert generate.main([*arguments(model, prompts, here), *more]) == 0
    with LLM.load(model) as llm, serving(build_api(endpoint(llm))) as url:
        asked = [*arguments(model, prompts, there)[2:], *more, "--endpoint", url]
        assert generate.main([*asked, "--model-name", "other"]) == 2
        assert "model_name=other" in said(capsys)
        assert not there.exists()
        assert generate.main(asked) == 0
        for name in ("completions-000000.jsonl", "completions-000002.jsonl", "dead-000001.jsonl"):
            assert (there / name).read_bytes() == (here / name).read_bytes()
        job = json.loads((there / "job.json").read_text())
        assert (job["model_name"], job["fingerprint"]) == ("tiny", "cascade-test")
        assert len(job["chat_template_sha256"]) == 64
        assert not [name for name, data in contents(there).items() if b"right" in data]
    monkeypatch.delenv("CASCADE_API_KEY")
    asked += ["--patience-seconds", "0.2"]
    assert generate.main(asked) == Unavailable.exit_code == 75
    assert "does not answer (ConnectError" in said(capsys)


def test_one_of_model_and_endpoint_is_given():
    paths = {"input": "i", "output": "o"}
    with pytest.raises(InputError, match="model=None and endpoint=None: give one"):
        GenerateConfig(**paths)
    with pytest.raises(InputError, match="give one of them"):
        GenerateConfig(**paths, model="m", endpoint="http://x")
    with pytest.raises(InputError, match="chat_template=plain and endpoint"):
        GenerateConfig(**paths, endpoint="http://x", chat_template="plain")
    with pytest.raises(InputError, match="model_name=x is a name at an endpoint"):
        GenerateConfig(**paths, model="m", model_name="x")


def test_a_column_that_can_be_no_setting_is_refused():
    settings = {"model": "m", "input": "i", "output": "o"}
    GenerateConfig(**settings, setting_columns=("seed", "stop"))
    with pytest.raises(InputError, match=r"setting_columns=\['logprobs'\] is no setting of a row"):
        GenerateConfig(**settings, setting_columns=("seed", "logprobs"))


def test_the_models_own_template_is_used_unless_another_is_given(tmp_path, model):
    from cascade_model.weights import load_model, save_model, weights_digest

    own = tmp_path / "model"
    network, tokenizer = load_model(model)
    save_model(own, network, tokenizer, chat_template="{{ messages[0].content }}")
    file = tmp_path / "other.jinja"
    file.write_text("{{ messages[-1].content }}")

    def template(**changes):
        config = GenerateConfig(**({"model": str(own), "input": "i", "output": "o"} | changes))
        return generate.source_of(config)[0].chat_template

    assert generate.source_of(GenerateConfig(model=model, input="i", output="o"))[
        0
    ].weights_sha256 == weights_digest(model)
    assert template() == "{{ messages[0].content }}"
    assert template(model=model) == "plain"
    assert template(chat_template="chatml") == "chatml"
    assert template(chat_template=str(file)) == "{{ messages[-1].content }}"


def test_a_dead_rate_outside_its_range_is_refused():
    with pytest.raises(InputError, match=r"max_dead_rate=1\.5"):
        GenerateConfig(model="m", input="i", output="o", max_dead_rate=1.5)


def test_a_deadline_is_refused_as_a_shard_must_come_out_the_same_again():
    late = SamplingParams(deadline_seconds=2.0)
    with pytest.raises(InputError, match=r"sampling\.deadline_seconds=2\.0 lets the clock decide"):
        GenerateConfig(model="m", input="i", output="o", sampling=late)


@pytest.mark.parametrize("setting", [{"logprobs": 0}, {"logprobs": 2}, {"report_margin": True}])
def test_what_would_be_computed_and_not_written_is_refused(setting):
    [name] = setting
    with pytest.raises(InputError, match=rf"sampling\.{name}=.* is not written to the output"):
        GenerateConfig(model="m", input="i", output="o", sampling=SamplingParams(**setting))
