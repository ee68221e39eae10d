"""A run that was cut, stopped or had steps passed over ends as if nothing had happened."""

import dataclasses
import json
import os
import signal

import pytest
import torch

from cascade_model import metrics
from cascade_model.checkpoint import load_weights, newest, verify
from cascade_model.commit import Folder
from cascade_model.corpus import Corpus
from cascade_model.errors import CheckpointMismatch, InputError, Stopped
from cascade_model.metrics import read_metrics
from cascade_model.training_config import Phase
from cascade_model.window import HeldOut
from tests.cascade_model.training_runs import STEPS, Killed, dying, elbo, losses, make, weights

GROWING = dataclasses.replace(
    STEPS,
    num_steps=9,
    block_sizes=(
        Phase(block_size=1, share=1 / 3),
        Phase(block_size=64, share=1 / 3),
        Phase(block_size=4, share=1 / 3),
    ),
)
HALF = dataclasses.replace(GROWING, precision="bfloat16")


@pytest.fixture(scope="module")
def corpus(tiny_corpus):
    return Corpus.open(tiny_corpus)


def is_equal(one, two):
    first, second = weights(one), weights(two)
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("trainer", [GROWING, HALF], ids=["float32", "bfloat16"])
def test_two_deaths_in_different_phases_leave_no_trace(corpus, tmp_path, trainer):
    make(corpus, tmp_path / "whole", trainer).fit()
    for forwards in (7, 7):
        with pytest.raises(Killed):
            make(corpus, tmp_path / "cut", trainer, dying(forwards)).fit()
    make(corpus, tmp_path / "cut", trainer).fit()
    assert is_equal(tmp_path / "whole", tmp_path / "cut")
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    sizes = [line["block_size"] for line in read_metrics(Folder(tmp_path / "cut"))]
    assert sizes == [1, 64, 4]


def test_each_phase_trains_with_its_own_blocks(corpus, tmp_path):
    seen = []

    def watching(model, batch):
        seen.append(batch.noise_block_size)
        return elbo(model, batch)

    make(corpus, tmp_path, GROWING, watching).fit()
    assert seen == [1] * 6 + [64] * 6 + [4] * 6


def test_another_schedule_is_refused_on_resume(corpus, tmp_path):
    with pytest.raises(Killed):
        make(corpus, tmp_path, GROWING, dying(7)).fit()
    other = dataclasses.replace(GROWING, block_sizes=())
    with pytest.raises(CheckpointMismatch, match="block_sizes"):
        make(corpus, tmp_path, other).fit()
    with pytest.raises(CheckpointMismatch, match="block_sizes"):
        make(corpus, tmp_path, dataclasses.replace(GROWING, num_steps=18)).fit()
    assert make(corpus, tmp_path, GROWING).fit()["steps"] == 9


def test_a_schedule_that_cannot_be_is_refused_before_the_folder_is_touched(corpus, tmp_path):
    wrong = dataclasses.replace(STEPS, block_sizes=(Phase(block_size=8, share=1.0),))
    with pytest.raises(InputError, match=r"block_sizes\[0\]\.block_size=8 is the last"):
        make(corpus, tmp_path, wrong).fit()
    assert not list(tmp_path.iterdir())


