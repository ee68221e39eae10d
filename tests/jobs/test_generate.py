"""The batch job: settings, exactly-once output on real Ray Data, resume, refusals."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from cascade_model.config import EngineConfig
from cascade_model.errors import CheckpointMismatch, InputError, Unavailable
from cascade_model.sampling import SamplingParams
from jobs import generate
from jobs.cli import build
from jobs.generate_settings import GenerateConfig, job_identity

RECIPE = Path(generate.__file__).parent / "recipes/demo/generate.yaml"
NUM_ROWS = 11


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    from cascade_model.model import Transformer
    from cascade_model.tokenizer import byte_tokenizer
    from cascade_model.weights import save_model
    from tests.tiny_models import text_config

    tokenizer = byte_tokenizer()
    config = text_config(tokenizer)
    network = Transformer(config)
    network.init_weights(0)
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(folder, network, tokenizer)
    return str(folder)


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
    assert "another output" in said(capsys)
    with prompts.open("a") as file:
        file.write('{"prompt": "one more"}\n')
    assert generate.main(arguments(model, prompts, output)) == 2
    assert "input_sha256" in said(capsys)
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
def test_too_many_dead_rows_fail_the_job_which_goes_on_with_another_rate(
    tmp_path, model, prompts, ray_local, capsys
):
    output = tmp_path / "out"
    strict = arguments(model, prompts, output, "--max-dead-rate", "0.01")
    assert generate.main(strict) == 2
    assert "1 of 11 rows cannot be answered ({'broken_json': 1}, the first is row 4" in said(capsys)
    assert not (output / "manifest.json").exists()
    assert generate.main(strict) == 2
    assert generate.main(arguments(model, prompts, output)) == 0
    assert json.loads((output / "manifest.json").read_text())["counts"]["rows_out"] == 10


@pytest.mark.ray
def test_a_job_without_one_answer_leaves_nothing(tmp_path, model, ray_local, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": ""}\n')
    assert generate.main(arguments(model, path, tmp_path / "out")) == 2
    assert "'empty_prompt': 1" in said(capsys)
    assert not (tmp_path / "out").exists()


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
    from cascade_model.weights import load_model, save_model

    own = tmp_path / "model"
    network, tokenizer = load_model(model)
    save_model(own, network, tokenizer, chat_template="{{ messages[0].content }}")
    file = tmp_path / "other.jinja"
    file.write_text("{{ messages[-1].content }}")

    def template(**changes):
        config = GenerateConfig(**({"model": str(own), "input": "i", "output": "o"} | changes))
        return generate.source_of(config)[0].chat_template

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
