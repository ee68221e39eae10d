"""Conversion of an autoregressive checkpoint: as a teacher, and as a block-diffusion start."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cascade_model.attention import dense
from cascade_model.batch import TrainBatch
from cascade_model.families import read_checkpoint
from cascade_model.model import never_emitted
from cascade_model.networks import own_state
from cascade_model.own_template import own_template
from cascade_model.requests import rearranged
from cascade_model.sampler import sample
from cascade_model.sampling import SamplingParams
from cascade_model.tokenizer import Tokenizer, byte_tokenizer
from cascade_model.training_input import read_rows, source_rows
from cascade_model.weights import load_model, read_config, read_published
from jobs import convert, export
from tests.conformance.checkpoints import smollm2_file

DATA = Path(__file__).parents[1] / "data/conformance"
LLAMA = DATA / "ar/llama"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """The recorded Llama with a byte tokenizer that knows neither mask nor padding."""
    folder = tmp_path / "llama"
    shutil.copytree(LLAMA, folder)
    document = json.loads(byte_tokenizer().to_bytes())
    document["added_tokens"] = document["added_tokens"][:1]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    assert not Tokenizer.from_file(folder).has("mask")
    return folder


def convert_to(checkpoint: Path, name: str, *flags: str) -> Path:
    output = checkpoint.parent / name
    assert convert.main(["--source", str(checkpoint), "--output", str(output), *flags]) == 0
    return output


def test_the_teacher_predicts_exactly_what_the_checkpoint_does(checkpoint):
    folder = convert_to(checkpoint, "teacher", "--block-size", "1")
    model, _ = load_model(folder)
    assert model.config.is_autoregressive
    case = next(
        case
        for case in json.loads((LLAMA.parent / "cases.json").read_text())
        if case["name"] == "llama_logits_b1"
    )
    tokens = torch.tensor(case["input_ids"])
    length = tokens.shape[1]
    logits = model(
        tokens,
        torch.arange(length)[None],
        dense(torch.ones(length, length, dtype=torch.bool).tril()[None, None]),
        lambda hidden, head: head(hidden),
    )
    expected = load_file(LLAMA.parent / "arrays.safetensors")["llama_logits_b1.logits"]
    rows = expected.shape[-1]
    untouched = [i for i in range(rows) if i not in (model.config.mask_id, model.config.pad_id)]
    assert (logits - expected)[..., untouched].abs().max() <= 1e-3


def recorded() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [1, L] and what the published checkpoint's own code said of them, [1, L, v]."""
    cases = json.loads((LLAMA.parent / "cases.json").read_text())
    case = next(case for case in cases if case["name"] == "llama_logits_b1")
    expected = load_file(LLAMA.parent / "arrays.safetensors")["llama_logits_b1.logits"]
    return torch.tensor(case["input_ids"]), expected


def read_logits(model, tokens: torch.Tensor, rows: torch.Tensor, **how) -> torch.Tensor:
    """Logits [r, v] of rows of the training input over tokens, all of which are masked."""
    config = model.config
    length = tokens.shape[1]
    batch = TrainBatch.of(tokens, torch.ones(1, length).bool(), block_size=config.block_size)
    sequences = torch.zeros_like(rows)
    return read_rows(model, batch, config, sequences, rows, lambda h, head: head(h), **how)


def outcomes(model, logits: torch.Tensor) -> torch.Tensor:
    """All but those of the rows that the conversion drew anew."""
    banned = never_emitted(model.config)
    return logits[:, [i for i in range(logits.shape[-1]) if i not in banned]]


def test_at_block_size_one_training_reads_what_the_checkpoint_predicts(checkpoint):
    """Shifted with the clean source: row i-1 of the pass is the prediction of token i."""
    model, _ = load_model(convert_to(checkpoint, "one", "--block-size", "1"))
    tokens, expected = recorded()
    found = read_logits(model, tokens, torch.arange(tokens.shape[1]))
    error = outcomes(model, found) - outcomes(model, expected[0])
    assert error.abs().max() <= 1e-3


