"""Kinds that compare generated tokens: one function a system."""

import dataclasses
from collections.abc import Callable
from typing import Any

import tokenizers
import torch

from cascade_model.model import Transformer
from cascade_model.presets.a2d import BD3LMSettings, MDLMSettings, a2d_bd3lm, a2d_infill, a2d_mdlm
from cascade_model.presets.dream import DreamSettings, dream
from cascade_model.presets.fast_dllm import FastDLLMSettings, fast_dllm
from cascade_model.presets.fast_dllm_dream import FastDLLMDreamSettings, fast_dllm_dream
from cascade_model.presets.fast_dllm_v2 import FastDLLMV2Settings, fast_dllm_v2
from cascade_model.presets.llada import LLaDASettings, llada
from cascade_model.presets.llada2 import LLaDA2Settings, llada2
from cascade_model.presets.llada21 import LLaDA21Settings, llada21
from cascade_model.presets.sdar import SDARSettings, sdar
from cascade_model.sampler import sample as sample_blocks
from cascade_model.sampling import SamplingParams
from tests.conformance.cases import Case, CaseError, Record
from tests.conformance.checkpoints import Checkpoints
from tests.conformance.forward import run
from tests.conformance.verdicts import Verdict, compare_logits, compare_tokens

Rows = list[list[int]]
_COSTS = ("model_calls", "nfe", "transfer_counts", "min_margin")


def sample(case: Case, checkpoints: Checkpoints) -> Verdict:
    """A system's sampler, its complete return value."""
    if case.system not in _SAMPLERS:
        raise CaseError(f"kind={case.kind} is not known for the system {case.system}")
    case.expected.inform(*_COSTS)
    rows = _SAMPLERS[case.system](case, checkpoints)
    return compare_tokens(rows, case.expected["output_ids"])


def infill(case: Case, checkpoints: Checkpoints) -> Verdict:
    """Masks within the rows, filled in place."""
    case.expected.inform(*_COSTS)
    settings = _settings(MDLMSettings, case.settings)
    filled = a2d_infill(_transformer(case, checkpoints), case.inputs["input_ids"], settings)
    return compare_tokens(filled, case.expected["output_ids"])


def greedy(case: Case, checkpoints: Checkpoints) -> Verdict:
    """The answer to a user's message, and the texts on both sides of the tokens."""
    case.expected.inform(*_COSTS)
    rows = _autoregressive(case, checkpoints)
    checkpoint, prompt = checkpoints.autoregressive(case)[0], case.inputs["input_ids"][0]
    assert checkpoint.tokenizer is not None
    rendered = case.inputs["rendered_prompt"]
    engine = tokenizers.Tokenizer.from_str(checkpoint.tokenizer.to_bytes().decode())
    if case.inputs["user_message"] not in rendered:
        raise CaseError("rendered_prompt does not hold user_message")
    if engine.encode(rendered, add_special_tokens=False).ids != prompt:
        return Verdict("rendered_prompt has other tokens")
    text = checkpoint.tokenizer.decode(rows[0][len(prompt) :], skip_special=False)
    if text != case.expected["output_text"]:
        return Verdict(f"the answer is {text!r}")
    return compare_tokens(rows, case.expected["output_ids"])


def top_logits(case: Case, checkpoints: Checkpoints) -> Verdict:
    """The largest logits at every place of a text, and whose they are."""
    checkpoint, network = checkpoints.autoregressive(case)
    tokens = case.inputs.tensor("input_ids")
    assert checkpoint.tokenizer is not None
    if checkpoint.tokenizer.encode(case.inputs["text"]) != tokens[0].tolist():
        return Verdict("text has other tokens")
    length = tokens.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    found = run(network, tokens, torch.arange(length)[None], mask)[..., : checkpoint.rows]
    values = case.expected.tensor("top_values", torch.float32).view(1, length, -1)
    ids = case.expected.tensor("top_ids").view(1, length, -1)
    of_theirs = compare_logits(found.gather(-1, ids), values, tolerance=1e-2)
    largest = compare_logits(found.topk(ids.shape[-1]).values, values, tolerance=1e-2)
    return largest if largest.problem else of_theirs


def _transformer(case: Case, checkpoints: Checkpoints) -> Transformer:
    network = checkpoints.network(case)
    if not isinstance(network, Transformer):
        raise CaseError(f"weights={case.weights} are no transformer")
    return network


def _settings(kind: Callable[..., Any], record: Record, *zeros: str) -> Any:
    """The settings of a preset; those named in `zeros` it does not have must be 0."""
    for name in zeros:
        record.only(name, 0)
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: record[name] for name in names if name in record})


