"""The pretrain command: in this process, on Ray with two ranks, and with a user's mistakes."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cascade_model.checkpoint import newest, verify
from cascade_model.commit import Folder
from cascade_model.corpus import Corpus
from cascade_model.errors import CheckpointMismatch, InputError
from cascade_model.metrics import read_metrics
from cascade_model.settings import to_dict
from cascade_model.training_config import TrainerConfig
from cascade_model.weights import load_model, save_model, weights_digest
from jobs import convert, launch, pretrain, training
from jobs.cli import parse, read_yaml

ROOT = Path(__file__).parents[2]
SHAPE = ["--model.hidden-size", "16", "--model.num-layers", "2", "--model.num-heads", "2"]
SHAPE += ["--model.num-kv-heads", "2", "--model.head-dim", "8", "--model.intermediate-size", "32"]
STEPS = ["--trainer.num-steps", "4", "--trainer.sequences-per-step", "4"]
STEPS += ["--trainer.sequences-per-forward", "2", "--trainer.log-every", "2"]
STEPS += ["--trainer.checkpoint-every", "2"]


def flags(corpus, output, *more, workers=0):
    words = ["--corpus", str(corpus), "--output", str(output), "--num-workers", str(workers)]
    return [*words, *SHAPE, *STEPS, *more]


def test_run_folder_explains_itself(tiny_corpus, tmp_path, capsys):
    assert pretrain.main(flags(tiny_corpus, tmp_path / "run")) == 0
    run = tmp_path / "run"
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "model"} <= names
    tree = (ROOT / "jobs/README.md").read_text().split("## The run folder")[1].split("```")[1]
    told = {re.sub(r"\d{8}", "", word).partition("/")[0] for word in tree.split()}
    assert {re.sub(r"\d{8}", "", name) for name in names} <= told
    settings = parse(pretrain.PretrainConfig, ["--config", str(run / "config.yaml")])
    assert settings.trainer == TrainerConfig(
        num_steps=4,
        sequences_per_step=4,
        sequences_per_forward=2,
        log_every=2,
        checkpoint_every=2,
    )
    facts = facts_of(run)
    assert facts["settings"]["trainer"] == read_yaml(str(run / "config.yaml"))["trainer"]
    assert load_model(str(run / "model"))[0].config.block_size == 4
    assert "loss per maskable token" in capsys.readouterr().out


def test_a_corpus_is_no_run_folder(tiny_corpus, capsys):
    before = sorted(Path(tiny_corpus).iterdir())
    assert pretrain.main(flags(tiny_corpus, tiny_corpus)) == 2
    assert "holds a corpus" in capsys.readouterr().err
    assert sorted(Path(tiny_corpus).iterdir()) == before


def test_training_can_start_from_a_model_folder(tiny_corpus, tmp_path):
    assert pretrain.main(flags(tiny_corpus, tmp_path / "first")) == 0
    initial = ["--initial-model", str(tmp_path / "first" / "model")]
    assert pretrain.main(flags(tiny_corpus, tmp_path / "second", *initial)) == 0
    first = read_metrics(Folder(tmp_path / "first"))
    second = read_metrics(Folder(tmp_path / "second"))
    assert second[0]["loss"] < first[0]["loss"]


def test_every_path_in_a_file_may_begin_at_home(tiny_corpus, tmp_path, monkeypatch):
    """No shell reads a YAML file, so that `~` comes to the job as it stands there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").symlink_to(tiny_corpus)
    assert pretrain.main(flags(tiny_corpus, tmp_path / "first")) == 0
    file = tmp_path / "run.yaml"
    file.write_text("{corpus: ~/shards, output: ~/run, initial_model: ~/first/model}")
    assert pretrain.main(["--config", str(file), "--num-workers", "0", *STEPS]) == 0
    assert (tmp_path / "run" / "summary.json").is_file()
    assert not (tmp_path / "~").exists()


