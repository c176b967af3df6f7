"""The forward of a GPU: the model's own weights, 8 or 9 kernels a layer, nothing read back.

Its twin is the `Transformer` in PyTorch. Everything is launched from tensors that lie at the
same places each time it is called with the same batch: a CUDA graph can hold it (model/graphs.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from model.backends.cuda import CudaBackend, Norms, norms_of
from model.batch import ForwardBatch
from model.exchange import Exchange
from model.forward import Heartbeat
from model.kv_cache import KVCache
from model.layers import GeluMLP, LayerNorm, RMSNorm, SwiGLUMLP
from model.products import (
    Float8Product,
    MakeProduct,
    Product,
    float8_product,
    library_product,
)
from model.transformer import Block, Transformer


@dataclass(frozen=True, slots=True)
class _Norm:
    weight: Tensor
    bias: Tensor | None
    eps: float

    @classmethod
    def of(cls, norm: nn.Module) -> _Norm:
        if isinstance(norm, LayerNorm):
            return cls(norm.weight, norm.bias, norm.eps)
        if isinstance(norm, RMSNorm):
            return cls(norm.weight, None, norm.eps)
        raise TypeError(f"a norm of {type(norm).__name__}")


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: _Norm
    qkv: Product
    norms: Norms | None
    out: Product
    mlp_norm: _Norm
    up: Product  # gate and up of a gated MLP
    down: Product
    activation: Callable[[Tensor], Tensor]


class FusedForward:
    """`Forward` in few kernels. `last_tokens` is what negative ids refer to
    (model/kernels/gpu/embed.py). With an `exchange`, `model` is a part of one that lies on several
    GPUs."""

    def __init__(
        self,
        model: Transformer,
        backend: CudaBackend,
        *,
        make_product: MakeProduct = library_product,
        exchange: Exchange | None = None,
    ) -> None:
        self.model, self.backend = model, backend
        self._exchange = exchange
        self._layers = tuple(self._layer(block, make_product) for block in model.blocks)
        self._final_norm = _Norm.of(model.final_norm)
        # The head stays as it is: the order of logits hangs on it, and it may be the embedding.
        self._head = (library_product if make_product is float8_product else make_product)(
            model.lm_head
        )
        self.reserve(num_seats=1, num_rows=0)

    @property
    def nbytes(self) -> int:
        """Bytes of weights that are not the model's parameters any more."""
        return sum(
            product.nbytes
            for layer in self._layers
            for product in (layer.qkv, layer.out, layer.up, layer.down)
            if isinstance(product, Float8Product)
        )

    def use_cache(self, cache: KVCache) -> None:
        """Keys and values are there from now on; the weights stay as they were laid out."""
        self.backend = replace(self.backend, cache=cache)

    def step(self, num_tokens: int, num_rows: int) -> AbstractContextManager[None]:
        """Around whatever a step of so many tokens and rows of logits does on this GPU: when it
        fails here, no other one waits for this part of it. Raises `ApartError`."""
        return (
            nullcontext() if self._exchange is None else self._exchange.step(num_tokens, num_rows)
        )

    def reserve(self, *, num_seats: int, num_rows: int, num_tokens: int = 0) -> None:
        """Seats for drawn tokens, and memory for logits of so many rows that all calls share; and
        what a step of so many tokens needs when it fails."""
        device = self.model.embedding.weight.device
        self.last_tokens: Int[Tensor, " num_seats"] = torch.zeros(
            num_seats, dtype=torch.int32, device=device
        )
        self._logits: Float[Tensor, "num_rows vocab_size"] = torch.empty(
            num_rows, self.model.config.vocab_size, dtype=torch.float32, device=device
        )
        if self._exchange is not None:
            self._exchange.reserve(num_tokens=num_tokens, num_rows=num_rows)

    def __call__(
        self, batch: ForwardBatch, heartbeat: Heartbeat | None = None
    ) -> Float[Tensor, "num_logits vocab_size"]:
        kernels, model = self.backend.kernels, self.model
        attend = self.backend.begin(batch).attend
        learned = model.position_embedding
        hidden = kernels.embed(
            batch.input_ids,
            batch.positions,
            self.last_tokens,
            model.embedding.weight,
            None if learned is None else learned.weight,
        )
        if model.config.position == "sinusoidal":
            hidden += model.position_tables[0][batch.positions].to(hidden.dtype)
        rotary = model.position_tables if model.config.position == "rotary" else None

        update: Tensor | None = None
        for number, layer in enumerate(self._layers):
            normed = self._add_norm(hidden, update, layer.attention_norm)
            mixed = attend(number, layer.qkv(normed), layer.norms, rotary)
            update = self._add_up(layer.out(mixed))
            normed = self._add_norm(hidden, update, layer.mlp_norm)
            update = self._add_up(layer.down(layer.activation(layer.up(normed))))
            if heartbeat is not None:
                heartbeat()
        if not batch.logits_rows.shape[0]:  # the first part of a prompt
            return torch.empty(0, model.config.vocab_size, device=hidden.device)
        normed = self._add_norm(hidden, update, self._final_norm)
        logits = self._head(normed.index_select(0, batch.logits_rows))
        if self._exchange is not None:  # the last part may be longer than the vocabulary's rest
            logits = self._exchange.put_together(logits)[:, : model.config.vocab_size]
        if logits.shape[0] > self._logits.shape[0]:
            return logits.float().contiguous()
        return self._logits[: logits.shape[0]].copy_(logits)

    def _add_up(self, partial: Tensor) -> Tensor:
        return partial if self._exchange is None else self._exchange.add_up(partial)

    def _add_norm(self, hidden: Tensor, update: Tensor | None, norm: _Norm) -> Tensor:
        normed: Tensor = self.backend.kernels.add_norm(
            hidden, update, norm.weight, norm.bias, norm.eps
        )
        return normed

    def _layer(self, block: nn.Module, make_product: MakeProduct) -> _Layer:
        if not isinstance(block, Block):
            raise TypeError(f"a transformer of {type(block).__name__}")
        attention, mlp = block.attention, block.mlp
        activation: Callable[[Tensor], Tensor]
        if isinstance(mlp, SwiGLUMLP):
            up, activation = mlp.gate_up, self.backend.kernels.silu_mul
        elif isinstance(mlp, GeluMLP):
            up, approximate = mlp.up, mlp.approximate

            def activation(x: Tensor) -> Tensor:
                return F.gelu(x, approximate=approximate)
        else:
            raise TypeError(f"an MLP of {type(mlp).__name__}")
        return _Layer(
            _Norm.of(block.attention_norm),
            make_product(attention.qkv),
            norms_of(attention),
            make_product(attention.out),
            _Norm.of(block.mlp_norm),
            make_product(up),
            make_product(mlp.down),
            activation,
        )