@pytest.mark.parametrize("logits", ["aligned", "shifted"])
def test_clean_rows_of_a_token_causal_half_are_the_checkpoint_whatever_the_block(
    checkpoint, logits
):
    flags = ["--block-size", "4", "--logits", logits, "--clean-half"]
    tokens, expected = recorded()
    length = tokens.shape[1]
    errors = []
    for half in ("token_causal", "block_causal"):
        model, _ = load_model(convert_to(checkpoint, half, *flags, half))
        rows = torch.arange(length, 2 * length)
        found = read_logits(model, tokens, rows, is_doubled=True)
        error = outcomes(model, found) - outcomes(model, expected[0])
        errors.append(float(error.abs().max()))
    assert errors[0] <= 1e-3 < errors[1]


def test_a_shifted_start_predicts_the_first_place_of_a_block_as_the_checkpoint_does(checkpoint):
    """From the last clean row; the other places of a block have yet to be learnt."""
    flags = ["--block-size", "4", "--clean-half", "token_causal"]
    model, _ = load_model(convert_to(checkpoint, "start", *flags))
    tokens, expected = recorded()
    batch = TrainBatch.of(tokens, torch.ones_like(tokens).bool(), block_size=4)
    rows = source_rows(model.config, batch)[0]
    firsts = torch.arange(4, tokens.shape[1], 4)
    found = read_logits(model, tokens, rows[firsts])
    error = outcomes(model, found) - outcomes(model, expected[0, firsts - 1])
    assert error.abs().max() <= 1e-3
    others = firsts + 1
    found = read_logits(model, tokens, rows[others])
    error = outcomes(model, found) - outcomes(model, expected[0, others - 1])
    assert error.abs().max() > 0.1


@pytest.mark.parametrize("first_place", ["clean", "noisy", "own"])
def test_the_first_places_source_is_recorded(checkpoint, first_place):
    config = read_config(convert_to(checkpoint, "start", "--first-place", first_place))
    assert (config.logits, config.first_place) == ("shifted", first_place)


