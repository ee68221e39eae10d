"""Lines of metrics are the same whether a run was interrupted or not."""

import dataclasses
import json

import pytest

from cascade_model.metrics import MetricsLog, Window, progress_line, read_metrics, speed

STEPS = [
    ([4.0, 8.0, 3.0, 1.0, 5.0, 0.0], 1.0, 0.1, 0.5),
    ([2.0, 4.0, 0.0, 2.0, 0.0, 4.0], 3.0, 0.2, 1.5),
]


def filled(steps) -> Window:
    window = Window()
    for step in steps:
        window.add(*step)
    return window


def line(step, **changes):
    return filled(STEPS).means(64) | {"step": step, "lr": 0.1} | changes


def test_means_weigh_by_tokens_and_rows_not_by_steps():
    means = filled(STEPS).means(64)
    assert means["loss"] == 6.0 / 12.0
    assert means["loss_by_mask_rate"] == [3.0 / 5.0, 3.0 / 4.0]
    assert means["grad_norm"] == 2.0
    assert means["tokens_per_second"] == 2 * 64 / 2.0
    assert means["data_wait_rate"] == pytest.approx(0.15)


def test_a_band_without_rows_has_no_mean():
    assert filled(STEPS[:1]).means(64)["loss_by_mask_rate"] == [3.0 / 5.0, None]


def test_a_window_that_travelled_through_json_goes_on_as_if_nothing_happened():
    window = Window(**json.loads(json.dumps(dataclasses.asdict(filled(STEPS[:1])))))
    window.add(*STEPS[1])
    assert window == filled(STEPS)


def test_steps_of_another_number_of_bands_are_a_fault():
    with pytest.raises(ValueError, match="zip"):
        filled(STEPS).add([1.0, 2.0], 0.0, 0.0, 0.0)


def test_lines_of_an_attempt_that_died_are_cut_and_written_anew(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (2, 4, 6):
        log.write(line(step))
    log.close()
    log = MetricsLog(tmp_path, 4)
    log.write(line(6, loss=9.0))
    found = log.close()
    assert [each["step"] for each in found] == [2, 4, 6]
    assert found[-1]["loss"] == 9.0
    assert read_metrics(tmp_path / "metrics.jsonl") == found


def test_a_last_line_cut_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    text = json.dumps(line(2)) + "\n" + json.dumps(line(4))
    path.write_text(text)
    assert [each["step"] for each in read_metrics(path)] == [2, 4]
    path.write_text(text[:-3])
    assert [each["step"] for each in read_metrics(path)] == [2]


def test_the_speed_of_a_run_weighs_its_lines_by_their_time():
    lines = [
        {"seconds": 1.0, "tokens_per_second": 100.0},
        {"seconds": 3.0, "tokens_per_second": 20.0},
    ]
    assert speed(lines) == (4.0, 160.0 / 4.0)
    assert speed([]) == (0, 0.0)


def test_a_line_can_be_shown_to_a_person():
    assert progress_line(line(12)).startswith("step     12  loss 0.5000  lr 1.00e-01")
