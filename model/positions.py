"""Where a token stands: sinusoidal, learned and rotary positions.

Attention by itself does not see order: permute the tokens and its output is permuted the
same way (tests/model/test_attention_by_hand.py). Positions break that symmetry, either added to the
embedding (sinusoidal, learned) or turned into the queries and keys (rotary).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from model.config import ModelConfig, RopeScaling


def sinusoidal_table(max_positions: int, hidden_size: int) -> Float[Tensor, "positions hidden"]:
    """sin and cos of position / 10000^(2i/d), interleaved (Vaswani et al. 2017, section 3.5)."""
    position = torch.arange(max_positions, dtype=torch.float32)[:, None]
    frequency = torch.exp(
        torch.arange(0, hidden_size, 2, dtype=torch.float32) * (-math.log(10_000.0) / hidden_size)
    )
    table = torch.empty(max_positions, hidden_size)
    table[:, 0::2] = torch.sin(position * frequency)
    table[:, 1::2] = torch.cos(position * frequency)
    return table


def rotary_table(
    config: ModelConfig, max_positions: int
) -> tuple[Float[Tensor, "positions head_dim"], Float[Tensor, "positions head_dim"]]:
    """cos and sin of every position's rotation angles, float32, each repeated for both
    halves of a head (the layout of `apply_rotary`)."""
    frequencies, attention_scale = rotary_frequencies(config)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return torch.cos(angles) * attention_scale, torch.sin(angles) * attention_scale


def rotary_frequencies(config: ModelConfig) -> tuple[Float[Tensor, " half_head_dim"], float]:
    """Rotation per position of each pair of dimensions, theta^(-2i/d) (Su et al. 2021,
    arXiv:2104.09864), scaled as the config says, and the factor on cos and sin."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponent)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    return _yarn(frequencies, scaling, config), _yarn_attention_scale(scaling)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Wavelengths beyond original/low_freq_factor are divided by the factor, those under
    original/high_freq_factor kept, and between them the two are blended."""
    wavelength = 2 * math.pi / frequencies
    divided = frequencies / scaling.factor
    blend = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - blend) * divided + blend * frequencies
    is_long = wavelength > scaling.original_max_positions / scaling.low_freq_factor
    is_short = wavelength < scaling.original_max_positions / scaling.high_freq_factor
    return torch.where(is_long, divided, torch.where(is_short, frequencies, blended))


def _yarn(frequencies: Tensor, scaling: RopeScaling, config: ModelConfig) -> Tensor:
    """Dimensions that turn more than beta_fast times in the trained context are kept, those
    that turn less than beta_slow times divided, with a linear ramp over the dimensions
    between (arXiv:2309.00071, section 3.2)."""

    def dimension_turning(rotations: float) -> float:
        return (
            config.head_dim
            * math.log(scaling.original_max_positions / (rotations * 2 * math.pi))
            / (2 * math.log(config.rope_theta))
        )

    low, high = dimension_turning(scaling.beta_fast), dimension_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    if low == high:
        high += 0.001  # a ramp of no length would divide by zero
    dimension = torch.arange(config.head_dim // 2, dtype=torch.float32)
    ramp = ((dimension - low) / (high - low)).clamp(0, 1)
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp)


def _yarn_attention_scale(scaling: RopeScaling) -> float:
    """YaRN's temperature, 0.1 ln(factor) + 1, carried by cos and sin (section 3.4)."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
    return temperature(1.0)


def apply_rotary(
    heads: Float[Tensor, "num_tokens num_heads head_dim"],
    cos: Float[Tensor, "num_tokens 1 head_dim"],
    sin: Float[Tensor, "num_tokens 1 head_dim"],
) -> Float[Tensor, "num_tokens num_heads head_dim"]:
    """Turn each pair (x[i], x[i + d/2]) by its token's angle: x cos + rotate_half(x) sin."""
    first, second = heads.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return heads * cos + rotated * sin


class RotaryPositions:
    """Where this step's tokens stand, for rotary attention: the tables and the rows of them
    that the step needs, gathered once and shared by all layers."""

    __slots__ = ("_gathered", "cos_table", "positions", "sin_table")

    def __init__(
        self,
        cos_table: Float[Tensor, "max_positions head_dim"],
        sin_table: Float[Tensor, "max_positions head_dim"],
        positions: Int[Tensor, " num_tokens"],
    ) -> None:
        self.cos_table, self.sin_table, self.positions = cos_table, sin_table, positions
        self._gathered: tuple[Tensor, Tensor] | None = None

    def cos_sin(
        self, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "num_tokens 1 head_dim"], Float[Tensor, "num_tokens 1 head_dim"]]:
        """This step's rows, ready to broadcast over the heads."""
        if self._gathered is None or self._gathered[0].dtype != dtype:
            self._gathered = (
                self.cos_table[self.positions].to(dtype)[:, None],
                self.sin_table[self.positions].to(dtype)[:, None],
            )
        return self._gathered