def test_what_a_run_reads_of_either_split_stays_in_the_cache(tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = {}
    for name, more in (("trained", []), ("evaluated", ["--trainer.evaluate-every", "2"])):
        words = flags(tiny_corpus, tmp_path / f"run {name}", "--cache.folder", name, *more)
        assert pretrain.main(words) == 0
        kept[name] = {path.name for path in (tmp_path / name).glob("??/*")}
    assert kept["trained"] < kept["evaluated"]


def test_a_run_goes_on_from_the_weights_it_began_with_alone(tiny_corpus, tmp_path, capsys):
    for name in ("first", "other"):
        more = ["--trainer.seed", "1"] if name == "other" else []
        assert pretrain.main(flags(tiny_corpus, tmp_path / name, *more)) == 0
    run = flags(tiny_corpus, tmp_path / "run")
    for name, code in (("first", 0), ("other", 3)):
        assert pretrain.main([*run, "--initial-model", str(tmp_path / name / "model")]) == code
    assert pretrain.main(run) == 3
    told = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert told.count("was made with initial_weights='") == 2
    assert "initial_weights='drawn from trainer.seed=0'" in told
    first, other = (weights_digest(tmp_path / name / "model")[:12] for name in ("first", "other"))
    assert f"initial_weights='{first}' and this run has initial_weights='{other}'" in told


def test_a_model_for_shorter_texts_than_the_corpus_has_is_refused(tiny_corpus, tmp_path, capsys):
    """The model that it starts from keeps its own limit."""
    assert pretrain.main(flags(tiny_corpus, tmp_path / "first")) == 0
    model, tokenizer = load_model(tmp_path / "first" / "model")
    model.config = dataclasses.replace(model.config, max_sequence_length=32)
    save_model(tmp_path / "short", model, tokenizer)
    initial = ["--initial-model", str(tmp_path / "short")]
    assert pretrain.main(flags(tiny_corpus, tmp_path / "run", *initial)) == 2
    told = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert "short has max_sequence_length=32 and corpus=" in told
    assert "prepare the corpus with --sequence-length 32" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        (
            ["--model.block-size", "2"],
            "model.block_size=2 and initial_model=START has block_size=4, which a run keeps; leave "
            "model.block_size out, or start from what `cascade convert --block-size 2` makes of it",
        ),
        (
            ["--model.hidden-size", "32"],
            "model.hidden_size=32 and initial_model=START has hidden_size=16, which a run keeps; "
            "leave model.hidden_size out",
        ),
    ],
)
def test_a_shape_that_the_start_does_not_have_is_refused(
    tiny_corpus, finished, tmp_path, capsys, setting, sentence
):
    """One that it has anyhow is taken, as in the other tests of this file."""
    start = str(finished / "model")
    words = flags(tiny_corpus, tmp_path / "run", "--initial-model", start, *setting)
    assert pretrain.main(words) == 2
    told = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert sentence.replace("START", start) in told
    assert ("cascade convert" in told) == ("cascade convert" in sentence)
    assert not (tmp_path / "run").exists()


def test_a_start_whose_blocks_the_corpus_does_not_have_is_told_as_such(
    tiny_corpus, finished, tmp_path, capsys
):
    model, tokenizer = load_model(finished / "model")
    model.config = dataclasses.replace(model.config, block_size=8)
    save_model(tmp_path / "start", model, tokenizer)
    initial = ["--initial-model", str(tmp_path / "start")]
    assert pretrain.main(flags(tiny_corpus, tmp_path / "run", *initial)) == 2
    told = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert f"initial_model={tmp_path / 'start'} has block_size=8, which does not divide" in told
    assert "model.block_size" not in told
    smaller = tmp_path / "smaller"
    source = ["--source", str(tmp_path / "start"), "--output", str(smaller)]
    assert convert.main([*source, "--block-size", "4"]) == 0
    initial = ["--initial-model", str(smaller)]
    assert pretrain.main(flags(tiny_corpus, tmp_path / "run", *initial)) == 0


def test_one_block_shifted_is_an_autoregressive_model(tiny_corpus, tmp_path):
    more = ["--model.block-size", "1", "--model.logits", "shifted"]
    assert pretrain.main(flags(tiny_corpus, tmp_path, *more)) == 0
    assert load_model(str(tmp_path / "model"))[0].config.is_autoregressive


def facts_of(folder):
    return verify(folder / "checkpoints" / "step_00000004").facts