def at_call(number, act):
    """The loss; `act` runs at its call of this number, counted from 0."""
    calls = iter(range(1000))

    def loss_fn(model, batch):
        if next(calls) == number:
            act()
        return elbo(model, batch)

    return loss_fn


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_end_of_the_step_and_the_next_start_goes_on(corpus, tmp_path, number):
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    make(corpus, tmp_path / "whole").fit()
    interrupted = at_call(5, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Stopped, match=f"stopped at step 3 \\({number.name}\\)") as caught:
        make(corpus, tmp_path / "cut", loss_fn=interrupted).fit()
    assert caught.value.exit_code == 75
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    assert (tmp_path / "cut" / "checkpoints" / "step_00000003" / "COMMIT").exists()
    assert losses(tmp_path / "cut") == []
    make(corpus, tmp_path / "cut", loss_fn=dying(6)).fit()
    assert is_equal(tmp_path / "whole", tmp_path / "cut")
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_a_death_after_a_stop_at_a_logged_step_leaves_its_line_once(corpus, tmp_path):
    make(corpus, tmp_path / "whole").fit()
    stopping = at_call(5, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped, match="step 3"):
        make(corpus, tmp_path / "cut", loss_fn=stopping).fit()
    with pytest.raises(Killed):
        make(corpus, tmp_path / "cut", loss_fn=dying(1)).fit()
    assert [step for step, _ in told_in(Folder(tmp_path / "cut"))] == [3]
    make(corpus, tmp_path / "cut").fit()
    assert told_in(Folder(tmp_path / "cut")) == told_in(Folder(tmp_path / "whole"))


def test_a_second_interrupt_ends_at_once(corpus, tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make(corpus, tmp_path, loss_fn=at_call(5, twice)).fit()
    assert not (tmp_path / "checkpoints" / "step_00000003").exists()


def test_a_second_sigterm_does_not_hurry(corpus, tmp_path):
    def twice():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped, match="SIGTERM"):
        make(corpus, tmp_path, loss_fn=at_call(5, twice)).fit()


def test_a_reason_of_whoever_watches_stops_the_run_and_saves_are_told_of(corpus, tmp_path):
    asked, saved = iter(range(100)), []

    def stop_wanted():
        return "preempted" if next(asked) == 2 else None

    more = {"stop_wanted": stop_wanted, "on_save": lambda saving: saved.append(saving)}
    with pytest.raises(Stopped, match=r"stopped at step 3 \(preempted\); run the same command"):
        make(corpus, tmp_path, more=more).fit()
    assert [saving.step for saving in saved] == [2, 3]
    assert all(saving.wait() for saving in saved)


def test_a_wish_to_stop_in_the_last_step_is_met_by_its_end(corpus, tmp_path):
    ended = at_call(11, lambda: signal.raise_signal(signal.SIGTERM))
    assert make(corpus, tmp_path, loss_fn=ended).fit()["steps"] == 6


def held_out_of(model):
    """Some number of the weights."""
    return HeldOut(float(model.embed.weight.detach().square().mean()), 0.25)


def test_a_stop_at_an_evaluated_step_evaluates_on_the_next_start(corpus, tmp_path):
    trainer = dataclasses.replace(STEPS, evaluate_every=3, log_every=2)
    more = {"held_out": held_out_of}
    make(corpus, tmp_path / "whole", trainer, more=more).fit()
    stopping = at_call(5, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped, match="step 3"):
        make(corpus, tmp_path / "cut", trainer, stopping, more=more).fit()
    assert [line["step"] for line in read_metrics(Folder(tmp_path / "cut"))] == [2]
    make(corpus, tmp_path / "cut", trainer, more=more).fit()
    told = [
        [(line["step"], line["loss"], line["held_out_loss"]) for line in read_metrics(Folder(run))]
        for run in (tmp_path / "whole", tmp_path / "cut")
    ]
    assert told[0] == told[1]
    assert [step for step, _, value in told[0] if value is not None] == [3, 6]
    assert [step for step, _, _ in told[0]] == [2, 3, 4, 6]


VALUES = [3.0, 1.0, 2.0, 4.0, 5.0, 6.0]
MEASURED = dataclasses.replace(
    STEPS, evaluate_every=1, checkpoint_every=1, keep_last=1, keep_best=1, log_every=1
)


def measured(trainer):
    """The run with a held-out loss of its own at each step; the second step's is the lowest."""
    trainer.held_out = lambda model: HeldOut(VALUES[trainer._at.step - 1], 0.1)
    return trainer


def kept_in(folder):
    return [path.name for path in sorted((folder / "checkpoints").iterdir())]


