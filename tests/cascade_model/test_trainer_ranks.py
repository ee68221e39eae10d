"""Two real ranks take the steps of one, agree on every decision, and end cleanly."""

import dataclasses
import json
import re
import signal
import time

import pytest
import torch

from cascade_model.commit import Folder
from cascade_model.corpus import Corpus
from cascade_model.errors import Stopped
from cascade_model.evaluation import held_out
from cascade_model.metrics import read_metrics
from tests.cascade_model.training_runs import STEPS, elbo, losses, make, run_ranks, weights

LONG = dataclasses.replace(STEPS, num_steps=20, log_every=1, checkpoint_every=7)
HALF = dataclasses.replace(STEPS, precision="bfloat16", log_every=1)
NETWORKS = {
    "half": {"qk_norm": True, "qkv_bias": True},
    "half_dit": {"network": "dit", "num_kv_heads": 2, "tied_head": False},
}

BODY = """
from tests.cascade_model.test_trainer_ranks import HALF, NETWORKS
LONG = dataclasses.replace(STEPS, num_steps=20, log_every=1, checkpoint_every=7)
told = {}

def fit(name, *args, **named):
    try:
        make(corpus, folder / name, *args, **named).fit()
    except Exception as error:
        told[name] = [type(error).__name__, str(error)]

def watching(ids):
    def loss_fn(model, batch):
        ids.append(batch.sequence_ids.tolist())
        return elbo(model, batch)
    return loss_fn

told["ids"] = []
fit("two", LONG, watching(told["ids"]))
told["going_on"] = []
stop = iter([None] * 5 + ["the middle's end"] * (rank == 1))
fit("one_two_one", LONG, watching(told["going_on"]), more={"stop_wanted": lambda: next(stop, None)})

if __name__ == "__main__":
    for name, shape in NETWORKS.items():
        fit(f"{name}_whole", HALF, **shape)
        fit(f"{name}_cut", HALF, dying(3), **shape)
        fit(f"{name}_cut", HALF, **shape)
    short = dataclasses.replace(LONG, num_steps=6)
    fit("replicas", dataclasses.replace(short, replicas=2))
    fit("recomputed", dataclasses.replace(short, recompute=True))

    from functools import partial
    from cascade_model.evaluation import held_out
    part = Corpus.open(corpus_url, split="held_out")
    value = partial(held_out, corpus=part, sequences_per_forward=2)
    often = dataclasses.replace(short, evaluate_every=1, checkpoint_every=1)
    fit("evaluated", often, more={"held_out": value})
    fit("evaluated_cut", often, dying(3), more={"held_out": value})
    fit("evaluated_cut", often, more={"held_out": value})

    def poisoned(model, batch):
        parts = elbo(model, batch)
        bad = rank == 1 and next(calls) == 2
        return dataclasses.replace(parts, sum=parts.sum * float("inf")) if bad else parts
    calls = iter(range(100))
    fit("stopped_by_nan", LONG, poisoned)
    calls = iter(range(100))
    fit("skipped", dataclasses.replace(LONG, num_steps=4, not_finite="skip"), poisoned)

    def signalled(model, batch):
        if rank == 1 and next(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return elbo(model, batch)
    calls = iter(range(100))
    fit("signalled", LONG, signalled)
    (folder / f"told_{rank}.json").write_text(json.dumps(told))
"""


@pytest.fixture(scope="module")
def corpus(tiny_corpus):
    return Corpus.open(tiny_corpus)


@pytest.fixture(scope="module")
def run(corpus, tiny_corpus, tmp_path_factory):
    """The folder of all runs, and what each of two ranks told of them."""
    folder = tmp_path_factory.mktemp("ranks")
    ids = {"first": [], "last": [], "whole": []}

    def watching(name):
        def loss_fn(model, batch):
            ids[name].append(batch.sequence_ids.tolist())
            return elbo(model, batch)

        return loss_fn

    make(corpus, folder / "one", LONG, watching("whole")).fit()
    for name, shape in NETWORKS.items():
        make(corpus, folder / f"{name}_one", HALF, **shape).fit()
    stop = iter([None] * 5 + ["the beginning's end"])
    more = {"stop_wanted": lambda: next(stop)}
    beginning = make(corpus, folder / "one_two_one", LONG, watching("first"), more=more)
    with pytest.raises(Stopped, match="stopped at step 6"):
        beginning.fit()
    run_ranks(folder, tiny_corpus, f"corpus_url = {tiny_corpus!r}\n{BODY}")
    make(corpus, folder / "one_two_one", LONG, watching("last")).fit()
    told = [json.loads((folder / f"told_{rank}.json").read_text()) for rank in (0, 1)]
    return folder, told, ids