def test_a_bidirectional_model_draws_a_rate_for_each_sequence(tiny_corpus, tmp_path):
    more = ["--model.attention", "bidirectional", "--outcomes", "all", "--noise.short-rate", "0.5"]
    assert pretrain.main(flags(tiny_corpus, tmp_path, *more)) == 0
    facts = facts_of(tmp_path)
    assert load_model(str(tmp_path / "model"))[0].config.attention == "bidirectional"
    assert facts["noise"]["per"] == "sequence"
    assert (facts["noise"]["short_rate"], facts["noise"]["short_multiple"]) == (0.5, 1)
    assert facts["objective"] == {
        "name": "diffusion",
        "weight": "elbo",
        "normaliser": "maskable",
        "outcomes": "all",
    }


def test_every_choice_of_noise_and_loss_is_recorded_and_compared(tiny_corpus, tmp_path, capsys):
    more = ["--noise.complement", "True", "--noise.min-rate", "0.3", "--noise.max-rate", "0.8"]
    more += ["--noise.padding", "eos", "--weight", "cart", "--normaliser", "document"]
    more += ["--noise.short-rate", "0.2", "--noise.seed", "4", "--noise.strata", "8"]
    assert pretrain.main(flags(tiny_corpus, tmp_path, *more)) == 0
    assert facts_of(tmp_path)["noise"] == {
        "seed": 4,
        "block_size": 4,
        "per": "block",
        "min_rate": 0.3,
        "max_rate": 0.8,
        "strata": 8,
        "complement": True,
        "padding": "eos",
        "short_rate": 0.2,
        "short_multiple": 4,
        "sequences_per_batch": 4,
    }
    assert pretrain.main(flags(tiny_corpus, tmp_path, *more, "--noise.padding", "never")) == 3
    assert "noise.padding" in capsys.readouterr().err


def test_without_choices_the_corpus_recipe_is_recorded_as_it_is(tiny_corpus, tmp_path):
    assert pretrain.main(flags(tiny_corpus, tmp_path)) == 0
    assert facts_of(tmp_path)["noise"] == to_dict(Corpus.open(tiny_corpus).manifest.noise)


