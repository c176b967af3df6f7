"""Run one sequence and keep everything: attention, residuals, queries, keys, values, logits.

The arithmetic is that of model/backends/reference.py, on whatever weights the model serves
with. A run is a generator that stops after every small piece of work, so that an engine can
take it a piece at a time between the steps that its streams wait for.
"""

from __future__ import annotations

from collections.abc import Collection, Generator
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from model.attention import SelfAttention, causal_mask, scaled_dot_product
from model.explain.recording import NONE, Ablation, ExplainError, Progress, Recording
from model.positions import RotaryPositions
from model.transformer import Transformer

Result = TypeVar("Result")

ROWS = 32  # tokens that a piece of work takes through one layer
HEAD_ROWS = 8  # tokens whose logits one piece of work computes: a vocabulary is wide


@torch.inference_mode()
def record(
    model: Transformer,
    ids: Int[Tensor, " num_tokens"],
    *,
    ablate: Ablation = NONE,
    attention_layers: Collection[int] | None = None,
    every_logit: bool = True,
) -> Generator[Progress, None, Recording]:
    """Take `ids` through the model at positions 0, 1, ... and return what happened.

    `attention_layers`: whose attention weights are kept; None keeps all of them, which is
    num_layers * num_heads * num_tokens^2 * 4 bytes. `every_logit`: of every position, or of
    the last one only. Raises `ExplainError`, before the first piece of work.
    """
    config, num_tokens = model.config, int(ids.shape[0])
    _check_length(model, num_tokens)
    ablate.check(config, num_tokens)
    kept = tuple(
        sorted(set(range(config.num_layers) if attention_layers is None else attention_layers))
    )
    if kept and not 0 <= kept[0] <= kept[-1] < config.num_layers:
        raise ExplainError(f"layers {list(kept)} were asked for of {config.num_layers}")
    run = _Run(model, num_tokens, ablate, kept)
    num_rows = num_tokens if every_logit else 1
    total = config.num_layers * -(-num_tokens // ROWS) + -(-num_rows // HEAD_ROWS)
    done = 0
    for _ in run.advance(ids):
        done += 1
        yield Progress(done, total)
    last = run.residuals[-1, num_tokens - num_rows :]
    logits = last.new_empty(num_rows, config.vocab_size, dtype=run.precise)
    for _ in logits_of(model, last, logits):
        done += 1
        yield Progress(done, total)
    return Recording(
        ids=ids,
        ablation=ablate,
        attention_layers=kept,
        attention=run.attention,
        residuals=run.residuals,
        queries=run.queries,
        keys=run.keys,
        values=run.values,
        logits=logits,
    )


@torch.inference_mode()
def continue_greedily(
    model: Transformer, recording: Recording, num_tokens: int, *, stop: Collection[int] = ()
) -> Generator[Progress, None, list[int]]:
    """The likeliest next token, again and again, `num_tokens` times or up to one of `stop`,
    which is the last one then. The heads that the recording did without stay off; its edges
    were between its own tokens. Raises `ExplainError` where the positions end."""
    length = recording.num_tokens
    _check_length(model, length + num_tokens)
    heads_off = Ablation(heads=recording.ablation.heads)
    run = _Run(model, length + num_tokens, heads_off, ())
    run.keys[:, :length] = recording.keys
    run.values[:, :length] = recording.values
    run.length = length
    logits, chosen = recording.logits[-1:].clone(), list[int]()
    total = num_tokens * (model.config.num_layers + 1)
    while len(chosen) < num_tokens:
        token = logits[0].argmax()
        chosen.append(int(token))
        if len(chosen) == num_tokens or chosen[-1] in stop:
            break
        done = (len(chosen) - 1) * (model.config.num_layers + 1)
        for _ in run.advance(token[None]):
            done += 1
            yield Progress(done, total)
        newest = run.residuals[-1, run.length - 1 : run.length]
        for _ in logits_of(model, newest, logits):
            yield Progress(done + 1, total)
    return chosen


def complete(pieces: Generator[object, None, Result]) -> Result:
    """All pieces of a run at once, where nobody waits."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            result: Result = end.value
            return result


def logits_of(
    model: Transformer,
    residuals: Float[Tensor, "rows hidden"],
    out: Float[Tensor, "rows vocab_size"],
) -> Generator[None, None, None]:
    """Final norm and head, a few rows a piece, into `out`."""
    for start in range(0, residuals.shape[0], HEAD_ROWS):
        rows = slice(start, start + HEAD_ROWS)
        out[rows] = model.logits(model.final_norm(residuals[rows]))
        yield


def _check_length(model: Transformer, num_tokens: int) -> None:
    if not 0 < num_tokens <= model.max_positions:
        raise ExplainError(
            f"{num_tokens} tokens were given; between 1 and {model.max_positions} can be"
        )


class _Run:
    """Room for a sequence, filled from position 0 on."""

    def __init__(
        self, model: Transformer, room: int, ablation: Ablation, kept: tuple[int, ...]
    ) -> None:
        self.model, self.config = model, model.config
        self.length = 0  # tokens that went through all layers
        self.ablation, self.kept = ablation, kept
        config, like = model.config, model.embedding.weight
        layers, width = config.num_layers, config.head_dim
        self.hidden_edges = ablation.hidden_edges(room) if ablation.edges else None
        self.residuals = like.new_empty(layers + 1, room, config.hidden_size)
        self.queries = like.new_empty(layers, room, config.num_heads, width)
        self.keys = like.new_empty(layers, room, config.num_kv_heads, width)
        self.values = torch.empty_like(self.keys)
        # Filled piece by piece, zeros too: at once, a large one would be a long piece.
        self.precise = torch.promote_types(like.dtype, torch.float32)
        self.attention = like.new_empty(len(kept), config.num_heads, room, room, dtype=self.precise)

    def advance(self, ids: Int[Tensor, " num_tokens"]) -> Generator[None, None, None]:
        """Take the next tokens through all layers; a piece is ROWS of them in one layer."""
        start, end = self.length, self.length + int(ids.shape[0])
        positions = torch.arange(start, end, device=ids.device)
        self.residuals[0, start:end] = self.model.embed(ids, positions)
        for layer, block in enumerate(self.model.blocks):
            for first in range(start, end, ROWS):
                rows = slice(first, min(first + ROWS, end))
                rotary = None
                if self.config.position == "rotary":
                    cos, sin = self.model.position_tables
                    rotary = RotaryPositions(cos, sin, positions[first - start :][:ROWS])
                self.residuals[layer + 1, rows] = block(
                    self.residuals[layer, rows], rotary, _RecordingStep(self, rows)
                )
                yield
        self.length = end


@dataclass(frozen=True, slots=True)
class _RecordingStep:
    """Attention of some rows of a run: what `Block` asks of a backend."""

    run: _Run
    rows: slice

    def __call__(
        self,
        attention: SelfAttention,
        qkv: Float[Tensor, "num_tokens qkv_size"],
        rotary: RotaryPositions | None,
    ) -> Float[Tensor, "num_tokens query_size"]:
        run, rows, layer = self.run, self.rows, attention.layer
        queries, keys, values = attention.heads(qkv, rotary)
        run.queries[layer, rows] = queries
        run.keys[layer, rows] = keys
        run.values[layer, rows] = values
        group, precise = run.config.num_heads // run.config.num_kv_heads, run.precise
        k, v = (
            held[layer, : rows.stop].to(precise).transpose(0, 1).repeat_interleave(group, dim=0)
            for held in (run.keys, run.values)
        )
        mixed, weights = scaled_dot_product(
            queries.to(precise).transpose(0, 1), k, v, self._visible(layer).to(qkv.device)
        )
        if layer in run.kept:
            kept = run.attention[run.kept.index(layer), :, rows]
            kept[:, :, : rows.stop] = weights
            kept[:, :, rows.stop :] = 0
        for at, head in run.ablation.heads:
            if at == layer:
                mixed[head] = 0
        return mixed.transpose(0, 1).to(qkv.dtype).flatten(1)

    def _visible(self, layer: int) -> Bool[Tensor, "queries keys"]:
        rows, run = self.rows, self.run
        visible = causal_mask(rows.stop - rows.start, rows.stop, run.config.window(layer))
        if run.hidden_edges is None:
            return visible
        return visible & ~run.hidden_edges[rows, : rows.stop]
