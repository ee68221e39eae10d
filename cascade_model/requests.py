"""Which requests can be decoded at all: checked before anything is allocated, without torch."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cascade_model.config import ModelConfig
from cascade_model.sampling import SamplingParams
from cascade_model.settings import check


@dataclass(frozen=True, kw_only=True, slots=True)
class Infilling:
    """A text with a hole in it."""

    prefix: str
    """What stands before the hole."""
    length: int
    """Tokens of the hole; every one is filled."""
    suffix: str
    """What follows the hole."""

    def __post_init__(self) -> None:
        check(self.length >= 1, f"length={self.length} of the hole must be at least 1")


def block_edges(config: ModelConfig, prompt_length: int, params: SamplingParams) -> list[int]:
    """Where the blocks of a completion begin, rising, and where the last one ends.

    In a block-causal model the grid starts at the prompt's first token: the prompt's tail opens the
    first block, and the last block is filled whole. Else it starts behind the prompt.
    """
    end, size = prompt_length + params.max_tokens, config.block_size
    if config.attention == "block_causal":
        return list(range(prompt_length // size * size, -(-end // size) * size + 1, size))
    return [*range(prompt_length, end, params.block_length or size), end]


def masks_behind(edges: Sequence[int], known: int) -> list[int]:
    """Masks of every block that goes beyond the first `known` tokens."""
    return [end - max(start, known) for start, end in itertools.pairwise(edges) if end > known]


def masks_left(
    config: ModelConfig,
    tokens: Sequence[int],
    params: SamplingParams,
    committed: Sequence[int] = (),
) -> list[int]:
    """Masks of every block that is still to be decoded, of a prompt or of a text with holes."""
    if config.mask_id in tokens:
        filled = with_committed(config, tokens, committed)
        return list(masks_per_block(config, filled, params).values())
    edges = block_edges(config, len(tokens), params)
    return masks_behind(edges, len(tokens) + len(committed))


def check_request(
    config: ModelConfig,
    prompt_tokens: Sequence[int],
    params: SamplingParams,
    committed: Sequence[int] = (),
    steps_made: int = 0,
) -> None:
    """Refuse (`InputError`) a completion that the model cannot give, or cannot go on with.

    `committed` and `steps_made` as in `sampler.plan_completion`.
    """
    check_prompt(config, prompt_tokens, params.max_tokens)
    check_decoding(config, params)
    edges = block_edges(config, len(prompt_tokens), params)
    check_positions(config, edges[-1])
    known = len(prompt_tokens) + len(committed)
    done = [edge - len(prompt_tokens) for edge in edges if len(prompt_tokens) < edge <= known]
    check_committed(config, params, committed, done)
    check_steps_made(params, len(done), steps_made)
    check_budget(params, masks_behind(edges, known), steps_made)


def check_committed(
    config: ModelConfig, params: SamplingParams, committed: Sequence[int], done: Sequence[int]
) -> None:
    """Refuse (`InputError`) what cannot be the beginning of a completion that is to go on.

    `done`: lengths of the beginnings of `committed` that are whole blocks, rising.
    """
    check_tokens(config, committed, "committed")
    count, whole = len(committed), max(done, default=0)
    check(
        count < params.max_tokens,
        f"committed has {count} tokens and max_tokens={params.max_tokens}; nothing is left to "
        "decode, so leave the request out or raise max_tokens",
    )
    check(
        count == whole,
        f"committed has {count} tokens and ends within a block; give whole blocks only, which are "
        f"the first {whole}",
    )
    ends = params.end_ids(config)
    end = next((token for token in committed if token in ends), None)
    check(
        end is None,
        f"committed has the token id {end}, which ends the completion; nothing is left to decode",
    )


def check_steps_made(params: SamplingParams, blocks: int, steps_made: int) -> None:
    """Refuse (`InputError`) a sum of steps that so many committed blocks cannot have taken."""
    least = blocks if params.max_steps is not None else 0
    check(
        steps_made >= least and (blocks > 0 or steps_made == 0),
        f"steps_made={steps_made} does not fit the {blocks} blocks of committed, each of which "
        "took a step at least; give the sum of their steps",
    )


def check_budget(params: SamplingParams, masks: Sequence[int], steps_made: int = 0) -> None:
    """Refuse (`InputError`) a `max_steps` that the blocks, which have these masks, must exceed."""
    if params.max_steps is None:
        return
    least = sum(params.least_steps(count) for count in masks)
    if params.rule == "first_hitting":
        need = f"{least} masks, which rule=first_hitting fills one a step"
        cure = "or use rule=random"
    elif params.min_steps_per_block > 1:
        need = f"{least} steps of {len(masks)} blocks with min_steps_per_block="
        need, cure = f"{need}{params.min_steps_per_block}", "or lower min_steps_per_block"
    else:
        need, cure = f"{len(masks)} blocks, each of which takes a step", "or ask for fewer tokens"
    spent = f" less steps_made={steps_made}" if steps_made else ""
    check(
        params.max_steps - steps_made >= least,
        f"max_steps={params.max_steps}{spent} is below the {need}; raise max_steps to "
        f"{steps_made + least} {cure}",
    )


def check_prompt(config: ModelConfig, prompt_tokens: Sequence[int], max_tokens: int) -> None:
    """Refuse (`InputError`) a prompt that is no text, empty where it must not be, or too long."""
    check_tokens(config, prompt_tokens)
    check(
        len(prompt_tokens) > 0,
        f"prompt is empty; give some text, or begin with the end-of-text token {config.eos_id}",
    )
    limit = config.max_sequence_length
    check_room(len(prompt_tokens), max_tokens, limit, f"the context of {limit}")


def check_room(
    size: int,
    max_tokens: int,
    limit: int,
    room: str,
    *,
    prompt: str = "prompt",
    length: str = "max_tokens",
    is_default: bool = False,
) -> None:
    """Refuse (`InputError`) a prompt of `size` tokens that leaves fewer than `max_tokens` of
    `limit`, in words `room`; it tells to lower the length where that would do, or where
    `is_default`, as nobody gave one, to give it. `prompt` and `length`: what the two are called."""
    least = min(max_tokens, 1)
    check(
        size + least <= limit,
        f"{prompt} of {size} tokens{' plus an answer' if least else ''} is over {room}; shorten "
        f"the {prompt} by {size + least - limit} tokens",
    )
    over = size + max_tokens - limit
    cure = f"lower {length} to {limit - size} or shorten the {prompt}"
    if is_default:
        cure = f"shorten the {prompt} by {over} tokens or give a {length} of at most {limit - size}"
    check(
        over <= 0,
        f"{prompt} of {size} tokens plus {'the default ' if is_default else ''}{length}="
        f"{max_tokens} makes {size + max_tokens}, over {room}; {cure}",
    )


def longest_text(config: ModelConfig) -> int:
    """Tokens of prompt and completion together, at most: the context, or the whole blocks of it
    where the last block is filled whole and positions are learned (`check_positions`)."""
    limit = config.max_sequence_length
    if config.network == "gpt2" and config.attention == "block_causal":
        return limit // config.block_size * config.block_size
    return limit


def check_positions(config: ModelConfig, length: int) -> None:
    """Refuse (`InputError`) a last block that goes beyond learned positions: it is filled whole."""
    limit = config.max_sequence_length
    check(
        config.network != "gpt2" or length <= limit,
        f"the last block ends at {length} and the model has {limit} learned positions; shorten the "
        "prompt or lower max_tokens",
    )


def check_tokens(config: ModelConfig, tokens: Sequence[int], name: str = "prompt") -> None:
    """Refuse (`InputError`) ids outside the vocabulary, the mask and the padding token."""
    wrong = next((token for token in tokens if not 0 <= token < config.vocab_size), None)
    check(
        wrong is None,
        f"{name} has the token id {wrong}, outside the vocabulary of {config.vocab_size}; use the "
        "ids of this model's tokenizer",
    )
    special = {config.mask_id, config.pad_id} - set(config.end_ids)
    found = next((token for token in tokens if token in special), None)
    check(
        found is None,
        f"{name} has the mask or padding token {found}; leave it out, it is not text",
    )


def between(
    config: ModelConfig, prefix: Sequence[int], suffix: Sequence[int], length: int
) -> list[int]:
    """The tokens that ask for what stands between two texts.

    A model with infill=psm gets both `rearranged`, and ends the middle itself. Any other gets
    `length` mask tokens between them, a hole that is filled whole (`check_infilling`). Raises
    `InputError` where the hole would not see the suffix.
    """
    if config.infill == "psm":
        return rearranged(config, prefix, suffix)
    check_tokens(config, prefix)
    check_tokens(config, suffix, "suffix")
    total, size = len(prefix) % config.block_size + length + len(suffix), config.block_size
    check(
        config.attention == "bidirectional" or total <= size,
        f"suffix of {len(suffix)} tokens behind a hole of max_tokens={length} ends beyond the "
        f"hole's block of block_size={size}, and a block-causal model sees no later block; make "
        f"the two together shorter by {total - size} tokens, or use a bidirectional model or one "
        f"that has infill=psm (this one has infill={config.infill})",
    )
    return [*prefix, *[config.mask_id] * length, *suffix]


def with_committed(
    config: ModelConfig, tokens: Sequence[int], committed: Sequence[int]
) -> list[int]:
    """A text whose first holes are filled."""
    left = iter(committed)
    return [next(left, token) if token == config.mask_id else token for token in tokens]


def rearranged(config: ModelConfig, prefix: Sequence[int], suffix: Sequence[int]) -> list[int]:
    """The prompt that asks for what stands between two texts: as documents were rearranged in the
    model's training, up to the token after which the middle comes; its end is the end of a text.

    Raises `InputError` where the model was not trained so, and for a text that holds such tokens.
    """
    check(
        config.infill == "psm",
        f"suffix is for models with infill=psm and this one has infill={config.infill}; leave it "
        "out, or train on a corpus that was prepared with an infill_rate",
    )
    for name, tokens in (("prompt", prefix), ("suffix", suffix)):
        found = next((token for token in tokens if token in config.infill_ids), None)
        check(
            found is None,
            f"{name} has the token {found}, which only stands before prefix, suffix or middle; "
            "give the prompt and the suffix without it",
        )
    before_prefix, before_suffix, before_middle = config.infill_ids
    return [before_prefix, *prefix, before_suffix, *suffix, before_middle]


def check_infilling(
    config: ModelConfig,
    tokens: Sequence[int],
    params: SamplingParams,
    committed: Sequence[int] = (),
    steps_made: int = 0,
) -> None:
    """Refuse (`InputError`) a text without holes, or with one that cannot see what follows it.

    A bidirectional model sees all of the text. In a block-causal one a hole sees no later block,
    so what follows must lie within its own (or the text is `rearranged`). All holes together have
    at most `max_tokens`. `committed` and `steps_made` as in `sampler.plan_infilling`.
    """
    mask, size = config.mask_id, config.block_size
    check_tokens(config, [token for token in tokens if token != mask], "the text")
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
        "which a block-causal model cannot see; use hole and suffix within one block, a "
        "bidirectional model, or a prompt with a suffix and a model that has infill=psm",
    )
    check(
        len(tokens) <= config.max_sequence_length,
        f"the text has {len(tokens)} tokens, over the context of {config.max_sequence_length}; "
        "shorten it",
    )
    is_causal = config.attention == "block_causal"
    check_positions(config, -(-len(tokens) // size) * size if is_causal else len(tokens))
    check(
        len(holes) <= params.max_tokens,
        f"the hole has {len(holes)} tokens, over max_tokens={params.max_tokens}; shorten it or "
        f"raise max_tokens to {len(holes)}",
    )
    check_decoding(config, params)
    ends = list(itertools.accumulate(masks_per_block(config, tokens, params).values()))
    done = [end for end in ends[:-1] if end <= len(committed)]
    check_committed(config, params.without_end(), committed, done)
    check_steps_made(params, len(done), steps_made)
    check_budget(params, masks_left(config, tokens, params, committed), steps_made)


def masks_per_block(
    config: ModelConfig, tokens: Sequence[int], params: SamplingParams
) -> dict[int, int]:
    """Masks of each block of a text with holes, by its number; blocks without are left out.

    The grid starts at the first token; a block-causal model fills its last block whole.
    """
    is_causal, mask = config.attention == "block_causal", config.mask_id
    size = config.block_size if is_causal else params.block_length or config.block_size
    padded = [*tokens, *[mask] * (-len(tokens) % size if is_causal else 0)]
    counts = Counter(place // size for place, token in enumerate(padded) if token == mask)
    return dict(sorted(counts.items()))


def check_decoding(config: ModelConfig, params: SamplingParams) -> None:
    """Refuse (`InputError`) settings that contradict the model."""
    wrong = next((token for token in params.stop_ids if not 0 <= token < config.vocab_size), None)
    check(
        wrong is None,
        f"stop_ids={params.stop_ids} has {wrong}, outside the vocabulary of {config.vocab_size}; "
        "use the ids of this model's tokenizer",
    )
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