def _prompts(case: Case) -> list[tuple[list[int], list[int]]]:
    """Left padding and prompt of each row."""
    rows = case.inputs["input_ids"]
    masks = case.inputs.get("attention_mask") or [[1] * len(row) for row in rows]
    if any(mask != sorted(mask) for mask in masks):
        raise CaseError("attention_mask has padding that is not on the left")
    starts = [len(mask) - sum(mask) for mask in masks]
    return [(row[:start], row[start:]) for row, start in zip(rows, starts, strict=True)]


def _each(case: Case, decode: Callable[[list[int]], list[int]]) -> Rows:
    """Decode row by row without padding, and put that back."""
    return [padding + decode(prompt) for padding, prompt in _prompts(case)]


def _llada(case: Case, checkpoints: Checkpoints) -> Rows:
    case.settings.only("remasking", "low_confidence")
    network = _transformer(case, checkpoints)
    settings = _settings(LLaDASettings, case.settings, "temperature")
    return _each(case, lambda prompt: llada(network, prompt, settings))


def _dream(case: Case, checkpoints: Checkpoints) -> Rows:
    case.settings.inform("pad_token_id")
    network = _transformer(case, checkpoints)
    settings = _settings(DreamSettings, case.settings, "temperature", "alg_temp")
    return _each(case, lambda prompt: dream(network, prompt, settings))


def _fast_dllm(case: Case, checkpoints: Checkpoints) -> Rows:
    network = _transformer(case, checkpoints)
    settings = _settings(FastDLLMSettings, case.settings, "temperature")
    prompts = case.inputs["input_ids"]
    widest = max(map(len, prompts))
    return [fast_dllm(network, p, settings, padding=widest - len(p)) for p in prompts]


def _fast_dllm_dream(case: Case, checkpoints: Checkpoints) -> Rows:
    network = _transformer(case, checkpoints)
    settings = _settings(FastDLLMDreamSettings, case.settings, "temperature", "alg_temp")
    return _each(case, lambda prompt: fast_dllm_dream(network, prompt, settings))


def _fast_dllm_v2(case: Case, checkpoints: Checkpoints) -> Rows:
    network, settings = (
        _transformer(case, checkpoints),
        _settings(FastDLLMV2Settings, case.settings),
    )
    return _each(case, lambda prompt: fast_dllm_v2(network, prompt, settings))


def _sdar(case: Case, checkpoints: Checkpoints) -> Rows:
    network, settings = _transformer(case, checkpoints), _settings(SDARSettings, case.settings)
    return _each(case, lambda prompt: sdar(network, prompt, settings))


def _llada2(case: Case, checkpoints: Checkpoints) -> Rows:
    network, settings = _transformer(case, checkpoints), _settings(LLaDA2Settings, case.settings)
    return _each(case, lambda prompt: llada2(network, prompt, settings))


def _llada21(case: Case, checkpoints: Checkpoints) -> Rows:
    network, settings = _transformer(case, checkpoints), _settings(LLaDA21Settings, case.settings)
    return _each(case, lambda prompt: llada21(network, prompt, settings))


def _a2d(case: Case, checkpoints: Checkpoints) -> Rows:
    case.settings.only("sampler", "bd3lm", "mdlm")
    network, prompts = _transformer(case, checkpoints), case.inputs["input_ids"]
    if case.settings["sampler"] == "bd3lm":
        return a2d_bd3lm(network, prompts, _settings(BD3LMSettings, case.settings))
    return a2d_mdlm(network, prompts, _settings(MDLMSettings, case.settings))


def _autoregressive(case: Case, checkpoints: Checkpoints) -> Rows:
    """The engine's own sampler: blocks of one token, the most probable one."""
    network = checkpoints.autoregressive(case)[1]
    params = SamplingParams(max_tokens=case.settings["max_new_tokens"], temperature=0.0)

    def decode(prompt: list[int]) -> list[int]:
        blocks = sample_blocks(network, prompt, params)  # type: ignore[arg-type]
        return prompt + [token for block in blocks for token in block.tokens]

    return _each(case, decode)


_SAMPLERS: dict[str, Callable[[Case, Checkpoints], Rows]] = {
    "llada": _llada,
    "llada_moe": _llada,
    "dream": _dream,
    "fast_dllm": _fast_dllm,
    "fast_dllm_dream": _fast_dllm_dream,
    "fast_dllm_v2": _fast_dllm_v2,
    "sdar": _sdar,
    "llada2": _llada2,
    "llada21": _llada21,
    "a2d_llama": _a2d,
    "a2d_qwen2": _a2d,
    "a2d_qwen3": _a2d,
    "ar": _autoregressive,
}
