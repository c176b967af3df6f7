"""What a recorded run holds, and what can be switched off in one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from model.attention import causal_mask
from model.config import ModelConfig


class ExplainError(ValueError):
    """What was asked for cannot be shown of this model and text; the message has the numbers."""


def check_head(config: ModelConfig, layer: int, head: int) -> None:
    """Raises `ExplainError` for a head that the model does not have."""
    if not (0 <= layer < config.num_layers and 0 <= head < config.num_heads):
        raise ExplainError(
            f"there is no head {head} in layer {layer}: the model has "
            f"{config.num_layers} layers of {config.num_heads} heads"
        )


@dataclass(frozen=True, slots=True)
class Ablation:
    """What a run must do without.

    heads: (layer, head); the head's output is zero before the output projection.
    edges: (query, key) positions; the edge is masked before the softmax in every layer and
    head, so the other keys share its weight.
    """

    heads: frozenset[tuple[int, int]] = field(default_factory=frozenset)
    edges: frozenset[tuple[int, int]] = field(default_factory=frozenset)

    def check(self, config: ModelConfig, num_tokens: int) -> None:
        """Raises `ExplainError` for a head or an edge that is not there, and where a query
        would be left without any key: the softmax of nothing is no distribution."""
        for layer, head in sorted(self.heads):
            check_head(config, layer, head)
        for query, key in sorted(self.edges):
            if not 0 <= key <= query < num_tokens:
                raise ExplainError(
                    f"there is no edge from query {query} to key {key}: a query of these "
                    f"{num_tokens} tokens sees itself and what is before it"
                )
        if not self.edges:
            return
        kept = ~self.hidden_edges(num_tokens)
        for window in {config.window(layer) for layer in range(config.num_layers)}:
            left = (causal_mask(num_tokens, num_tokens, window) & kept).any(dim=1)
            if not bool(left.all()):
                query = int((~left).nonzero()[0])
                raise ExplainError(
                    f"the edges leave query {query} no key that it sees"
                    + ("" if window is None else f" in its window of {window}")
                )

    def hidden_edges(self, num_tokens: int) -> Bool[Tensor, "num_tokens num_tokens"]:
        """[query, key]: whether the edge is switched off."""
        hidden = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
        if self.edges:
            query, key = zip(*self.edges, strict=True)
            hidden[list(query), list(key)] = True
        return hidden


NONE = Ablation()


@dataclass(frozen=True, slots=True)
class Progress:
    """How much of a run is done, in units of about the same time."""

    done: int
    total: int


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """One sequence through the model, with everything that happened on the way.

    Residuals, queries, keys and values have the dtype that the model serves in; queries and
    keys are normed and turned to their positions. Attention and logits are float32, of a float64
    model float64.
    """

    ids: Int[Tensor, " num_tokens"]
    ablation: Ablation
    attention_layers: tuple[int, ...]  # whose weights were kept, ascending
    # Rows sum to 1; 0 where a query does not see a key.
    attention: Float[Tensor, "num_kept_layers num_heads num_tokens num_tokens"]
    # [0] is the embedding, [i + 1] what layer i leaves.
    residuals: Float[Tensor, "num_layers_plus_1 num_tokens hidden"]
    queries: Float[Tensor, "num_layers num_tokens num_heads head_dim"]
    keys: Float[Tensor, "num_layers num_tokens num_kv_heads head_dim"]
    values: Float[Tensor, "num_layers num_tokens num_kv_heads head_dim"]
    # Of every position, or of the last one alone (`record(every_logit=False)`).
    logits: Float[Tensor, "num_logits vocab_size"]

    @property
    def num_tokens(self) -> int:
        return int(self.ids.shape[0])

    def weights(self, layer: int) -> Float[Tensor, "num_heads num_tokens num_tokens"]:
        """A layer's attention. Raises `ExplainError` for a layer that was not kept."""
        if layer not in self.attention_layers:
            raise ExplainError(
                f"the attention of layer {layer} was not kept; of "
                f"{list(self.attention_layers)} it was"
            )
        return self.attention[self.attention_layers.index(layer)]
