"""Lines of metrics are the same whether a run was interrupted or not, and reach disk or store."""

import concurrent.futures
import json
import os
import threading

import pytest

from cascade_model import metrics
from cascade_model.commit import Folder
from cascade_model.lease import LeaseLost
from cascade_model.metrics import MetricsLog, progress_line, read_metrics, speed

LINE = {
    "loss": 2.5,
    "loss_by_mask_rate": [3.0, None],
    "grad_norm": 2.0,
    "tokens_per_second": 64.0,
    "data_wait_rate": 0.15,
    "seconds": 2.0,
    "mfu": None,
    "held_out_loss": None,
    "held_out_standard_error": None,
}


def line(step, **changes):
    return LINE | {"step": step, "tokens": 64 * step, "lr": 0.1} | changes


def steps(folder):
    return [each["step"] for each in read_metrics(Folder(folder))]


def test_lines_of_an_attempt_that_died_are_cut_and_written_anew(tmp_path):
    log = MetricsLog(Folder(tmp_path), 0)
    for step in (2, 4, 6):
        log.write(line(step), 0)
    log.close()
    log = MetricsLog(Folder(tmp_path), 4)
    log.write(line(6, loss=9.0), 0)
    found = log.close()
    assert [each["step"] for each in found] == [2, 4, 6]
    assert found[-1]["loss"] == 9.0
    assert read_metrics(Folder(tmp_path)) == found


