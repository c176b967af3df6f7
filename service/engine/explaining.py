"""An explanation from its request to its answer, a small piece of work at a time.

The model's own views (model/explain/) say what there is to see; here it is chosen, rounded and
put into the words of the wire.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

import msgspec
import torch
from torch import Tensor

from model.explain import record, views
from model.explain.recording import NONE, Ablation, ExplainError, Recording
from model.transformer import Transformer
from service.engine.explain_messages import (
    AblatedRun,
    Explain,
    Explained,
    ExplainPart,
    ExplainWish,
    HeadNumbers,
    LensRow,
    Scored,
)
from service.engine.guests import ExplainRefusedError, Work

DECIMALS = 6
ROW_QUERIES = 32  # of one head, put into words in one piece of work
SCORED_TOKENS = 8  # of a wide vocabulary, in one piece of work
LENS_ROWS = 64  # in one message
PART_BYTES = 256 * 1024  # of the attention, in one message

Send = Callable[[ExplainPart], None]


def explain(model: Transformer, eos_token_ids: Sequence[int], request: Explain, send: Send) -> Work:
    """Work that yields after each piece and returns the answer; the attention went through `send`
    by then. Raises `ExplainRefusedError` for what cannot be shown of this text."""
    try:
        return (yield from _explained(model, eos_token_ids, request, send))
    except ExplainError as error:
        raise ExplainRefusedError(str(error)) from error


def _explained(
    model: Transformer, eos_token_ids: Sequence[int], request: Explain, send: Send
) -> Work:
    wish = request.wish
    ids = torch.tensor(request.token_ids, device=model.embedding.weight.device)
    recording = yield from record.record(model, ids, attention_layers=wish.layers)
    writer = PartWriter(request.id, send)
    for piece in attention_json(recording, wish):
        writer.write(piece)
        yield
    writer.flush()
    entropy = []
    for layer in wish.layers:
        yield
        entropy.append(_rounded(views.entropy(recording.weights(layer))[wish.heads].tolist()))
    scores: list[tuple[float, int]] = []
    for start in range(1, recording.num_tokens, SCORED_TOKENS):
        yield
        found = views.token_scores(recording, range(start, start + SCORED_TOKENS))
        scores += [(_round(one.logprob), one.rank) for one in found]
    yield
    yield from _send_lens(model, recording, request, send)
    answer = Explained(
        request.id,
        token_scores=scores,
        entropy=entropy,
        next=_scored(views.candidates(recording.logits[-1], wish.candidates)),
        head=(yield from _head_numbers(model, recording, wish)),
    )
    yield
    if wish.max_tokens:
        continuation = yield from record.continue_greedily(
            model, recording, wish.max_tokens, stop=eos_token_ids
        )
        answer = msgspec.structs.replace(answer, continuation=continuation)
    if wish.ablate is not None:
        ablated = yield from _ablated(model, eos_token_ids, recording, wish)
        answer = msgspec.structs.replace(answer, ablated=ablated)
    return answer


def attention_json(recording: Recording, wish: ExplainWish) -> Iterator[bytes]:
    """The JSON of the attention that was asked for, in pieces of little work:
    full [layer][head][query][key], mean [query][key], top [layer][head][query]."""
    if wish.attention == "mean":
        yield from _list(_mean_rows(recording, wish))
    elif wish.attention in ("full", "top"):
        top_k = wish.top_k if wish.attention == "top" else None
        yield from _list(
            _list(_list(_rows(recording.weights(layer)[head], top_k)) for head in wish.heads)
            for layer in wish.layers
        )


def _rows(weights: Tensor, top_k: int | None) -> Iterator[bytes]:
    """Of one head, (num_tokens, num_tokens): all of its weights, or the largest of each query."""
    return _full_rows(weights) if top_k is None else _top_rows(weights, top_k)


def _full_rows(weights: Tensor) -> Iterator[bytes]:
    for start in range(0, weights.shape[0], ROW_QUERIES):
        yield _ragged(weights[start : start + ROW_QUERIES], start)


def _mean_rows(recording: Recording, wish: ExplainWish) -> Iterator[bytes]:
    for start in range(0, recording.num_tokens, ROW_QUERIES):
        rows = slice(start, start + ROW_QUERIES)
        chosen = [recording.weights(one)[wish.heads, rows].mean(dim=0) for one in wish.layers]
        yield _ragged(torch.stack(chosen).mean(dim=0), start)


def _ragged(rows: Tensor, start: int) -> bytes:
    """Rows of a head's weights, each up to its own query, without the brackets around them."""
    numbers = rows.double().round(decimals=DECIMALS).tolist()
    kept = [row[: start + place + 1] for place, row in enumerate(numbers)]
    return msgspec.json.encode(kept)[1:-1]