def test_missing_corpus_leaves_nothing_behind(tmp_path, capsys):
    code = pretrain.main(flags(tmp_path / "nowhere", tmp_path / "run"))
    assert code == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--trainer.sequences-per-step", "3", "--num-workers", "2"], "sequences_per_step=3"),
        (["--model.block-size", "8"], "block_size=8"),
        (["--num-workers", "-1"], "num_workers=-1"),
        (["--noise.complement", "True"], "use weight=unit, or noise.max_rate=0.999"),
        (
            ["--noise.complement", "True", "--trainer.sequences-per-step", "3"],
            "sequences_per_step=3 is odd; use 4",
        ),
        (["--noise.min-rate", "0"], "noise.min_rate=0.0"),
        (["--min-workers", "3", "--num-workers", "2"], "min_workers=3 must be in 1..2"),
        (
            ["--model.max-sequence-length", "32"],
            "sequences of 64 tokens; use model.max_sequence_length=64",
        ),
        (
            ["--num-workers", "4", "--min-workers", "2"],
            "sequences_per_step=4 cannot be shared by num_workers=3; use a multiple of 12",
        ),
        (["--output", "/dev/null/run"], "output=/dev/null/run"),
        (["--output", "/proc/x/run"], "output=/proc/x/run cannot be written"),
        (["--use-gpu", "True"], "this machine has no CUDA device"),
    ],
)
def test_mistake_is_one_sentence(tiny_corpus, tmp_path, capsys, more, sentence):
    assert pretrain.main(flags(tiny_corpus, tmp_path / "run", *more)) in (2, 3)
    error = capsys.readouterr().err
    assert sentence in " ".join(error.replace("│", "").split())
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def contents(folder):
    """Every file but the lease, which each run of the command leaves with a higher number."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files if not path.name.startswith("lease-")}


@pytest.fixture(scope="module")
def finished(tiny_corpus, tmp_path_factory):
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert pretrain.main(flags(tiny_corpus, folder)) == 0
    return folder


@pytest.mark.parametrize(
    ("more", "name", "old", "new"),
    [
        (["--model.num-layers", "3"], "model.num_layers", 2, 3),
        (["--model.block-size", "2"], "model.block_size", 4, 2),
        (["--weight", "unit"], "objective.weight", "'elbo'", "'unit'"),
        (["--trainer.sequences-per-step", "8"], "sequences_per_step", 4, 8),
    ],
)
def test_run_that_cannot_go_on_is_refused_and_leaves_the_other_as_it_was(
    tiny_corpus, finished, capsys, more, name, old, new
):
    before = contents(finished)
    for steps in ([], ["--trainer.num-steps", "6"]):
        assert pretrain.main(flags(tiny_corpus, finished, *more, *steps)) == 3
        error = " ".join(capsys.readouterr().err.replace("│", "").split())
        assert f"made with {name}={old} and this run has {name}={new}" in error
        assert contents(finished) == before


def test_run_that_can_go_on_tells_its_new_settings_and_writes_them_down(
    tiny_corpus, finished, tmp_path, capsys
):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    more = ["--trainer.num-steps", "6", "--optimizer.peak-lr", "0.01", "--held-out.draws", "2"]
    assert pretrain.main(flags(tiny_corpus, run, *more)) == 0
    changes = "optimizer.peak_lr 0.001 -> 0.01, trainer.num_steps 4 -> 6, held_out.draws 1 -> 2"
    assert f"goes on from step 4 with {changes}\n" in capsys.readouterr().err
    settings = read_yaml(str(run / "config.yaml"))
    assert settings["trainer"]["num_steps"] == 6
    assert pretrain.main(flags(tiny_corpus, run, *more, "--trainer.num-steps", "7")) == 0
    assert "goes on from step 6 with trainer.num_steps 6 -> 7\n" in capsys.readouterr().err
    shutil.rmtree(run / "model")
    assert pretrain.main(flags(tiny_corpus, run, *more, "--trainer.num-steps", "7")) == 0
    assert "goes on from step" not in capsys.readouterr().err


def test_a_damaged_checkpoint_is_told_once(tiny_corpus, finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "checkpoints" / "step_00000004" / "COMMIT").write_text("no")
    capsys.readouterr()
    assert pretrain.main(flags(tiny_corpus, run)) == 0
    error = capsys.readouterr().err
    assert error.count("COMMIT is damaged") == 1
    assert error.count("falling back to the one before it") == 1
    for step in (2, 4):
        (run / "checkpoints" / f"step_0000000{step}" / "COMMIT").write_text("no")
    assert pretrain.main(flags(tiny_corpus, run)) == 3
    error = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert error.count("COMMIT is damaged") == 2
    assert error.count("falling back to the one before it") == 1
    assert error.count("; there is none before it") == 1
    assert "none of the checkpoints in" in error


def test_finished_run_started_again_says_that_nothing_was_done_and_writes_nothing(
    tiny_corpus, finished, capsys
):
    before = contents(finished)
    assert pretrain.main(flags(tiny_corpus, finished)) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{finished} had finished, at step 4; nothing was done\n")
    assert "trained" not in said
    assert f"model: {finished}/model" in said
    assert pretrain.main(flags(tiny_corpus, finished, "--num-workers", "2")) == 0
    assert capsys.readouterr().out == said
    more = ["--optimizer.peak-lr", "0.01", "--trainer.num-steps", "2"]
    assert pretrain.main(flags(tiny_corpus, finished, *more)) == 0
    first = capsys.readouterr().out.splitlines()[0]
    changes = "optimizer.peak_lr 0.001 -> 0.01, trainer.num_steps 4 -> 2"
    assert first.startswith(f"{finished} had finished, at step 4; nothing was done; not used: ")
    assert f"not used: {changes}; give another output" in first
    assert contents(finished) == before


def stopped(words, run, environment=None):
    """Start a command, SIGTERM it after its first checkpoint; its exit code and what it said."""
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and newest(run / "checkpoints", str) is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=240)
    assert "Traceback" not in error
    return process.returncode, " ".join(error.replace("│", "").split())


def forever(corpus, output, *more):
    return flags(corpus, output, *more, "--trainer.num-steps", "1000000")


@pytest.mark.ray
def test_a_run_on_ray_that_is_told_to_stop_has_saved_its_last_step_and_goes_on(
    tiny_corpus, tmp_path
):
    run = tmp_path / "run"
    words = [sys.executable, "-m", "jobs.pretrain", *forever(tiny_corpus, run)]
    code, error = stopped([*words, "--num-workers", "1"], Folder(run))
    assert code == 75
    told = re.search(r"stopped at step (\d+) \(SIGTERM\); run the same command again", error)
    assert told, error
    step = int(told[1])
    assert verify(run / "checkpoints" / f"step_{step:08d}").step == step
    assert not {"launched", "stop.json", "outcome.json"} & {p.name for p in run.iterdir()}
    assert pretrain.main(flags(tiny_corpus, run, "--trainer.num-steps", str(step + 2))) == 0
    assert read_metrics(Folder(run))[-1]["step"] == step + 2


@pytest.mark.ray
def test_a_run_folder_may_lie_in_a_store(tiny_corpus, s3_url):
    run = s3_url.replace("/corpus", "/run")
    words = [sys.executable, "-m", "jobs.pretrain", *forever(tiny_corpus, run)]
    words += ["--num-workers", "1"]
    code, error = stopped(words, Folder(run), dict(os.environ))
    assert code == 75, error
    step = int(re.search(r"stopped at step (\d+)", error)[1])
    found = Folder(run).list()
    assert {"config.yaml", "metrics.jsonl", "checkpoints"} <= set(found)
    assert not {"launched", "stop.json", "outcome.json"} & set(found)
    assert pretrain.main(flags(tiny_corpus, run, "--trainer.num-steps", str(step + 2))) == 0
    summary = json.loads(Folder(run).read_bytes("summary.json"))
    assert summary["steps"] == step + 2
    assert load_model(f"{run}/model")[0].config.block_size == 4


def test_two_processes_of_torchrun_equal_one(tiny_corpus, finished, tmp_path):
    run = tmp_path / "run"
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [sys.executable, "-m", *launcher, "-m", "jobs.cascade", "pretrain"]
    done = subprocess.run(
        [*words, *flags(tiny_corpus, run)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model: ") == 1
    assert json.loads((run / "summary.json").read_text())["world_size"] == 2
    one, two = (read_metrics(Folder(folder)) for folder in (finished, run))
    pairs = zip(one, two, strict=True)
    assert all(a["loss"] == pytest.approx(b["loss"], rel=1e-5) for a, b in pairs)


def test_ranks_of_torchrun_tell_of_their_end_with_one_voice(tiny_corpus, tmp_path):
    """The ranks save and end with code 75; the launcher's own end is a 1, whatever they do, and it
    sends a SIGTERM to whoever is still leaving when the first one has left."""
    run = tmp_path / "run"
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [sys.executable, "-m", *launcher, "-m", "jobs.cascade", "pretrain"]
    job = subprocess.Popen([*words, *forever(tiny_corpus, run)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not list(run.glob("checkpoints/*/COMMIT")):
        time.sleep(0.1)
    ranks = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(ranks[1]), signal.SIGTERM)
    _, error = job.communicate(timeout=240)
    assert job.returncode == 1
    assert error.count("╭─ error") == error.count("stopped at step") == 1
    assert "75" in set(re.findall(r"exitcode +: (-?\d+)", error)) <= {"75", "-15"}
    wrong = [*words, *flags(tiny_corpus, run, "--weight", "unit")]
    done = subprocess.run(wrong, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert done.stderr.count("╭─ error") == done.stderr.count("objective.weight='elbo'") == 1
    assert "3" in set(re.findall(r"exitcode +: (-?\d+)", done.stderr)) <= {"3", "-15"}


def test_second_command_on_a_folder_in_use_is_refused_in_one_sentence(tiny_corpus, tmp_path):
    words = [sys.executable, "-m", "jobs.pretrain", *flags(tiny_corpus, tmp_path / "run")]
    endless = [*words, "--trainer.num-steps", "1000000"]
    first = subprocess.Popen(endless, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and not list(tmp_path.glob("run/checkpoints/*/COMMIT")):
            time.sleep(0.1)
        settings = (tmp_path / "run" / "config.yaml").read_text()
        second = subprocess.run(words, capture_output=True, text=True, timeout=240)
        assert second.returncode == 2
        error = " ".join(second.stderr.replace("│", "").split())
        assert f"is in use by process {first.pid} on" in error
        assert "Traceback" not in error
        assert (tmp_path / "run" / "config.yaml").read_text() == settings
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    # What it held is free at once, as it is known to be dead.
    third = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert third.returncode == 0, third.stderr


def dying_once(config, device, started):
    """The real training, but the first attempt's second rank dies with the data in its hands."""
    import os

    import torch.distributed as dist

    from cascade_model import checkpoint

    mark = Path(config.output) / "died"
    save = checkpoint.Checkpoints.save

    def save_and_die(*args):
        result = save(*args)
        result.wait()
        if dist.get_rank() == 1 and not mark.exists():
            mark.write_text("once")
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    checkpoint.Checkpoints.save = save_and_die
    return pretrain.train(config, device, started)