def test_the_checkpoint_with_the_lowest_held_out_loss_is_kept(corpus, tmp_path):
    trainer = dataclasses.replace(MEASURED, keep_every=4)
    summary = measured(make(corpus, tmp_path, trainer)).fit()
    assert kept_in(tmp_path) == ["step_00000002", "step_00000004", "step_00000006"]
    assert summary["held_out_loss"] == 6.0


def stopping_at(step):
    """Fields of a run that is asked to stop in this step, counted from 1."""
    asked = iter(range(1, 1000))
    return {"stop_wanted": lambda: "enough" if next(asked) == step else None}


def score_at(folder, step):
    return verify(folder / "checkpoints" / f"step_{step:08d}").score


@pytest.mark.parametrize("dies", [False, True], ids=["goes on", "dies before the next save"])
def test_a_checkpoint_of_a_stop_is_measured_on_the_next_start_and_may_be_the_best(
    corpus, tmp_path, dies
):
    with pytest.raises(Stopped, match="step 2"):
        measured(make(corpus, tmp_path / "cut", MEASURED, more=stopping_at(2))).fit()
    assert score_at(tmp_path / "cut", 2) is None
    if dies:
        with pytest.raises(Killed):
            measured(make(corpus, tmp_path / "cut", MEASURED, dying(1))).fit()
        assert score_at(tmp_path / "cut", 2) == 1.0
    measured(make(corpus, tmp_path / "cut", MEASURED)).fit()
    measured(make(corpus, tmp_path / "whole", MEASURED)).fit()
    assert kept_in(tmp_path / "cut") == kept_in(tmp_path / "whole")
    assert kept_in(tmp_path / "cut") == ["step_00000002", "step_00000006"]
    assert score_at(tmp_path / "cut", 2) == score_at(tmp_path / "whole", 2) == 1.0
    assert is_equal(tmp_path / "whole", tmp_path / "cut")
    lines = read_metrics(Folder(tmp_path / "cut"))
    assert [line["held_out_loss"] for line in lines] == VALUES
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_a_checkpoint_that_only_the_stop_made_is_not_among_the_best(corpus, tmp_path):
    rarely = dataclasses.replace(MEASURED, checkpoint_every=3)
    with pytest.raises(Stopped, match="step 2"):
        measured(make(corpus, tmp_path, rarely, more=stopping_at(2))).fit()
    measured(make(corpus, tmp_path, rarely)).fit()
    assert kept_in(tmp_path) == ["step_00000003", "step_00000006"]


def poisoned(*numbers):
    """The loss, not finite at its calls of these numbers."""
    calls = iter(range(1000))

    def loss_fn(model, batch):
        parts = elbo(model, batch)
        bad = next(calls) in numbers
        return dataclasses.replace(parts, sum=parts.sum * float("nan")) if bad else parts

    return loss_fn


SKIPPING = dataclasses.replace(
    STEPS, num_steps=4, not_finite="skip", max_skipped_in_a_row=2, checkpoint_every=1, log_every=1
)


def test_a_step_that_is_not_finite_moves_no_weight_and_is_counted(corpus, tmp_path):
    kept = []
    trainer = make(corpus, tmp_path, SKIPPING, poisoned(3))
    trainer.on_save = lambda saving: kept.append(
        {name: value.clone() for name, value in trainer.model.state_dict().items()}
    )
    summary = trainer.fit()
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    assert not all(torch.equal(kept[1][name], kept[2][name]) for name in kept[0])
    lines = read_metrics(Folder(tmp_path))
    assert [line["skipped_steps"] for line in lines] == [0, 1, 0, 0]
    assert lines[1]["loss"] is None
    assert summary["skipped_steps"] == 1
    record = json.loads((tmp_path / "not_finite_step_00000002.json").read_text())
    expected = corpus.batch(4, 4, corpus.manifest.noise).sequence_ids
    assert record["sequence_ids"] == [int(i) for i in expected]