@pytest.mark.slow
@pytest.mark.skipif(smollm2_file() is None, reason="no weights")
def test_smollm2_converted_says_what_its_own_code_said(tmp_path):
    """The published top-20 logits, from a teacher and from the clean rows of an aligned start."""
    folder = DATA / "smollm2"
    arrays = load_file(folder / "arrays.safetensors")
    cases = [c for c in json.loads((folder / "cases.json").read_text()) if "top20" in c["name"]]
    aligned = ["--block-size", "4", "--logits", "aligned", "--clean-half", "token_causal"]
    for flags, is_doubled in ((["--block-size", "1"], False), (aligned, True)):
        output = tmp_path / "model"
        source = ["--source", str(smollm2_file()), "--output", str(output)]
        assert convert.main([*source, *flags]) == 0
        model, _ = load_model(output)
        for case in cases:
            ids = case["input_ids"][0]
            length = -(-len(ids) // 4) * 4
            tokens = torch.tensor([ids + [1] * (length - len(ids))])  # later tokens are not seen
            row = torch.tensor([len(ids) - 1 + length * is_doubled])
            [found] = read_logits(model, tokens, row, is_doubled=is_doubled)
            top = arrays[f"{case['name']}.top_ids"].flatten()[-20:].long()
            wanted = arrays[f"{case['name']}.top_values"].flatten()[-20:]
            torch.testing.assert_close(found[top], wanted, rtol=0, atol=2e-3)
            assert int(found[: model.config.mask_id].argmax()) == top[0]


def test_every_choice_of_the_conversion_is_recorded(checkpoint):
    flags = ["--block-size", "4", "--logits", "aligned", "--clean-half", "token_causal"]
    config = read_config(convert_to(checkpoint, "start", *flags, "--max-sequence-length", "64"))
    assert (config.block_size, config.logits, config.clean_half) == (4, "aligned", "token_causal")
    assert config.max_sequence_length == 64
    assert config.tokenizer_sha256 == Tokenizer.from_file(checkpoint).with_specials().sha256


def test_tokens_of_infilling_get_rows_and_nothing_else_changes(checkpoint):
    start = convert_to(checkpoint, "start", "--block-size", "4")
    grown = convert_to(checkpoint, "grown", "--block-size", "4", "--infill", "tokens")
    again = convert_to(start, "again", "--infill", "tokens")
    (before, _), (model, tokenizer) = load_model(start), load_model(grown)
    old, config = before.config, model.config
    assert tokenizer.infill_ids == tuple(range(259, 262))
    assert config.infill == "none"
    assert tokenizer.sha256 == Tokenizer.from_file(start).with_infill().sha256
    changed = {"vocab_size": config.vocab_size, "tokenizer_sha256": tokenizer.sha256}
    assert config == dataclasses.replace(old, **changed) == read_config(again)
    table, rows = model.embed.weight.detach(), before.embed.weight.detach()
    kept = [i for i in range(len(rows)) if i not in tokenizer.infill_ids]
    assert torch.equal(table[kept], rows[kept])
    typical = rows.norm(dim=1).median()
    for row in tokenizer.infill_ids:
        assert 0.5 < table[row].norm() / typical < 2
    assert convert_to(grown, "same", "--infill", "tokens").exists()
    assert read_config(grown.parent / "same") == config


def test_a_checkpoint_that_was_trained_to_fill_holes_says_so(checkpoint, capsys):
    output = str(checkpoint.parent / "out")
    words = ["--source", str(checkpoint), "--output", output, "--infill", "psm"]
    assert convert.main(words) == 2
    told = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert "has no tokens of prefix, suffix and middle" in told
    tokenizer = Tokenizer.from_file(checkpoint).with_infill()
    tokenizer.save(checkpoint / "tokenizer.json")
    config = read_config(convert_to(checkpoint, "able", "--infill", "psm", "--block-size", "1"))
    assert (config.infill, config.infill_ids) == ("psm", tokenizer.infill_ids)
    model, _ = load_model(checkpoint.parent / "able")
    tokens = rearranged(config, [97, 98], [99])
    blocks = list(sample(model, tokens, SamplingParams(max_tokens=4, stop_at_eos=False)))
    assert len(blocks) == 4


def test_new_rows_have_the_norm_of_ordinary_ones_and_are_never_emitted(checkpoint):
    folder = convert_to(checkpoint, "start", "--block-size", "4")
    model, tokenizer = load_model(folder)
    table = model.embed.weight.detach()
    original = load_file(LLAMA / "model.safetensors")["model.embed_tokens.weight"]
    typical = original.norm(dim=1).median()
    for row in (tokenizer.mask_id, tokenizer.pad_id):
        assert 0.5 < table[row].norm() / typical < 2
    assert not torch.equal(table[tokenizer.mask_id], table[tokenizer.pad_id])
    params = SamplingParams(max_tokens=40, temperature=5.0, stop_at_eos=False)
    tokens = {t for block in sample(model, [1, 2, 3], params) for t in block.tokens}
    assert not tokens & {tokenizer.mask_id, tokenizer.pad_id}


def test_rows_are_added_where_the_vocabulary_is_exactly_sized(checkpoint):
    document = json.loads((checkpoint / "tokenizer.json").read_text())
    rows = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    template = document["added_tokens"][0]
    for number in range(rows - 257):
        token = template | {"id": 257 + number, "content": f"<extra {number}>"}
        document["added_tokens"].append(token)
    (checkpoint / "tokenizer.json").write_text(json.dumps(document))
    config = read_config(convert_to(checkpoint, "start"))
    assert config.vocab_size == rows + 2
    assert {config.mask_id, config.pad_id} == {rows, rows + 1}


def test_a_model_folder_of_ours_can_be_given_another_block_size(checkpoint):
    teacher = convert_to(checkpoint, "teacher", "--block-size", "1")
    student = teacher.with_name("student")
    flags = ["--source", str(teacher), "--output", str(student), "--block-size", "8"]
    assert convert.main(flags) == 0
    first, second = load_model(teacher)[0], load_model(student)[0]
    assert second.config.block_size == 8
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value)