def robbed(config, device, started):
    """The real training, in a folder that another command has taken meanwhile."""
    from cascade_model import lease
    from cascade_model.commit import Folder

    lease._draw(Folder(config.output), lease.Owner.here(), lambda last: None)
    return pretrain.train(config, device, started)


def refusing(config, device, started):
    raise CheckpointMismatch("teacher=here has A and the student B; use one tokenizer")


@pytest.fixture
def ray_knows_this_file(ray_local):
    """Workers cannot import a test file: its functions travel by value."""
    from ray import cloudpickle

    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    yield ray_local
    cloudpickle.unregister_pickle_by_value(module)


@pytest.fixture(scope="module")
def run_of_two(ray_local, tiny_corpus, tmp_path_factory):
    """A run folder made by two ranks on Ray that nothing disturbed."""
    folder = tmp_path_factory.mktemp("two")
    assert pretrain.main(flags(tiny_corpus, folder, workers=2)) == 0
    return folder


@pytest.mark.ray
def test_two_ranks_on_ray_equal_one_process(run_of_two, tiny_corpus, tmp_path):
    assert pretrain.main(flags(tiny_corpus, tmp_path)) == 0
    assert json.loads((run_of_two / "summary.json").read_text())["world_size"] == 2
    one, two = (read_metrics(Folder(folder)) for folder in (tmp_path, run_of_two))
    pairs = zip(one, two, strict=True)
    assert all(a["loss"] == pytest.approx(b["loss"], rel=1e-5) for a, b in pairs)