def test_a_gradient_that_is_not_finite_is_seen_where_the_loss_is(corpus, tmp_path):
    def steep(model, batch):
        parts = elbo(model, batch)
        calls.append(1)
        if len(calls) == 3:  # a value of 0 with a gradient without bounds
            extra = (model.embed.weight.sum() * 0.0).sqrt()
            return dataclasses.replace(parts, sum=parts.sum + extra)
        return parts

    calls = []
    make(corpus, tmp_path, SKIPPING, steep).fit()
    lines = read_metrics(Folder(tmp_path))
    assert [line["skipped_steps"] for line in lines] == [0, 1, 0, 0]
    record = json.loads((tmp_path / "not_finite_step_00000002.json").read_text())
    assert float(record["loss_sum"]) > 0
    assert record["grad_norm"] == "nan"


def test_patience_has_an_end_that_counts_over_a_restart(corpus, tmp_path):
    bad, ends = poisoned(2, 4), dying(6)

    def both(model, batch):
        ends(model, batch)
        return bad(model, batch)

    with pytest.raises(Killed):
        make(corpus, tmp_path, SKIPPING, both).fit()
    with pytest.raises(InputError, match=r"not finite at step 4 .* and 2 before it"):
        make(corpus, tmp_path, SKIPPING, poisoned(*range(8))).fit()


def test_recomputed_layers_give_the_same_gradients_bit_for_bit(corpus, tmp_path):
    make(corpus, tmp_path / "kept").fit()
    again = dataclasses.replace(STEPS, recompute=True)
    make(corpus, tmp_path / "again", trainer=again).fit()
    assert is_equal(tmp_path / "kept", tmp_path / "again")
    assert losses(tmp_path / "kept") == losses(tmp_path / "again")


def test_a_run_in_a_store_stops_and_goes_on_as_one_on_a_disk(corpus, tmp_path, s3_url):
    often = dataclasses.replace(STEPS, num_steps=20, log_every=1)

    with pytest.raises(Stopped, match="step 6"):
        make(corpus, tmp_path / "disk", often, more=stopping_at(6)).fit()
    for _ in range(2):
        store = make(corpus, Folder(s3_url), often, more=stopping_at(3))
        with pytest.raises(Stopped):
            store.fit()
    assert [line["step"] for line in read_metrics(Folder(s3_url))] == [1, 2, 3, 4, 5]
    assert told_in(Folder(s3_url)) == told_in(Folder(tmp_path / "disk"))
    saved = newest(Folder(s3_url) / "checkpoints", print)
    assert saved is not None
    assert saved.step == 6
    disk = make(corpus, tmp_path / "unused")
    load_weights(newest(Folder(tmp_path / "disk") / "checkpoints", print), disk.model)
    state = store.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in disk.model.state_dict().items())
    assert Folder(s3_url).read_bytes("loss.png").startswith(b"\x89PNG")


def test_a_store_that_is_silent_for_some_steps_ends_no_run(corpus, tmp_path, s3_url, monkeypatch):
    """Two lines, an evaluation and a save are due while no request is answered."""
    import s3fs
    from botocore.exceptions import EndpointConnectionError

    answering, steps = s3fs.S3FileSystem._call_s3, set()
    calls = iter(range(1000))

    async def answer(self, *words, **named):
        if steps & {3, 4}:
            raise EndpointConnectionError(endpoint_url=s3_url)
        return await answering(self, *words, **named)

    def watched(model, batch):
        steps.clear()
        steps.add(next(calls) // 2 + 1)
        return elbo(model, batch)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", answer)
    monkeypatch.setattr(metrics, "PUT_EVERY", 0.0)
    often = dataclasses.replace(STEPS, log_every=1, evaluate_every=3)
    more = {"held_out": held_out_of, "on_save": lambda saving: saving.wait()}
    make(corpus, tmp_path, often, more=more).fit()
    make(corpus, Folder(s3_url), often, watched, more=more).fit()
    assert told_in(Folder(s3_url)) == told_in(Folder(tmp_path))
    lines = read_metrics(Folder(s3_url))
    assert [line["failed_checkpoints"] for line in lines] == [0, 0, 0, 0, 1, 1]


def told_in(folder):
    return [(line["step"], line["loss"]) for line in read_metrics(folder)]
