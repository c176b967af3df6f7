"""The whole forward as one compiled call: how a CPU serves.

Packs a model's weights for model/kernels/forward.c and drops the plain ones. Its twin is the
`Transformer` in PyTorch; a row's bits depend neither on the rows beside it nor on how the
step is cut (model/kernels/linear.c, attention.c).
"""

from __future__ import annotations

import ctypes
import math
from array import array
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from model.batch import ForwardBatch, Watch
from model.config import ModelConfig
from model.forward import Heartbeat
from model.kernels import native, structs
from model.kernels.native import LANES
from model.kernels.packing import PANEL_OUTPUTS, PackedLinear, WeightKind, pack
from model.kv_cache import KVCache
from model.layers import GeluMLP, LayerNorm, RMSNorm, SwiGLUMLP
from model.linear import Linear
from model.transformer import Block, Transformer

Int64Array = NDArray[np.int64]

MAX_HEAD_DIM = 256
MAX_BLOCK_SIZE = 128
JOB_ROWS = 4  # rows of queries that a kernel computes at once
JOB_QUERIES = 32  # queries of a chunk that one thread takes at a time


def unsupported(config: ModelConfig, cache: KVCache) -> str | None:
    """Why compiled code cannot run this model, or None when it can."""
    sizes = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "head_dim": config.head_dim,
        "block_size": cache.block_size,
    }
    for name, size in sizes.items():
        if size % LANES:
            return f"{name} {size} is not a multiple of {LANES}"
    if config.head_dim > MAX_HEAD_DIM:
        return f"head_dim {config.head_dim} is over {MAX_HEAD_DIM}"
    if cache.block_size > MAX_BLOCK_SIZE:
        return f"block_size {cache.block_size} is over {MAX_BLOCK_SIZE}"
    if cache.keys.dtype not in (torch.float32, torch.bfloat16):
        return f"a {cache.keys.dtype} cache; float32 and bfloat16 are"
    return None