@pytest.mark.ray
def test_rank_that_dies_is_replaced_and_the_run_ends_the_same(
    ray_knows_this_file, run_of_two, tiny_corpus, tmp_path
):
    config = parse(pretrain.PretrainConfig, flags(tiny_corpus, tmp_path, workers=2))
    training.start(config, dying_once, pretrain.objective(config))
    assert (tmp_path / "died").exists()
    whole, cut = (load_model(str(f / "model"))[0].state_dict() for f in (run_of_two, tmp_path))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.ray
def test_run_that_was_replaced_says_so_in_one_sentence(ray_knows_this_file, tiny_corpus, tmp_path):
    more = ["--max-failures", "0"]
    config = parse(pretrain.PretrainConfig, flags(tiny_corpus, tmp_path, *more, workers=1))
    with pytest.raises(InputError, match="was taken over by process"):
        training.start(config, robbed, pretrain.objective(config))
    assert not list(tmp_path.glob("checkpoints/step_*"))
    assert not (tmp_path / "outcome.json").exists()


@pytest.mark.ray
def test_mistake_inside_a_rank_comes_out_as_itself(ray_knows_this_file, tmp_path):
    with pytest.raises(CheckpointMismatch, match="teacher=here"):
        launch.launch(
            refusing,
            None,
            folder=Folder(tmp_path),
            placement=launch.Placement(num_workers=1, max_failures=1),
        )
    assert list(tmp_path.iterdir()) == []
