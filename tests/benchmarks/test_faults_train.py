"""The fault table of training: where it strikes, what it compares, and that it can fail."""

import dataclasses
import math
import shutil
import signal

import pytest

from tests.benchmarks import faults_train_damage
from tests.benchmarks.faults_train import (
    RANKS,
    Point,
    corpus_in,
    points_of,
    round_of,
    undisturbed_run,
)
from tests.benchmarks.faults_train_ranks import (
    STILL_IN_SAVE,
    committed,
    difference,
    follows,
    stand_still,
    steps_of,
)
from tests.benchmarks.rank_points import (
    AFTER_DATA,
    IN_SAVE,
    OF_FIRST_RANK,
    PHASES,
    counts_of,
    ids_of,
    name_of,
)
from tests.benchmarks.rank_runs import STEPS, Launcher, Result, flags, result_of
from tests.cascade_model.checkpoint_damage import HIDDEN, PLAIN

EVERY = {(phase, rank): 7 for phase in PHASES for rank in range(RANKS)}


@pytest.fixture(scope="module")
def launcher():
    with Launcher() as started:
        yield started


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return corpus_in(tmp_path_factory.mktemp("corpus") / "corpus")


def finished(run) -> Result:
    """What a run left, which must have come to its end."""
    found = result_of(run)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def undisturbed(launcher, corpus, tmp_path_factory):
    """A run that nobody disturbs, with its points beside it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    undisturbed_run(launcher, corpus, folder)
    return folder


@pytest.mark.parametrize("count", [1, 2, 3, 20, 50])
def test_enough_points_lie_in_a_save_and_before_commit(count):
    points = points_of(count, EVERY)
    assert points == points_of(count, EVERY)
    assert len(points) == count
    assert sum(p.phase in IN_SAVE for p in points) >= count / 4
    assert sum(p.phase in AFTER_DATA for p in points) >= 3 * count / 20
    assert all(1 <= p.number <= 7 and p.victim in range(RANKS) for p in points)
    assert all(p.rank == 0 for p in points if p.phase in OF_FIRST_RANK)
    assert count < 20 or {p.victim for p in points} == {0, 1}
    assert count < 20 or points != points_of(count, EVERY, seed=1)


@pytest.mark.parametrize("seed", range(50))
def test_every_phase_is_struck_by_fourteen_kills(seed):
    """Three after the data fall on two phases; no other comes twice before all came once."""
    assert {point.phase for point in points_of(14, EVERY, seed)} == set(PHASES)


def test_a_run_passes_every_point(undisturbed):
    passed = counts_of(undisturbed / "events", RANKS)
    for (phase, rank), count in passed.items():
        assert bool(count) == (rank == 0 or phase not in OF_FIRST_RANK), (phase, rank)
    assert passed["forward", 0] == passed["optimiser", 1] == STEPS
    assert passed["COMMIT named", 0] == passed["manifest written", 0] == STEPS // 2


def test_a_result_is_weights_and_every_line_but_its_times(undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed / "run", run)
    whole = finished(run)
    assert whole == finished(undisturbed / "run")
    assert len(whole.lines) == STEPS
    assert {"loss", "grad_norm", "lr", "samples", "loss_by_mask_rate"} <= set(whole.lines[0])
    [weights] = (run / "model").glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert finished(run).weights != whole.weights
    (run / "metrics.jsonl").write_text("")
    assert finished(run).lines != whole.lines
    (run / "summary.json").unlink()
    assert result_of(run) is None


def test_a_kill_inside_a_save_is_survived(launcher, corpus, undisturbed, tmp_path):
    point = Point("COMMIT written", 0, 3, victim=1)
    wanted = finished(undisturbed / "run")
    outcome = round_of(launcher, point, tmp_path / "round", corpus, wanted)
    assert outcome.is_same, outcome.says
    other = dataclasses.replace(wanted, weights="another")
    shutil.rmtree(tmp_path / "round")
    assert not round_of(launcher, point, tmp_path / "round", corpus, other).is_same


def test_a_round_whose_point_never_comes_does_not_count(launcher, corpus, undisturbed, tmp_path):
    never = Point("forward", 0, 10 * STEPS, victim=0)
    wanted = finished(undisturbed / "run")
    assert not round_of(launcher, never, tmp_path, corpus, wanted).is_same
    assert result_of(tmp_path / "run") == wanted


def test_without_the_protocol_a_kill_is_found_out(launcher, corpus, undisturbed, tmp_path):
    point = Point("data half written", 0, 3, victim=0)
    wanted = finished(undisturbed / "run")
    outcome = round_of(launcher, point, tmp_path, corpus, wanted, is_naive=True)
    assert outcome.was_killed
    assert not outcome.is_same


def test_without_a_fault_the_naive_saves_work(launcher, corpus, undisturbed, tmp_path):
    """Or the control would fail for another reason than the kill."""
    assert launcher.run(flags(corpus, tmp_path / "run"), tmp_path / "e", is_naive=True) == [0, 0]
    assert result_of(tmp_path / "run") == finished(undisturbed / "run")


def test_a_stopped_rank_is_a_living_one(launcher, corpus, tmp_path):
    words = flags(corpus, tmp_path / "run")
    ranks = launcher.start(words, tmp_path / "events", target=(name_of("forward", 0), 2))
    assert ranks.until_paused()
    assert ranks.paused == 0
    ranks.signal(signal.SIGSTOP, 0)
    assert not ranks.wait(0.5)
    assert ranks.exits == [None, None]
    ranks.kill_all()
    assert ranks.exits[0] == -signal.SIGKILL


@pytest.mark.parametrize(("phase", "rank"), STILL_IN_SAVE)
def test_a_rank_that_stands_still_in_a_save_ends_the_other(
    launcher, corpus, undisturbed, tmp_path, phase, rank
):
    seconds, _, again = stand_still(launcher, corpus, tmp_path, 6.0, (phase, rank, 3))
    assert seconds < 11
    assert again == [0, 0]
    assert result_of(tmp_path / "run") == finished(undisturbed / "run")


def test_every_consumed_batch_is_logged(undisturbed):
    steps = steps_of(ids_of(undisturbed / "events", RANKS))
    assert len(steps) == STEPS
    assert len({number for step in steps for number in step}) == 4 * STEPS
    assert committed(undisturbed / "run")[-1] == STEPS


def test_only_the_same_order_without_a_gap_follows():
    wanted = [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert follows([wanted], wanted)
    assert follows([wanted[:2], wanted[1:3], wanted[3:]], wanted)
    assert not follows([wanted[:3]], wanted)
    assert not follows([wanted[:1], wanted[2:]], wanted)
    assert not follows([wanted[:2], [[5, 4]], wanted[3:]], wanted)
    assert not follows([[[1, 0]], wanted], wanted)
    assert not follows([[], wanted], wanted)


def test_steps_are_the_same_on_one_rank_and_on_two():
    two = [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    one = [[[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]]
    assert steps_of(two) == steps_of(one) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_the_difference_is_the_largest_one():
    def of(*losses):
        return Result("", [{"loss": loss} for loss in losses])

    assert difference(of(1.0, 2.0), of(1.0, 2.0)) == 0
    assert difference(of(1.0, 2.2), of(1.0, 2.0)) == pytest.approx(0.1)
    assert difference(of(1.0), of(1.0, 2.0)) == math.inf
    assert difference(None, of(1.0)) == math.inf


def test_a_damage_counts_only_when_it_is_told_and_passed_over(launcher, corpus, tmp_path):
    words = [*flags(corpus, tmp_path / "run", steps=2), "--trainer.checkpoint-every", "1"]
    assert launcher.run(words, tmp_path / "events") == [0, 0]
    checkpoints = tmp_path / "run/checkpoints"
    assert not faults_train_damage.is_found(checkpoints)
    for number, kind in enumerate({**PLAIN, **HIDDEN}):
        copy = faults_train_damage.damaged(checkpoints, tmp_path / "copy", kind, number)
        assert faults_train_damage.is_found(copy), kind
    copy = faults_train_damage.damaged(checkpoints, tmp_path / "copy", "bit flip", 3)
    with faults_train_damage.believing():
        assert not faults_train_damage.is_found(checkpoints)
    assert faults_train_damage.is_found(copy)
