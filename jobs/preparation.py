"""From a checked body to a job: texts to tokens, the seed drawn, the choices laid out."""

import dataclasses
import secrets
import time
from collections.abc import Mapping, Sequence

from cascade_model.errors import InputError
from jobs.choices import Choice
from jobs.endpoint import Endpoint
from jobs.openai_protocol import ApiError
from jobs.openai_requests import ChatRequest, CompletionRequest
from jobs.replies import Echo, Job


def completion_job(endpoint: Endpoint, body: CompletionRequest) -> Job:
    """A request of `/v1/completions` made ready."""
    decode = endpoint.tokenizer.decode
    prompts = [endpoint.prompt_tokens(each, body.suffix, body.length) for each in body.prompts]
    echoes = None
    if body.echo:
        texts = [each if isinstance(each, str) else decode(each) for each in body.prompts]
        echoes = [Echo(text=t, tokens=own) for t, own in zip(texts, prompts, strict=True)]
    return _job(endpoint, body, prompts, body.length, (), echoes)


def chat_job(endpoint: Endpoint, body: ChatRequest) -> Job:
    """A request of `/v1/chat/completions` made ready: one prompt, in the words of the template.
    The token that ends the template's turns ends the answer too."""
    tokens = chat_tokens(endpoint, [message.plain() for message in body.messages])
    end = endpoint.template.turn_end_id
    return _job(endpoint, body, [tokens], body.length, () if end is None else (end,), None)


def chat_tokens(
    endpoint: Endpoint, messages: Sequence[Mapping[str, str]], *, open_turn: bool = True
) -> list[int]:
    """A conversation as tokens; 400 where the template refuses it."""
    try:
        chats = endpoint.template.encode([messages], endpoint.tokenizer, open_turn=open_turn)
    except InputError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_value") from None
    return chats.encoded.tokens.tolist()


def _job(
    endpoint: Endpoint,
    body: CompletionRequest | ChatRequest,
    prompts: list[list[int]],
    max_tokens: int | None,
    ends: tuple[int, ...],
    echoes: list[Echo] | None,
) -> Job:
    is_chat = isinstance(body, ChatRequest)
    seed = secrets.randbits(63) if body.seed is None else body.seed
    has_holes = not is_chat and bool(body.suffix) and endpoint.config.infill != "psm"
    choices: list[Choice] = []
    longest = endpoint.longest(body.guidance_scale)
    given = [_given(endpoint, tokens) if has_holes else tokens for tokens in prompts]
    for number, tokens in enumerate(prompts):
        endpoint.require_prompt(body, given[number], longest)
        length = longest - len(tokens) if max_tokens is None else max_tokens
        params = endpoint.settings(body, tokens, length, seed, has_holes) if length else None
        if params is not None and ends and params.stop_at_eos:
            params = dataclasses.replace(params, stop_ids=(*params.stop_ids, *ends))
        choices += [
            Choice(
                index=len(choices) + choice,
                prompt=number,
                choice=choice,
                tokens=tokens,
                params=params,
                stop=body.stops,
                watch=bool(body.stream_steps),
            )
            for choice in range(body.choices)
        ]
    kind = "chat.completion" if is_chat else "text_completion"
    head = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
        "object": f"{kind}.chunk" if is_chat and body.stream else kind,
        "created": int(time.time()),
        "model": endpoint.model_name,
        "system_fingerprint": endpoint.fingerprint,
    }
    return Job(
        head=head,
        prompts=given,
        choices=choices,
        is_chat=is_chat,
        wants_usage=body.wants_usage,
        logprobs=body.logprob_count,
        echoes=echoes,
    )


def _given(endpoint: Endpoint, tokens: list[int]) -> list[int]:
    """A text without its hole."""
    return [token for token in tokens if token != endpoint.config.mask_id]
