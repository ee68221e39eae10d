"""Means weigh by what was counted, and a window that travelled goes on."""

import dataclasses
import json

import pytest

from cascade_model.window import Window

STEPS = [
    ({"loss": 4.0, "count": 8.0, "band/0": 3.0, "band/0_count": 5.0, "band/1": 1.0,
      "band/1_count": 0.0, "other/kl": 3.0, "other/kl_count": 1.0}, 1.0),
    ({"loss": 2.0, "count": 4.0, "band/0": 0.0, "band/0_count": 0.0, "band/1": 2.0,
      "band/1_count": 4.0, "other/kl": 1.0, "other/kl_count": 3.0}, 3.0),
]  # fmt: skip


def filled(steps) -> Window:
    window = Window()
    for sums, norm in steps:
        window.add(sums, norm)
        window.spend(seconds=0.5, waited=0.1, tokens=64, processed=128, flops=1e6)
    return window


def test_means_weigh_by_tokens_and_rows_not_by_steps():
    means = filled(STEPS).means(peak=8e6)
    assert means["loss"] == 6.0 / 12.0
    assert means["loss_by_mask_rate"] == [3.0 / 5.0, 3.0 / 4.0]
    assert means["kl"] == 1.0
    assert means["grad_norm"] == 2.0
    assert means["tokens_per_second"] == 128.0
    assert means["processed_tokens_per_second"] == 256.0
    assert means["mfu"] == 0.25
    assert means["data_wait_rate"] == pytest.approx(0.2)
    assert filled(STEPS).means()["mfu"] is None


def test_a_band_without_rows_has_no_mean():
    assert filled(STEPS[:1]).means()["loss_by_mask_rate"] == [3.0 / 5.0, None]


def test_skipped_steps_take_time_and_add_to_no_mean():
    window = filled(STEPS[:1])
    window.skipped += 1
    window.spend(seconds=0.5, waited=0.0, tokens=64, processed=64, flops=0.0)
    means = window.means()
    assert (means["loss"], means["grad_norm"]) == (0.5, 1.0)
    assert means["tokens_per_second"] == 128.0
    assert means["skipped_steps"] == 1
    only = Window(steps=1, skipped=1, seconds=1.0).means()
    assert (only["loss"], only["grad_norm"], only["loss_by_mask_rate"]) == (None, None, [])


def test_a_window_that_travelled_through_json_goes_on_as_if_nothing_happened():
    window = Window(**json.loads(json.dumps(dataclasses.asdict(filled(STEPS[:1])))))
    window.add(*STEPS[1])
    window.spend(seconds=0.5, waited=0.1, tokens=64, processed=128, flops=1e6)
    assert window == filled(STEPS)