@dataclass(slots=True)
class Scratch:
    """Buffers of a step, kept between steps: fresh ones would be paged in each time."""

    tensors: dict[str, Tensor] = field(default_factory=dict)

    def at_least(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """(rows, width), with whatever is in it."""
        held = self.tensors.get(name)
        if held is None or held.shape[0] < rows:
            held = self.tensors[name] = torch.empty(rows, width, dtype=dtype)
        return held[:rows]


class CompiledForward:
    """`Forward` in compiled code. Made once; the model's plain weights are gone afterwards, and
    its products run on the packed ones."""

    def __init__(self, model: Transformer, cache: KVCache, *, int8: bool = False) -> None:
        """Raises `NativeKernelError` where the kernels cannot be built. The model's dtype is
        that of the cache; `int8` rounds the weights of all products."""
        self._library = native.load()
        self._model, self._cache = model, cache
        self._dtype = cache.keys.dtype
        self._kind: WeightKind = "bfloat16" if self._dtype == torch.bfloat16 else "float32"
        if int8:
            self._kind = "int8"
        self._kept: list[Tensor | PackedLinear] = []  # what the structs point into
        config = model.config
        self._layers = (structs.Layer * config.num_layers)(
            *(self._layer(block, layer) for layer, block in enumerate(model.blocks))
        )
        self._struct = structs.Model(
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_size=cache.block_size,
            is_bf16=self._dtype == torch.bfloat16,
            activation=structs.ACTIVATIONS[config.mlp],
            norm_eps=config.norm_eps,
            scale=1 / math.sqrt(config.head_dim),
            layers=self._layers,
            final_norm=self._norm(model.final_norm),
            lm_head=self._linear(model.lm_head),
        )
        if config.position == "rotary":
            cos, sin = model.position_tables
            self._kept += [cos, sin]
            self._struct.cos, self._struct.sin = cos.data_ptr(), sin.data_ptr()
        self._scratch = Scratch()
        self._watched: _Watched | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of everything packed, without the embedding."""
        return sum(kept.nbytes for kept in self._kept)

    def __call__(
        self, batch: ForwardBatch, heartbeat: Heartbeat | None = None
    ) -> Float[Tensor, "num_logits vocab_size"]:
        model, config = self._model, self._model.config
        rows, num_logits = batch.num_tokens, int(batch.logits_rows.shape[0])
        threads = torch.get_num_threads()
        hidden = model.embed(batch.input_ids, batch.positions)
        jobs = _jobs(batch)
        last_jobs = _last_jobs(jobs, batch)
        tables = batch.block_tables.contiguous()

        def scratch(name: str, width: int) -> int:
            return self._scratch.at_least(name, rows, width, self._dtype).data_ptr()

        step = structs.Step(
            num_threads=threads,
            num_tokens=rows,
            max_blocks=tables.shape[1],
            num_jobs=jobs.shape[0],
            num_last_jobs=last_jobs.shape[0],
            num_logits=num_logits,
            positions=batch.positions.data_ptr(),
            slots=batch.slot_mapping.data_ptr(),
            jobs=jobs.ctypes.data,
            last_jobs=last_jobs.ctypes.data,
            query_start=batch.query_start.data_ptr(),
            context_lens=batch.context_lens.data_ptr(),
            tables=tables.data_ptr(),
            logits_rows=batch.logits_rows.data_ptr(),
            hidden=hidden.data_ptr(),
            normed=scratch("normed", config.hidden_size),
            qkv=scratch("qkv", config.query_size + 2 * config.kv_size),
            mixed=scratch("mixed", config.query_size),
            gated=scratch("gated", config.intermediate_size),
            heartbeat=structs.Heartbeat(heartbeat or 0),
        )
        if self._kind == "int8":
            widest = max(config.hidden_size, config.intermediate_size, config.query_size)
            panels = self._scratch.at_least(
                "panels", threads, PANEL_OUTPUTS * widest, torch.bfloat16
            )
            step.panels = panels.data_ptr()
        if batch.watch is not None:
            watched = self._watched
            if watched is None or not watched.fits(batch, threads):
                watched = _Watched(batch, batch.watch, self._cache.block_size, threads)
                self._watched = watched  # the next step's is often the same
            step.watch = ctypes.pointer(watched.struct)
        logits = self._scratch.at_least("logits", num_logits, config.vocab_size, torch.float32)
        step.logits = logits.data_ptr()
        self._library.vitrine_forward(ctypes.byref(self._struct), ctypes.byref(step))
        return logits

    def _layer(self, block: nn.Module, layer: int) -> structs.Layer:
        if not isinstance(block, Block):
            raise TypeError(f"a transformer of {type(block).__name__}")
        attention, mlp = block.attention, block.mlp
        if not isinstance(mlp, GeluMLP | SwiGLUMLP):
            raise TypeError(f"an MLP of {type(mlp).__name__}")
        gated = isinstance(mlp, SwiGLUMLP)
        return structs.Layer(
            attention_norm=self._norm(block.attention_norm),
            mlp_norm=self._norm(block.mlp_norm),
            query_norm=self._vector(attention.query_norm),
            key_norm=self._vector(attention.key_norm),
            qkv=self._linear(attention.qkv),
            out=self._linear(attention.out),
            up=self._linear(mlp.gate_up if isinstance(mlp, SwiGLUMLP) else mlp.up, gated=gated),
            down=self._linear(mlp.down),
            keys=self._cache.keys[layer].data_ptr(),
            values=self._cache.values[layer].data_ptr(),
            window=self._model.config.window(layer) or 0,
        )

    def _linear(self, linear: Linear, *, gated: bool = False) -> structs.Linear:
        packed = pack(linear, self._kind, gated=gated)
        is_embedding = linear.weight is self._model.embedding.weight
        linear.replace_weight(packed, keep_plain=is_embedding)
        self._kept.append(packed)
        return packed.struct()

    def _norm(self, norm: nn.Module) -> structs.Norm:
        if not isinstance(norm, LayerNorm | RMSNorm):
            raise TypeError(f"a norm of {type(norm).__name__}")
        weight, bias = norm.weight.detach().float(), None
        if isinstance(norm, LayerNorm):
            bias = norm.bias.detach().float()
            self._kept.append(bias)
        self._kept.append(weight)
        return structs.Norm(weight.data_ptr(), None if bias is None else bias.data_ptr())

    def _vector(self, norm: RMSNorm | None) -> int | None:
        return None if norm is None else self._norm(norm).weight


class _Watched:
    """A watch as the kernel takes it, with what it points into."""

    def __init__(self, batch: ForwardBatch, watch: Watch, block_size: int, threads: int) -> None:
        self._of, self._num_seqs, self._threads = watch, batch.num_seqs, threads
        columns, longest = watch.sums.shape[2], max(batch.context_lens_host[s] for s in watch.seqs)
        if longest > columns or columns % block_size:
            raise ValueError(
                f"a watch of {columns} positions, in a cache of blocks of {block_size}, over a "
                f"sequence of {longest}"
            )
        rows = [-1] * batch.num_seqs
        for row, seq in enumerate(watch.seqs):
            rows[seq] = row
        counts = Counter(row for row, _, _ in watch.heads)
        starts = [0, *accumulate(counts[row] for row in range(len(watch.seqs)))]
        chosen = [number for _, *numbers in watch.heads for number in numbers]
        # Not tensors: torch takes 10 us to make one of a list.
        self.numbers = [array("q", x) for x in (watch.seqs, rows, starts, chosen)]
        self.scores = torch.empty(threads, JOB_ROWS, columns)
        self.struct = structs.Watch(
            stride=columns,
            num_rows=len(watch.seqs),
            seqs=self.numbers[0].buffer_info()[0],
            rows=self.numbers[1].buffer_info()[0],
            sums=watch.sums.data_ptr(),
            chosen_start=self.numbers[2].buffer_info()[0],
            chosen=self.numbers[3].buffer_info()[0],
            chosen_weights=watch.chosen.data_ptr(),
            scores=self.scores.data_ptr(),
            num_places=watch.places.shape[1],
            num_tokens=watch.tokens.shape[1],
            places=watch.places.data_ptr(),
            weights=watch.weights.data_ptr(),
            tokens=watch.tokens.data_ptr(),
            logprobs=watch.logprobs.data_ptr(),
        )

    def fits(self, batch: ForwardBatch, threads: int) -> bool:
        """Whether it is this batch's as well."""
        watch = self._of
        return (
            watch is batch.watch
            and self._num_seqs == batch.num_seqs
            and self._threads >= threads
            and max(batch.context_lens_host[seq] for seq in watch.seqs) <= watch.sums.shape[2]
        )


def _jobs(batch: ForwardBatch) -> Int64Array:
    """(num_jobs, 3): sequence, first row, number of queries; a thread takes one at a time."""
    starts = batch.query_start_host
    jobs = [
        number
        for seq in range(batch.num_seqs)
        for row in range(starts[seq], starts[seq + 1], JOB_QUERIES)
        for number in (seq, row, min(JOB_QUERIES, starts[seq + 1] - row))
    ]
    return np.array(jobs, np.int64).reshape(-1, 3)


def _last_jobs(jobs: Int64Array, batch: ForwardBatch) -> Int64Array:
    """Of each job the part from the first to the last query whose logits are wanted, or who is
    watched."""
    if batch.logits_rows.shape[0] >= batch.num_tokens:
        return jobs
    watched = batch.watch.seqs if batch.watch is not None else ()
    watched_rows = [batch.query_start_host[seq + 1] - 1 for seq in watched]
    wanted = np.sort(np.append(batch.logits_rows.numpy(), np.array(watched_rows, np.int64)))
    begin = np.searchsorted(wanted, jobs[:, 1])
    end = np.searchsorted(wanted, jobs[:, 1] + jobs[:, 2])
    some = begin < end
    first, last = wanted[begin[some]], wanted[end[some] - 1]
    return np.stack([jobs[some, 0], first, last - first + 1], axis=1)