def test_a_last_line_cut_by_a_crash_is_left_out(tmp_path):
    assert read_metrics(Folder(tmp_path)) == []
    text = "".join(json.dumps(line(step)) + "\n" for step in (2, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    assert steps(tmp_path) == [2, 4]
    path.write_text(text[:-5])
    assert steps(tmp_path) == [2]


def test_each_line_is_on_disk_when_it_is_written(tmp_path):
    log = MetricsLog(Folder(tmp_path), 0)
    log.write(line(2), 0)
    assert steps(tmp_path) == [2]
    log.abandon()
    assert steps(tmp_path) == [2]
    assert not (tmp_path / "loss.png").exists()


def test_the_curve_is_drawn_at_the_end_and_seldom_before(tmp_path, monkeypatch):
    log, started = MetricsLog(Folder(tmp_path), 0), threading.Event()
    real = metrics._drawn
    monkeypatch.setattr(metrics, "_drawn", lambda lines: started.wait(60) and real(lines))
    log.write(line(2), 0)
    log.draw()
    assert not (tmp_path / "loss.png").exists()  # nobody waits for it
    started.set()
    log._curve.result()
    log.draw()
    first = (tmp_path / "loss.png").read_bytes()
    assert first == real([line(2) | {"seconds_left": 0.0}])
    log.write(line(4, loss=1.0), 0)
    log.draw()
    assert log._curve is None
    assert (tmp_path / "loss.png").read_bytes() == first
    log.close()
    assert (tmp_path / "loss.png").read_bytes() != first


def test_a_curve_that_cannot_be_drawn_is_told_and_ends_nothing(tmp_path, monkeypatch, capsys):
    def fail(lines):
        raise ValueError("no font")

    monkeypatch.setattr(metrics, "_drawn", fail)
    monkeypatch.setattr(metrics, "DRAW_EVERY", 0.0)
    log = MetricsLog(Folder(tmp_path), 0)
    for _ in range(3):
        log.draw()
        concurrent.futures.wait([log._curve])
    log.close()
    assert capsys.readouterr().err.count("loss.png cannot be written: no font") == 1


def test_tensorboard_holds_the_same_values(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(Folder(tmp_path), 0)
    log.write(line(2), 0)
    log.write(line(4, held_out_loss=3.5), 0)
    log.close()
    log = MetricsLog(Folder(tmp_path), 2)
    log.write(line(4, loss=1.0, held_out_loss=3.0), 0)
    log.close()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(each.step, each.value) for each in found.Scalars("loss")] == [(2, 2.5), (4, 1.0)]
    assert [each.value for each in found.Scalars("held_out_loss")] == [3.0]
    assert [each.value for each in found.Scalars("loss_by_mask_rate/0")] == [3.0, 3.0]


def test_a_full_disk_is_told_once_and_what_is_missing_follows(tmp_path, capsys):
    log = MetricsLog(Folder(tmp_path), 0)
    log.write(line(2), 0)
    full = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    log._file.close()
    log._file = full
    log.write(line(4), 0)
    assert steps(tmp_path) == [2]
    assert "cannot be written: No space left on device" in capsys.readouterr().err
    log.write(line(6), 0)
    assert steps(tmp_path) == [2, 4, 6]
    log.abandon()


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path, capsys):
    log = MetricsLog(Folder(tmp_path), 0)
    log._file.close()
    log._file = None
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    for step in (2, 4, 6):
        log.write(line(step), 0)
    assert capsys.readouterr().err.count("metrics.jsonl cannot be written") == 1
    os.rmdir(tmp_path / "metrics.jsonl")
    log.save()
    assert steps(tmp_path) == [2, 4, 6]
    log.abandon()


def test_a_store_gets_the_lines_at_a_bounded_rate_and_all_files_when_saved(s3_url, monkeypatch):
    folder = Folder(s3_url)
    log = MetricsLog(folder, 0)
    log.write(line(2), 0)
    assert steps(s3_url) == []
    monkeypatch.setattr(metrics, "PUT_EVERY", 0.0)
    log.save()
    assert steps(s3_url) == [2]
    [events] = (folder / "tensorboard").list()
    size = (folder / "tensorboard").size(events)
    log.write(line(4), 0)
    assert steps(s3_url) == [2, 4]
    log.close()
    assert (folder / "tensorboard").size(events) > size
    assert folder.read_bytes("loss.png").startswith(b"\x89PNG")
    log = MetricsLog(folder, 2)
    assert steps(s3_url) == [2]
    log.close()
    assert len((folder / "tensorboard").list()) == 2


def test_a_progress_line_tells_what_a_person_asks_first():
    told = line(7, seconds_left=3725.0, mfu=0.4, skipped_steps=2, held_out_loss=3.0)
    assert progress_line(told).split("  ")[-9:] == [
        "loss 2.5000", "lr 1.00e-01", "grad norm 2.00", "64 data tokens/s", "data wait 15.0 %",
        "MFU 40 %", "2 steps skipped", "held out 3.0000", "1 h 2 min left",
    ]  # fmt: skip
    plain = progress_line(line(7, loss=None, grad_norm=None))
    assert "loss -" in plain
    assert "MFU" not in plain


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(4.4, "4 s"), (60, "1 min 0 s"), (3600, "1 h 0 min"), (200_000, "2 d 7 h")],
)
def test_time_left_has_two_units(seconds, told):
    assert f"  {told} left" in progress_line(line(1, seconds_left=seconds))


def test_speed_is_of_all_lines():
    seconds, rate = speed([line(1), line(2, tokens_per_second=16.0, seconds=6.0)])
    assert seconds == 8.0
    assert rate == (64.0 * 2 + 16.0 * 6) / 8


def test_lines_wait_while_the_folders_holder_is_not_known_and_end_with_another_one(tmp_path):
    answers = iter([None, OSError("silent"), None, None, None, LeaseLost("taken over")])

    def check():
        if answer := next(answers):
            raise answer

    log = MetricsLog(Folder(tmp_path), 0, check)
    log.write(line(2), 0)
    assert steps(tmp_path) == []
    log.write(line(4), 0)
    assert steps(tmp_path) == [2, 4]
    with pytest.raises(LeaseLost):
        log.write(line(6), 0)
    log.abandon()
    assert steps(tmp_path) == [2, 4]
