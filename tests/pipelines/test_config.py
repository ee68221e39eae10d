"""Settings of `prepare` check themselves; the sentence names setting, value and cure."""

import dataclasses

import pytest

from cascade_model.config import NoiseConfig
from cascade_model.errors import InputError
from cascade_model.mixing import UNITS
from jobs.cli import parse
from pipelines.config import FilterConfig, PrepareConfig, SourceConfig

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
        ({"max_document_bytes": 3}, "max_document_bytes=3"),
        ({"output": ""}, "output is empty"),
        ({"source": SourceConfig()}, "source.paths is empty"),
        ({"mixture": {"web": SourceConfig(paths=("b",))}}, "mixture=['web'] are both given"),
        ({"source": SourceConfig(), "mixture": {"web": SourceConfig()}}, "mixture.web.paths is"),
        (
            {
                "source": SourceConfig(),
                "mixture": {f"s{i}": SourceConfig(paths=("b",)) for i in range(UNITS + 1)},
            },
            "mixture has 1025 sources, at most 1024 can be mixed",
        ),
        *(
            ({"source": SourceConfig(paths=("a",), **wrong)}, sentence)
            for wrong, sentence in [
                ({"weight": 0.0}, "source.weight=0.0 must be"),
                ({"weight": float("inf")}, "source.weight=inf must be"),
                ({"weight": float("nan")}, "source.weight=nan must be"),
                ({"messages_column": "m", "text_column": "t"}, "source.text_column=t contradict"),
                ({"messages_column": "m", "format": "text"}, "source.format=text has none"),
            ]
        ),
        (
            {
                "source": SourceConfig(),
                "mixture": {
                    "web": SourceConfig(paths=("b",)),
                    "code": SourceConfig(paths=("c",), weight=-1),
                },
            },
            "mixture.code.weight=-1 must be",
        ),
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


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        (FilterConfig, {"min_letter_share": 1.5}, "filters.min_letter_share=1.5"),
        (FilterConfig, {"min_bytes": -1}, "filters.min_bytes=-1"),
        (FilterConfig, {"banned_phrases": ("",)}, "filters.banned_phrases"),
        (FilterConfig, {"min_words": 9, "max_words": 8}, "filters.min_words=9 is above"),
        (
            FilterConfig,
            {"min_mean_word_length": 3.5, "max_mean_word_length": 3.0},
            "filters.max_mean_word_length=3.0",
        ),
    ],
)
def test_groups_that_cannot_work_are_named(kind, changes, sentence):
    with pytest.raises(InputError) as caught:
        kind(**changes)
    assert sentence in str(caught.value)


def test_one_source_or_a_mixture_by_name_in_the_order_of_the_file(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("output: out\nmixture:\n  web: {paths: [w], weight: 3}\n  code: {paths: [c]}\n")
    config = parse(PrepareConfig, ["--config", str(file), "--mixture.code.weight", "2"])
    assert list(config.sources) == ["web", "code"]
    assert [source.weight for source in config.sources.values()] == [3.0, 2.0]
    alone = PrepareConfig(**GOOD)
    assert alone.sources == {"source": alone.source}
    assert not alone.has_chats
    chats = SourceConfig(paths=("a",), messages_column="messages")
    assert PrepareConfig(**GOOD | {"source": chats}).has_chats


def test_a_config_can_be_replaced_field_by_field_and_is_checked_again():
    config = PrepareConfig(**GOOD)
    assert dataclasses.replace(config, sequence_length=128).sequence_length == 128
    with pytest.raises(InputError):
        dataclasses.replace(config, sequence_length=100)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sequence_length = 128
