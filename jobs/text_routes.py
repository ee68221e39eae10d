"""Text to tokens and back over HTTP, for clients that count or cut by tokens (lm-eval does)."""

import asyncio
from typing import Annotated, Self

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from pydantic import Field, model_validator

from cascade_model.tokenizer import Tokenizer
from jobs.endpoint import Endpoint
from jobs.openai_answers import (
    READS,
    WRITES,
    Detokenized,
    Tokenized,
    TokenizerInfo,
    answers,
)
from jobs.openai_protocol import MAX_PROMPT_CHARACTERS, ApiError, FieldError, StrictBody
from jobs.openai_requests import INT31, Messages, Text
from jobs.preparation import chat_tokens
from jobs.strict_json import StrictRoute


class TokenizeRequest(StrictBody):
    """Body of `POST /tokenize`: a text or a chat."""

    model: str | None = Field(None, description="The served model's name, if given.")
    prompt: Text | None = Field(
        None,
        description="A text; the names of special tokens in it are ordinary text. The name of the "
        "token that begins or ends texts, alone, is that token, which is how clients ask its id.",
    )
    messages: Messages | None = Field(None, description="A chat, in the words of the template.")
    add_generation_prompt: bool = Field(
        True, description="Of a chat: with the opening of the assistant's turn."
    )
    add_special_tokens: bool | None = Field(
        None, description="Nothing is ever added to a text; true is refused."
    )
    return_token_strs: bool | None = Field(False, description="Tell each token's text too.")

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise FieldError("Give one of `prompt` and `messages`.", "prompt")
        if self.prompt is not None and self.add_special_tokens:
            raise FieldError(
                "`add_special_tokens`: nothing is added to a text by this server; leave it out.",
                "add_special_tokens",
                "unsupported_parameter",
            )
        return self


class DetokenizeRequest(StrictBody):
    """Body of `POST /detokenize`."""

    model: str | None = Field(None, description="The served model's name, if given.")
    tokens: Annotated[
        list[Annotated[int, Field(ge=0, lt=INT31)]], Field(max_length=MAX_PROMPT_CHARACTERS)
    ] = Field(description="Token ids; special ones become their names.")


def text_routes(endpoint: Endpoint) -> APIRouter:
    """The three routes."""
    routes = APIRouter(route_class=StrictRoute)

    @routes.post("/tokenize", responses=answers(Tokenized, *WRITES))
    async def tokenize(body: TokenizeRequest) -> Response:
        endpoint.require_model(body.model)
        tokens = await asyncio.to_thread(_tokens, endpoint, body)
        strings = None
        if body.return_token_strs:
            strings = [endpoint.spelling.text_of(token) for token in tokens]
        told = {"count": len(tokens), "max_model_len": endpoint.longest()}
        return JSONResponse({**told, "tokens": tokens, "token_strs": strings})

    @routes.post("/detokenize", responses=answers(Detokenized, *WRITES))
    async def detokenize(body: DetokenizeRequest) -> Response:
        endpoint.require_model(body.model)
        size = endpoint.config.vocab_size
        wrong = next((token for token in body.tokens if token >= size), None)
        if wrong is not None:
            message = f"`tokens` has {wrong}, outside the vocabulary of {size}."
            raise ApiError(400, message, param="tokens", code="invalid_value")
        text = await asyncio.to_thread(endpoint.tokenizer.decode, body.tokens, False)
        return JSONResponse({"prompt": text})

    @routes.get("/tokenizer_info", responses=answers(TokenizerInfo, *READS))
    async def tokenizer_info() -> Response:
        tokenizer = endpoint.tokenizer
        told = {
            "tokenizer_class": "tokenizers",
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": endpoint.longest(),
            "bos_token": endpoint.template.bos,
            "eos_token": tokenizer.name_of("eos"),
            "pad_token": tokenizer.name_of("pad"),
            "mask_token": tokenizer.name_of("mask"),
            "special_tokens": tokenizer.special_tokens,
            "chat_template": endpoint.template.text,
        }
        return JSONResponse(told)

    return routes


def _tokens(endpoint: Endpoint, body: TokenizeRequest) -> list[int]:
    if body.messages is not None:
        messages = [message.plain() for message in body.messages]
        return chat_tokens(endpoint, messages, open_turn=body.add_generation_prompt)
    text, tokenizer = body.prompt or "", endpoint.tokenizer
    if text and text in _edges(endpoint, tokenizer):
        return [tokenizer.special_tokens[text]]
    return tokenizer.encode(text)


def _edges(endpoint: Endpoint, tokenizer: Tokenizer) -> set[str]:
    """Names of the tokens that begin and end texts."""
    names = {endpoint.template.bos, tokenizer.name_of("eos")}
    return {name for name in names if name in tokenizer.special_tokens}
