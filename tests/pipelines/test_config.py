"""Settings of `prepare` check themselves; the sentence names setting, value and cure."""

import dataclasses

import pytest

from cascade_model.config import NoiseConfig
from cascade_model.errors import InputError
from pipelines.config import PrepareConfig, SourceConfig

GOOD = {
    "output": "out",
    "source": SourceConfig(paths=("a.jsonl",)),
    "sequence_length": 64,
    "noise": NoiseConfig(block_size=8),
}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sequence_length": 60}, "sequence_length=60 is not a multiple of noise.block_size=8"),
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"part_bytes": 0}, "part_bytes=0"),
        ({"held_out_rate": 1.0}, "held_out_rate=1.0"),
        ({"max_dead_rate": -0.1}, "max_dead_rate=-0.1"),
        ({"num_workers": 0}, "num_workers=0"),
        ({"sample_bytes": 0}, "sample_bytes=0"),
    ],
)
def test_settings_that_cannot_work_are_named(changes, sentence):
    with pytest.raises(InputError) as caught:
        PrepareConfig(**GOOD | changes)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(("length", "cure"), [(60, 56), (3, 8), (8191, 8184)])
def test_the_cure_for_a_length_is_a_length_that_works(length, cure):
    with pytest.raises(InputError, match=f"use {cure}$"):
        PrepareConfig(**GOOD | {"sequence_length": length})
    assert PrepareConfig(**GOOD | {"sequence_length": cure}).sequence_length == cure


def test_a_source_names_at_least_one_path():
    with pytest.raises(InputError, match=r"source\.paths is empty"):
        SourceConfig(paths=())


def test_a_config_can_be_replaced_field_by_field_and_is_checked_again():
    config = PrepareConfig(**GOOD)
    assert dataclasses.replace(config, sequence_length=128).sequence_length == 128
    with pytest.raises(InputError):
        dataclasses.replace(config, sequence_length=100)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sequence_length = 128