def _top_rows(weights: Tensor, top_k: int) -> Iterator[bytes]:
    for start in range(0, weights.shape[0], ROW_QUERIES):
        rows = weights[None, start : start + ROW_QUERIES]
        keys, values = views.top_attention(rows, top_k)
        # A query that sees fewer keys than were asked for has weights of nothing at the end.
        num_seen = (values[0] > 0).sum(dim=-1).tolist()
        rounded = values[0].double().round(decimals=DECIMALS).tolist()
        top = [
            {"keys": seen[:num], "weights": numbers[:num]}
            for num, seen, numbers in zip(num_seen, keys[0].tolist(), rounded, strict=True)
        ]
        yield msgspec.json.encode(top)[1:-1]


def _list(items: Iterable[bytes | Iterable[bytes]]) -> Iterator[bytes]:
    """A JSON list of items that come in pieces themselves."""
    opening = b"["
    for item in items:
        if isinstance(item, bytes):
            yield opening + item
        else:
            yield opening
            yield from item
        opening = b","
    yield b"[]" if opening == b"[" else b"]"


class PartWriter:
    """Gathers pieces into messages of a good size."""

    def __init__(self, explanation_id: int, send: Send) -> None:
        self._id, self._send = explanation_id, send
        self._pieces: list[bytes] = []
        self._num_bytes = 0

    def write(self, piece: bytes) -> None:
        """Send what has gathered when it is enough."""
        self._pieces.append(piece)
        self._num_bytes += len(piece)
        if self._num_bytes >= PART_BYTES:
            self.flush()

    def flush(self) -> None:
        """Send the rest."""
        if self._pieces:
            self._send(ExplainPart(self._id, attention=b"".join(self._pieces)))
            self._pieces, self._num_bytes = [], 0


def _send_lens(
    model: Transformer, recording: Recording, request: Explain, send: Send
) -> Generator[None, None, None]:
    wish = request.wish
    if not wish.lens:
        return
    found = yield from views.lens(model, recording, wish.lens_positions, wish.lens)
    for layer, row in enumerate(found):
        rows = [
            LensRow(layer, position, _scored(candidates))
            for position, candidates in zip(wish.lens_positions, row, strict=True)
        ]
        for start in range(0, len(rows), LENS_ROWS):
            send(ExplainPart(request.id, lens=rows[start : start + LENS_ROWS]))
            yield


def _head_numbers(
    model: Transformer, recording: Recording, wish: ExplainWish
) -> Generator[None, None, HeadNumbers | None]:
    if wish.head is None:
        return None
    layer, head, query = wish.head
    steps = views.head_steps(model.config, recording, layer=layer, head=head, query=query)
    yield
    keys = yield from _rounded_rows(steps.keys)
    values = yield from _rounded_rows(steps.values)
    return HeadNumbers(
        layer=layer,
        head=head,
        kv_head=steps.kv_head,
        query=query,
        head_dim=steps.head_dim,
        scale=steps.scale,
        q=_rounded(steps.q),
        keys=keys,
        values=values,
        scores=_rounded(steps.scores),
        scaled=_rounded(steps.scaled),
        visible=steps.visible,
        weights=_rounded(steps.weights),
        output=_rounded(steps.output),
    )


def _rounded_rows(rows: list[list[float]]) -> Generator[None, None, list[list[float]]]:
    rounded = []
    for row in rows:
        rounded.append(_rounded(row))
        if len(rounded) % ROW_QUERIES == 0:
            yield
    return rounded


def _ablated(
    model: Transformer, eos_token_ids: Sequence[int], recording: Recording, wish: ExplainWish
) -> Generator[object, None, AblatedRun]:
    ablation = NONE
    if wish.ablate is not None:
        ablation = Ablation(frozenset(wish.ablate.heads), frozenset(wish.ablate.edges))
    without = yield from record.record(
        model, recording.ids, ablate=ablation, attention_layers=(), every_logit=False
    )
    effect = views.effect(recording.logits[-1], without.logits[-1], wish.candidates)
    continuation: list[int] = []
    if wish.max_tokens:
        continuation = yield from record.continue_greedily(
            model, without, wish.max_tokens, stop=eos_token_ids
        )
    return AblatedRun(
        next=_scored(views.candidates(without.logits[-1], wish.candidates)),
        kl=_round(effect.kl),
        changes=[
            (one.token_id, _round(one.logprob), _round(one.logprob_ablated))
            for one in effect.changes
        ],
        continuation=continuation,
    )


def _scored(candidates: Iterable[views.Candidate]) -> list[Scored]:
    return [(one.token_id, _round(one.logprob)) for one in candidates]


def _rounded(numbers: Iterable[float]) -> list[float]:
    return [_round(number) for number in numbers]


def _round(number: float) -> float:
    return round(number, DECIMALS)
