"""What a recording shows: pure functions of it, small enough to send."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from model.config import ModelConfig
from model.explain.record import HEAD_ROWS, logits_of
from model.explain.recording import ExplainError, Recording, check_head
from model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class Candidate:
    """A next token and its log-probability in nats."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenScore:
    """How the model liked a token of the text: its log-probability in nats, and its rank: 1 is
    the likeliest, of equals the lowest id."""

    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class HeadSteps:
    """One head's answer to one query, step by step: q . k, / sqrt(d), softmax, sum.

    Keys, values and scores are of positions 0 .. query; where `visible` is false (outside of
    a sliding window, or an edge that is switched off) the weight is 0.
    """

    layer: int
    head: int
    kv_head: int  # whose keys and values it reads
    query: int
    head_dim: int
    scale: float  # 1 / sqrt(head_dim)
    q: list[float]
    keys: list[list[float]]
    values: list[list[float]]
    scores: list[float]
    scaled: list[float]
    visible: list[bool]
    weights: list[float]
    output: list[float]  # of the equation, before an ablation of the head


@dataclass(frozen=True, slots=True)
class Change:
    """What an ablation did to a token: log-probabilities in nats."""

    token_id: int
    logprob: float
    logprob_ablated: float


@dataclass(frozen=True, slots=True)
class Effect:
    """What an ablation did to the next token: the Kullback-Leibler divergence, in nats, of
    the ablated distribution from the original one, and the tokens that it moved most."""

    kl: float
    changes: list[Change]


def candidates(logits: Float[Tensor, " vocab_size"], num: int) -> list[Candidate]:
    """The likeliest next tokens, best first."""
    top = torch.log_softmax(logits, dim=-1).topk(min(num, int(logits.shape[0])))
    return [
        Candidate(token, logprob)
        for token, logprob in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def token_scores(recording: Recording, tokens: range) -> list[TokenScore]:
    """Of these tokens of the text, those of them that are there; the first, 0, has no score, as
    nothing was expected of it. Raises `ExplainError` when only the last position's logits were
    recorded."""
    num_tokens = recording.num_tokens
    if recording.logits.shape[0] != num_tokens:
        raise ExplainError("the logits of every position are needed; record(every_logit=True)")
    if tokens.start < 1:
        raise ExplainError(f"token {tokens.start} was asked for; the first with a score is 1")
    scores = []
    for place, token in enumerate(recording.ids[tokens.start : tokens.stop].tolist()):
        logits = recording.logits[tokens.start + place - 1]
        logprob = float(logits[token] - torch.logsumexp(logits, dim=-1))
        ahead = int((logits > logits[token]).sum() + (logits[:token] == logits[token]).sum())
        scores.append(TokenScore(logprob, ahead + 1))
    return scores


def top_attention(
    weights: Float[Tensor, "num_heads num_tokens num_tokens"], num: int
) -> tuple[Int[Tensor, "num_heads num_tokens num"], Float[Tensor, "num_heads num_tokens num"]]:
    """The keys that each query of a layer looks at most, and their weights, strongest first.
    A query that sees fewer keys has weights of 0 at the end."""
    top = weights.topk(min(num, int(weights.shape[-1])), dim=-1)
    return top.indices, top.values


def entropy(
    weights: Float[Tensor, "num_heads num_tokens num_tokens"],
) -> Float[Tensor, " num_heads"]:
    """How spread each head's attention is: nats, mean over the queries. 0 is one key alone,
    ln n is n keys alike."""
    mean: Tensor = torch.special.entr(weights).sum(dim=-1).mean(dim=-1)
    return mean


def head_steps(
    config: ModelConfig, recording: Recording, *, layer: int, head: int, query: int
) -> HeadSteps:
    """The equation in numbers, for one head of one layer and one query. Raises `ExplainError`
    for one that is not there."""
    check_head(config, layer, head)
    if not 0 <= query < recording.num_tokens:
        raise ExplainError(f"query {query} was asked for; there are {recording.num_tokens} tokens")
    kv_head = head // (config.num_heads // config.num_kv_heads)
    q = recording.queries[layer, query, head].float()
    keys = recording.keys[layer, : query + 1, kv_head].float()
    values = recording.values[layer, : query + 1, kv_head].float()
    visible = ~recording.ablation.hidden_edges(recording.num_tokens)[query, : query + 1]
    window = config.window(layer)
    if window is not None:
        visible[: max(query + 1 - window, 0)] = False
    scores = keys @ q
    scaled = scores / math.sqrt(config.head_dim)
    weights = torch.softmax(scaled.masked_fill(~visible.to(scaled.device), -math.inf), dim=-1)
    return HeadSteps(
        layer=layer,
        head=head,
        kv_head=kv_head,
        query=query,
        head_dim=config.head_dim,
        scale=1 / math.sqrt(config.head_dim),
        q=q.tolist(),
        keys=keys.tolist(),
        values=values.tolist(),
        scores=scores.tolist(),
        scaled=scaled.tolist(),
        visible=visible.tolist(),
        weights=weights.tolist(),
        output=(weights @ values).tolist(),
    )


def effect(
    logits: Float[Tensor, " vocab_size"], ablated: Float[Tensor, " vocab_size"], num: int
) -> Effect:
    """What an ablation did to the next token. `changes` are, of the `num` likeliest tokens
    before and after, those whose probability changed most."""
    before, after = torch.log_softmax(logits, dim=-1), torch.log_softmax(ablated, dim=-1)
    kl = float((before.exp() * (before - after)).sum())
    num = min(num, int(logits.shape[0]))
    listed = torch.cat((before.topk(num).indices, after.topk(num).indices)).unique()
    moved = (before[listed].exp() - after[listed].exp()).abs()
    order = listed[moved.argsort(descending=True)][:num].tolist()
    # Rounding can leave a sum of nothing but tiny terms a hair below zero.
    changes = [Change(token, float(before[token]), float(after[token])) for token in order]
    return Effect(max(kl, 0.0), changes)


@torch.inference_mode()
def lens(
    model: Transformer, recording: Recording, positions: Sequence[int], num: int
) -> Generator[None, None, list[list[list[Candidate]]]]:
    """The logit lens (nostalgebraist 2020): each layer's residual read as if it were the last
    one's. [layer][i]: the `num` likeliest next tokens at positions[i]; layer 0 is the
    embedding. A piece of work is a few rows through the head."""
    for position in positions:
        if not 0 <= position < recording.num_tokens:
            raise ExplainError(
                f"position {position} was asked for; there are {recording.num_tokens} tokens"
            )
    found: list[list[list[Candidate]]] = []
    for residual in recording.residuals:
        layer: list[list[Candidate]] = []
        for start in range(0, len(positions), HEAD_ROWS):
            rows = residual[list(positions[start : start + HEAD_ROWS])]
            logits = rows.new_empty(rows.shape[0], model.config.vocab_size, dtype=torch.float32)
            yield from logits_of(model, rows, logits)
            layer += [candidates(row, num) for row in logits]
        found.append(layer)
    return found