def close(one, two, rel=1e-6):
    """Whether two runs logged the same steps with nearly the same losses."""
    return all(
        a == b and x == pytest.approx(y, rel=rel)
        for (a, x), (b, y) in zip(losses(one), losses(two), strict=True)
    )


def is_equal(one, two):
    first, second = weights(one), weights(two)
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_first_twenty_losses_of_two_ranks_are_those_of_one(run):
    folder, _, _ = run
    assert len(losses(folder / "two")) == 20
    assert close(folder / "one", folder / "two")


def test_the_samples_of_each_step_are_the_same_for_any_number_of_ranks(run):
    _, told, ids = run
    steps = [a + b for a, b in zip(told[0]["ids"], told[1]["ids"], strict=True)]
    assert steps == [a + b for a, b in zip(ids["whole"][::2], ids["whole"][1::2], strict=True)]


def test_one_two_one_ranks_see_the_same_samples_and_losses(run):
    folder, told, ids = run
    middle = zip(told[0]["going_on"], told[1]["going_on"], strict=True)
    seen = ids["first"] + [each for pair in middle for each in pair] + ids["last"]
    assert seen == ids["whole"]
    assert [len(ids["first"]), len(told[0]["going_on"]), len(ids["last"])] == [12, 6, 16]
    assert close(folder / "one", folder / "one_two_one")


def test_a_reason_of_one_rank_stops_both(run):
    _, told, _ = run
    for rank in told:
        assert rank["one_two_one"][0] == "Stopped"
        assert "stopped at step 12 (the middle's end)" in rank["one_two_one"][1]


def test_a_signal_to_one_rank_stops_both_at_the_same_step(run):
    folder, told, _ = run
    name = signal.SIGTERM.name
    for rank in told:
        assert f"stopped at step 3 ({name})" in rank["signalled"][1]
    assert (folder / "signalled" / "checkpoints" / "step_00000003" / "COMMIT").exists()


@pytest.mark.parametrize("name", NETWORKS)
def test_two_ranks_take_the_steps_of_one_in_bfloat16(run, name):
    folder, _, _ = run
    one, two = folder / f"{name}_one", folder / f"{name}_whole"
    assert len(losses(one)) == 6
    assert close(one, two)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_sharded_run_in_bfloat16_resumes_bit_for_bit(run, name):
    folder, told, _ = run
    assert told[0][f"{name}_cut"][0] == "Killed"
    assert is_equal(folder / f"{name}_whole", folder / f"{name}_cut")
    assert losses(folder / f"{name}_whole") == losses(folder / f"{name}_cut")


def test_bfloat16_is_used_and_weights_stay_in_float32(run):
    folder, _, _ = run
    half = weights(folder / "half_whole")
    assert all(value.dtype == torch.float32 for value in half.values())
    assert any((value.bfloat16().float() != value).any() for value in half.values())
    exact, rounded = losses(folder / "one")[5][1], losses(folder / "half_whole")[5][1]
    assert rounded == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("name", ["replicas", "recomputed"])
def test_other_ways_to_hold_the_model_take_the_same_steps(run, name):
    folder, told, _ = run
    assert name not in told[0]
    assert close(folder / "evaluated", folder / name)


def test_a_held_out_value_is_that_of_one_rank_and_leaves_no_trace(run, corpus, tiny_corpus):
    folder, told, _ = run
    lines = read_metrics(Folder(folder / "evaluated"))
    part = Corpus.open(tiny_corpus, split="held_out")
    assert part.num_sequences % 4 != 0
    model = make(corpus, folder / "unused").model
    model.load_state_dict(weights(folder / "evaluated"))
    alone = held_out(model, part, sequences_per_forward=2)
    assert lines[-1]["held_out_loss"] == pytest.approx(alone.loss, rel=1e-6)
    assert lines[-1]["held_out_standard_error"] == pytest.approx(alone.standard_error, rel=1e-5)
    assert told[1]["evaluated_cut"][0] == "Killed"
    assert is_equal(folder / "evaluated", folder / "evaluated_cut")
    assert losses(folder / "evaluated") == losses(folder / "evaluated_cut")
    assert losses(folder / "evaluated")[:4] == losses(folder / "two")[:4]


