"""Which requests can be decoded at all: checked before anything is allocated, without torch."""

from collections.abc import Sequence

from cascade_model.config import ModelConfig, check
from cascade_model.sampling import SamplingParams


def check_request(
    config: ModelConfig, prompt_tokens: Sequence[int], params: SamplingParams
) -> None:
    """Refuse (`InputError`) a completion that the model cannot give."""
    check_prompt(config, prompt_tokens, params.max_tokens)
    check_decoding(config, params)


def check_prompt(config: ModelConfig, prompt_tokens: Sequence[int], max_tokens: int) -> None:
    """Refuse (`InputError`) a prompt that is no text, empty where it must not be, or too long."""
    check_tokens(config, prompt_tokens)
    check(
        len(prompt_tokens) > 0,
        f"prompt is empty; give some text, or begin with the end-of-text token {config.eos_id}",
    )
    total, limit = len(prompt_tokens) + max_tokens, config.max_sequence_length
    check(
        total <= limit,
        f"prompt of {len(prompt_tokens)} tokens plus max_tokens={max_tokens} makes {total}, over "
        f"the context of {limit}; shorten the prompt or lower max_tokens",
    )


def check_tokens(config: ModelConfig, tokens: Sequence[int]) -> None:
    """Refuse (`InputError`) ids outside the vocabulary, the mask and the padding token."""
    wrong = next((token for token in tokens if not 0 <= token < config.vocab_size), None)
    check(
        wrong is None,
        f"prompt has the token id {wrong}, outside the vocabulary of {config.vocab_size}; use the "
        "ids of this model's tokenizer",
    )
    special = {config.mask_id, config.pad_id} - set(config.end_ids)
    found = next((token for token in tokens if token in special), None)
    check(
        found is None,
        f"prompt has the mask or padding token {found}; leave it out, it is not text",
    )


def check_infilling(config: ModelConfig, tokens: Sequence[int], params: SamplingParams) -> None:
    """Refuse (`InputError`) a text without holes, or with one that cannot see what follows it.

    A bidirectional model sees all of the text. In a block-causal one a hole sees no later block,
    so what follows must lie within its own.
    """
    mask, size = config.mask_id, config.block_size
    check_tokens(config, [token for token in tokens if token != mask])
    holes = [place for place, token in enumerate(tokens) if token == mask]
    check(bool(holes), f"the text has no mask token {mask}; mark the hole with it")
    check(
        holes[0] > 0 or not config.needs_boundary,
        "the hole is at the beginning, and with shifted logits the first token needs one before "
        f"it; begin with the end-of-text token {config.eos_id}",
    )
    first_end = (holes[0] // size + 1) * size
    check(
        config.attention == "bidirectional" or all(token == mask for token in tokens[first_end:]),
        f"the hole at place {holes[0]} is followed by text beyond its block of block_size={size}, "
        "which a block-causal model cannot see; use a bidirectional model, or hole and suffix "
        "within one block",
    )
    check(
        len(tokens) <= config.max_sequence_length,
        f"the text has {len(tokens)} tokens, over the context of {config.max_sequence_length}; "
        "shorten it",
    )
    check_decoding(config, params)


def check_decoding(config: ModelConfig, params: SamplingParams) -> None:
    """Refuse (`InputError`) settings that contradict the model."""
    check(
        not config.needs_boundary
        or (config.first_place, config.clean_half) != ("noisy", "token_causal"),
        "first_place=noisy with clean_half=token_causal cannot be decoded from committed rows; "
        "train with first_place=clean",
    )
    if config.attention == "bidirectional":
        return
    check(
        params.cache == "exact",
        f"cache={params.cache} is for bidirectional models; leave it out, a block-causal model "
        "has an exact cache",
    )
    check(
        params.block_length in (None, config.block_size),
        f"block_length={params.block_length} is for bidirectional models; leave it out, this "
        f"model has blocks of block_size={config.block_size}",
    )
