"""POST /tokenize and /detokenize: text to ids with offsets, and back."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from model.tokenizer import Tokenizer
from service.api import answers
from service.api.admission import check_token_ids
from service.api.answers import DetokenizeAnswer, TokenizeAnswer, TokenSpan
from service.api.body import read_json
from service.api.context import ApiContext
from service.api.errors import invalid_field
from service.api.openapi import describe
from service.api.schemas import DetokenizeRequest, TokenizeRequest


def routes(context: ApiContext) -> APIRouter:
    """The routes, on these parts."""
    router = APIRouter(tags=["tokenizer"])
    limits = context.limits

    @router.post(
        "/tokenize", summary="Text to token ids", **describe(TokenizeRequest, TokenizeAnswer)
    )
    async def tokenize(request: Request) -> Response:
        body = await read_json(request, TokenizeRequest)
        tokenizer, _ = context.loaded()
        if len(body.text) > limits.max_tokenize_chars:
            raise invalid_field(
                "text",
                f"{len(body.text)} characters are over the limit of {limits.max_tokenize_chars}",
            )
        if len(body.text) <= limits.tokenize_in_thread_chars:
            data = _tokenized(tokenizer, body)
        else:
            data = await asyncio.to_thread(_tokenized, tokenizer, body)
        return Response(data, media_type="application/json")

    @router.post(
        "/detokenize", summary="Token ids to text", **describe(DetokenizeRequest, DetokenizeAnswer)
    )
    async def detokenize(request: Request) -> Response:
        body = await read_json(request, DetokenizeRequest)
        tokenizer, info = context.loaded()
        if len(body.token_ids) > limits.max_detokenize_ids:
            raise invalid_field(
                "token_ids",
                f"{len(body.token_ids)} ids are over the limit of {limits.max_detokenize_ids}",
            )
        check_token_ids("token_ids", body.token_ids, info.vocab_size)
        text = tokenizer.decode(body.token_ids, skip_special_tokens=body.skip_special_tokens)
        return Response(answers.encode(DetokenizeAnswer(text)), media_type="application/json")

    return router


def _tokenized(tokenizer: Tokenizer, body: TokenizeRequest) -> bytes:
    ids, offsets = tokenizer.encode_with_offsets(
        body.text, add_special_tokens=body.add_special_tokens
    )
    tokens = [
        TokenSpan(token_id, tokenizer.token_text(token_id), start, end)
        for token_id, (start, end) in zip(ids, offsets, strict=True)
    ]
    return answers.encode(TokenizeAnswer(ids, tokens, len(ids)))
