"""The numbers of one architecture, validated once.

Every published family (GPT-2, Llama, Mistral, Qwen) becomes one `ModelConfig`; the
`Transformer` reads nothing else. `model/families/` translates a checkpoint's config.json
into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Norm = Literal["layernorm", "rmsnorm"]
Mlp = Literal["gelu", "gelu_tanh", "swiglu"]
Position = Literal["sinusoidal", "learned", "rotary"]


class ConfigError(ValueError):
    """A number of the architecture is missing, out of bounds or at odds with another."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    linear: every frequency divided by `factor` (Chen et al. 2023, arXiv:2306.15595).
    llama3: low frequencies divided, high ones kept, a ramp between (Llama 3.1 release).
    yarn:   the ramp over rotations per trained context, and a temperature on the
            attention (Peng et al. 2023, arXiv:2309.00071).
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_positions: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn: rotations above which a frequency is kept
    beta_slow: float = 1.0  # yarn: rotations below which a frequency is divided
    attention_factor: float | None = None  # yarn: None computes it from `factor`
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the ramp's ends outward to whole dimensions

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise ConfigError(f"the rotary scaling factor must be at least 1, got {self.factor}")
        if self.kind == "linear":
            return
        if self.original_max_positions < 1:
            raise ConfigError(
                f"{self.kind} scaling needs the original_max_positions it stretches, "
                f"got {self.original_max_positions}"
            )
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"llama3 scaling needs 0 < low_freq_factor < high_freq_factor, "
                f"got {self.low_freq_factor} and {self.high_freq_factor}"
            )
        if self.kind == "yarn" and not 0 < self.beta_slow <= self.beta_fast:
            raise ConfigError(
                f"yarn scaling needs 0 < beta_slow <= beta_fast, "
                f"got {self.beta_slow} and {self.beta_fast}"
            )
        if self.attention_factor is not None and not self.attention_factor > 0:
            raise ConfigError(f"attention_factor must be positive, got {self.attention_factor}")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only transformer.

    Raises `ConfigError` when two numbers contradict each other; the message carries both.
    """

    vocab_size: int
    hidden_size: int  # d_model
    num_layers: int
    num_heads: int
    num_kv_heads: int  # == num_heads: multi-head; 1: multi-query; between: grouped-query
    head_dim: int  # d_k; not always hidden_size / num_heads
    intermediate_size: int
    max_positions: int
    norm: Norm = "rmsnorm"
    norm_eps: float = 1e-5
    mlp: Mlp = "swiglu"
    position: Position = "rotary"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm on each head's query and key (Qwen3)
    tie_embeddings: bool = False
    # One entry a layer: how many of the latest positions a query sees; None is all.
    # Empty means None for every layer.
    sliding_windows: tuple[int | None, ...] = ()
    family: str = "vitrine"

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "max_positions",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.position == "rotary" and self.head_dim % 2:
            raise ConfigError(
                f"rotary positions need an even head_dim, got head_dim {self.head_dim}"
            )
        if self.position == "sinusoidal" and self.hidden_size % 2:
            raise ConfigError(
                f"sinusoidal positions need an even hidden_size, got {self.hidden_size}"
            )
        if self.sliding_windows and len(self.sliding_windows) != self.num_layers:
            raise ConfigError(
                f"sliding_windows has {len(self.sliding_windows)} entries "
                f"for num_layers {self.num_layers}"
            )
        if any(w is not None and w < 1 for w in self.sliding_windows):
            raise ConfigError(f"a sliding window must be at least 1, got {self.sliding_windows}")
        if not self.norm_eps > 0:
            raise ConfigError(f"norm_eps must be positive, got {self.norm_eps}")
        if not self.rope_theta > 1:
            raise ConfigError(f"rope_theta must be above 1, got {self.rope_theta}")

    @property
    def query_size(self) -> int:
        """Width of all heads' queries together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or all value) heads together."""
        return self.num_kv_heads * self.head_dim

    def window(self, layer: int) -> int | None:
        """How many of the latest positions a query of `layer` sees; None is all of them."""
        return self.sliding_windows[layer] if self.sliding_windows else None
