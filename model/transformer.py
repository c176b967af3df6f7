"""The transformer: embed -> blocks(attention, MLP) -> norm -> logits.

One class for every family; `ModelConfig` says which parts it has.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from model.attention import SelfAttention
from model.backends.base import AttentionStep
from model.config import ConfigError, ModelConfig
from model.layers import make_mlp, make_norm
from model.linear import Linear
from model.positions import RotaryPositions, rotary_table, sinusoidal_table


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): pre-norm residuals."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = SelfAttention(config, layer)
        self.mlp_norm = make_norm(config)
        self.mlp = make_mlp(config)

    def forward(
        self,
        hidden: Float[Tensor, "num_tokens hidden"],
        rotary: RotaryPositions | None,
        attend: AttentionStep,
    ) -> Float[Tensor, "num_tokens hidden"]:
        hidden = self.attention(self.attention_norm(hidden), hidden, rotary, attend)
        out: Tensor = self.mlp(self.mlp_norm(hidden), hidden)
        return out


class Transformer(nn.Module):
    """A decoder-only transformer.

    `max_positions` bounds the position tables (default: the config's). Raises `ConfigError`
    when learned positions end before it.
    """

    def __init__(self, config: ModelConfig, *, max_positions: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.max_positions = max_positions or config.max_positions
        if config.position == "learned" and self.max_positions > config.max_positions:
            raise ConfigError(
                f"learned positions end at {config.max_positions}; "
                f"max_positions {self.max_positions} was asked for"
            )
        self.embedding = _embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = (
            _embedding(config.max_positions, config.hidden_size)
            if config.position == "learned"
            else None
        )
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_norm = make_norm(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight
        self.position_tables = self._make_position_tables()

    def _make_position_tables(self) -> tuple[Tensor, ...]:
        """Tables computed, not learned: (cos, sin), (sinusoids,) or nothing; always float32
        and made on the CPU, so that building on the meta device leaves them real."""
        with torch.device("cpu"):
            if self.config.position == "rotary":
                return rotary_table(self.config, self.max_positions)
            if self.config.position == "sinusoidal":
                return (sinusoidal_table(self.max_positions, self.config.hidden_size),)
        return ()

    def place_position_tables(self, device: torch.device | str) -> None:
        """Move the computed tables beside the weights (they are no parameters)."""
        self.position_tables = tuple(table.to(device) for table in self.position_tables)

    def embed(
        self, input_ids: Int[Tensor, " num_tokens"], positions: Int[Tensor, " num_tokens"]
    ) -> Float[Tensor, "num_tokens hidden"]:
        """What enters the first block: tokens, and positions unless they are rotary."""
        hidden: Tensor = self.embedding(input_ids)
        if self.position_embedding is not None:
            hidden = hidden + self.position_embedding(positions)
        if self.config.position == "sinusoidal":
            return hidden + self.position_tables[0][positions].to(hidden.dtype)
        return hidden

    def forward(
        self,
        input_ids: Int[Tensor, " num_tokens"],
        positions: Int[Tensor, " num_tokens"],
        attend: AttentionStep,
    ) -> Float[Tensor, "num_tokens hidden"]:
        """Hidden states after the final norm; `attend` says which tokens see which."""
        hidden = self.embed(input_ids, positions)
        rotary = None
        if self.config.position == "rotary":
            cos_table, sin_table = self.position_tables
            rotary = RotaryPositions(cos_table, sin_table, positions)
        for block in self.blocks:
            hidden = block(hidden, rotary, attend)
        normed: Tensor = self.final_norm(hidden)
        return normed

    def logits(self, hidden: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows vocab_size"]:
        """Scores of every next token, float32; float64 where the model is."""
        scores = self.lm_head.product(hidden)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _embedding(rows: int, width: int) -> nn.Embedding:
    """torch's table. Made here, because torch's own draws numbers on the meta device too, and
    imports its compiler for it: a second of every start."""
    weight = torch.empty(rows, width)
    if not weight.is_meta:
        nn.init.normal_(weight)
    table: nn.Embedding = nn.Embedding.from_pretrained(weight, freeze=False)
    return table