def test_infinity_on_one_rank_is_seen_by_both(run, corpus):
    folder, told, _ = run
    for rank in told:
        assert rank["stopped_by_nan"][0] == "InputError"
        assert "not finite at step 3" in rank["stopped_by_nan"][1]
        assert "skipped" not in rank
    record = json.loads((folder / "skipped" / "not_finite_step_00000003.json").read_text())
    expected = corpus.batch(8, 4, corpus.manifest.noise).sequence_ids
    assert record["sequence_ids"] == [int(i) for i in expected]
    lines = read_metrics(Folder(folder / "skipped"))
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 0]


PREEMPTED = """
def slow(model, batch):
    time.sleep(0.05)
    return elbo(model, batch)

if __name__ == "__main__":
    steps = dataclasses.replace(STEPS, num_steps=2000, checkpoint_every=2000, log_every=1)
    try:
        make(corpus, folder / "run", steps, slow).fit()
    except Exception as error:
        (folder / f"end_{rank}").write_text(str(error))
        raise SystemExit(error.exit_code)
"""


def test_a_preempted_launcher_gives_its_ranks_the_time_to_save(tiny_corpus, tmp_path):
    def preempt(process):
        until = time.monotonic() + 240
        while len(read_metrics(Folder(tmp_path / "run"))) < 3 and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)

    run_ranks(tmp_path, tiny_corpus, PREEMPTED, code=None, meanwhile=preempt)
    ends = [(tmp_path / f"end_{rank}").read_text() for rank in (0, 1)]
    assert ends[0] == ends[1]
    step = int(re.fullmatch(r"stopped at step (\d+) \(SIGTERM\); run the same .*", ends[0])[1])
    assert 3 <= step < 2000
    assert (tmp_path / "run" / "checkpoints" / f"step_{step:08d}" / "COMMIT").exists()


SLOW = """
from cascade_model import checkpoint, trainer
from cascade_model.checkpoint_storage import Reader
BOUND = 6.0

def fit(*args):
    make(corpus, folder / "run", *args, more={"collective_timeout_s": BOUND}).fit()

def slowed(inner):
    def slow(*args, **named):
        time.sleep(1.4 * BOUND)
        return inner(*args, **named)
    return slow

try:
    fit(STEPS, dying(4))
except Killed:
    pass
if rank == 0:
    checkpoint.verify = slowed(checkpoint.verify)
    trainer.save_model = slowed(trainer.save_model)
else:
    Reader._fill = slowed(Reader._fill)
fit()
"""


def test_the_first_rank_may_hash_and_export_and_any_rank_read_for_longer_than_the_bound(
    corpus, tiny_corpus, tmp_path
):
    shown = run_ranks(tmp_path, tiny_corpus, SLOW)
    assert shown.count("resuming from") == 1
    assert len(losses(tmp_path / "run")) == 2
    assert weights(tmp_path / "run")


HYBRID = """
SMALL = dataclasses.replace(STEPS, num_steps=4, sequences_per_forward=1, log_every=1, replicas=2)

def fit(name, *args):
    trainer = make(corpus, folder / name, SMALL, *args)
    try:
        trainer.fit()
    except Killed:
        pass
    return trainer.model.embed.weight.device_mesh.shape

shape = fit("whole")
assert shape == (2, 2), shape
fit("cut", dying(3))
fit("cut")
"""


def test_two_replicas_of_two_shards_train_as_one_process_and_go_on_exactly(tiny_corpus, tmp_path):
    run_ranks(tmp_path, str(tiny_corpus), HYBRID, ranks=4)
    alone = dataclasses.replace(STEPS, num_steps=4, log_every=1)
    make(Corpus.open(tiny_corpus), tmp_path / "alone", alone).fit()
    whole, cut, one = (weights(tmp_path / name) for name in ("whole", "cut", "alone"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    for name in one:
        torch.testing.assert_close(whole[name], one[name], rtol=1e-3, atol=1e-4)
    expected = [pytest.approx(loss, rel=1e-5) for _, loss in losses(tmp_path / "alone")]
    assert [loss for _, loss in losses(tmp_path / "whole")] == expected