def test_a_checkpoint_without_a_tokenizer_is_refused_and_nothing_is_written(tmp_path, capsys):
    output = tmp_path / "out"
    assert convert.main(["--source", str(LLAMA), "--output", str(output)]) == 3
    assert "has no tokenizer.json" in capsys.readouterr().err
    assert not output.exists()


def test_a_block_size_that_is_no_power_of_two_is_refused(tmp_path, capsys):
    flags = ["--source", str(LLAMA), "--output", str(tmp_path / "out"), "--block-size", "6"]
    assert convert.main(flags) == 2
    assert "block_size=6 must be a power of two" in capsys.readouterr().err


def diffusion_checkpoint(tmp_path, system: str, **changes) -> Path:
    """A recorded diffusion checkpoint with a byte tokenizer."""
    folder = tmp_path / system
    shutil.copytree(DATA / system, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes(byte_tokenizer().to_bytes())
    return folder


@pytest.mark.parametrize(
    "system",
    ["a2d_qwen3", "bd3lm_dit", "dream", "fast_dllm_v2", "llada", "llada2", "llada_moe", "sdar"],
)
def test_a_diffusion_checkpoint_keeps_what_it_records(tmp_path, system):
    source = diffusion_checkpoint(tmp_path, system)
    expected = read_checkpoint(source)
    folder = convert_to(source, "model")
    model, tokenizer = load_model(folder)
    assert tokenizer.sha256 == byte_tokenizer().sha256
    assert model.config == expected.config
    assert read_published(folder).config == expected.published
    state = own_state(model)
    assert all(torch.equal(state[name], value) for name, value in expected.state.items())


def test_what_a_diffusion_checkpoint_records_can_be_overridden(tmp_path):
    source = diffusion_checkpoint(tmp_path, "a2d_llama", novel=0.5)
    flags = ["--block-size", "4", "--attention", "block_causal", "--logits", "shifted"]
    flags += ["--mask-id", "383", "--eos-id", "7", "--ignore-settings", "novel"]
    config = read_config(convert_to(source, "model", *flags))
    assert (config.block_size, config.attention, config.logits) == (4, "block_causal", "shifted")
    assert (config.mask_id, config.eos_id, config.pad_id) == (383, 7, 257)


def test_a_converted_diffusion_model_keeps_its_choices_when_converted_again(tmp_path):
    first = convert_to(diffusion_checkpoint(tmp_path, "sdar"), "first")
    second = convert_to(first, "second", "--block-size", "8")
    before, after = read_config(first), read_config(second)
    assert (after.block_size, after.logits, after.attention) == (8, "aligned", "block_causal")
    assert (after.mask_id, after.family) == (before.mask_id, "sdar")
    assert read_published(second) == read_published(first)


@pytest.mark.parametrize("system", ["sdar", "ar/llama"])
def test_the_chat_template_comes_along_however_often_it_is_converted(tmp_path, system):
    source = diffusion_checkpoint(tmp_path, system)
    source = source.rename(tmp_path / "source")
    assert own_template(convert_to(source, "bare")) is None
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    first = convert_to(source, "first")
    assert own_template(first) == template
    assert own_template(convert_to(first, "second", "--block-size", "8")) == template
    exported = tmp_path / "exported"
    assert export.main(["--model", str(first), "--output", str(exported)]) == 0
    assert (exported / "chat_template.jinja").read_text() == template


def test_an_unknown_setting_is_refused_with_the_flag_that_passes_it(tmp_path, capsys):
    source = diffusion_checkpoint(tmp_path, "sdar", novel=0.5)
    assert convert.main(["--source", str(source), "--output", str(tmp_path / "out")]) == 2
    assert "--ignore-settings novel" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_comes_with_the_model_and_stays_with_it(checkpoint, place):
    assert own_template(str(convert_to(checkpoint, "without"))) is None
    text = "{{ messages[0].content }}?"
    is_file = place.endswith("jinja")
    (checkpoint / place).write_text(text if is_file else json.dumps({"chat_template": text}))
    once = convert_to(checkpoint, "once")
    assert own_template(str(once)) == text
    assert own_template(str(convert_to(once, "twice", "--block-size", "4"))) == text
