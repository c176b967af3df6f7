"""The device's half of a step: numbers in a buffer -> a launched forward and draw.

A step of nothing but decodes is launched as a CUDA graph, one for each bucket of rows: the batch is
padded to the bucket with rows that are nobody's (context length 0, slot -1, a seat that nobody
reads). Everything else is launched kernel by kernel from a layout of its own.

Nothing in here knows a sequence: a `StepPlan` and the buffer's numbers are all of a step, and so
all that another GPU needs which has a part of the same model (service/engine/ranks.py).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from model.backends.cuda import tiles_of
from model.batch import AttentionPlan, ForwardBatch
from model.fused import FusedForward
from model.graphs import Recorded, new_pool
from model.kernels.gpu.adjust import AdjustRows
from model.kernels.gpu.draw import DrawRows
from model.sampling import Scores, score
from model.token_mask import TokenMask
from service.engine.device.layout import Layout
from service.engine.device.transfer import Upload
from service.engine.scheduler import Limits

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
# Places of logits that a captured step can change, of all its rows together.
MAX_PENALTIES = 2**17
MAX_BIASES = 2**13
SEAT_ROUNDS = 4  # steps after which a seat is given out again

Asked = tuple[tuple[int, int], ...]  # (row, alternatives) of log-probabilities


class Drawn(NamedTuple):
    """What a step leaves on the device."""

    logits: Tensor  # before penalties only where somebody asked for log-probabilities
    token_ids: Tensor
    peaks: Tensor


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What a step's launch hangs on beside the numbers in its buffer."""

    layout: Layout
    bucket: int | None  # the captured step that it is
    starts: tuple[int, ...]  # of the sequences' tokens, and the end
    is_adjusted: bool  # logits are changed before tokens are drawn
    num_numbers: int  # of the buffer, that were written


class DeviceSteps:
    """Launches steps from buffers. `buckets` are the row counts of captured ones, none to launch
    every step kernel by kernel."""

    def __init__(
        self,
        forward: FusedForward,
        limits: Limits,
        *,
        buckets: tuple[int, ...] = BUCKETS,
        heartbeat: Callable[[int], None] | None = None,
    ) -> None:
        self.forward = forward
        self._kernels, self._backend = forward.backend.kernels, forward.backend
        cache = self._backend.cache
        self._device = cache.keys.device
        self._heartbeat = heartbeat
        self.num_seats = SEAT_ROUNDS * limits.max_num_seqs
        self.buckets = buckets[: bisect_left(buckets, limits.max_num_seqs) + 1]
        # The last seat is where rows that only pad put their token.
        forward.reserve(
            num_seats=self.num_seats + 1,
            num_rows=max(limits.max_num_seqs, *self.buckets, 0),
            num_tokens=limits.max_batched_tokens,
        )
        self._upload = Upload(1, self._device)
        self._table_width = -(-limits.max_model_len // cache.block_size)
        self._graphs: dict[int, Recorded[Drawn]] = {}
        self._graph_upload: Upload | None = None

    @torch.inference_mode()
    def capture(self, write_nobody: Callable[[Layout, Upload], None]) -> None:
        """One graph a bucket, the largest first: the memory that it needs is enough for the
        others. `write_nobody` fills a buffer with rows that are all nobody's."""
        largest = self.bucket_layout(self.buckets[-1])
        upload = self._graph_upload = Upload(largest.size, self._device)
        pool = new_pool(self._device)
        for bucket in reversed(self.buckets):
            layout = self.bucket_layout(bucket)
            write_nobody(layout, upload)
            views = layout.on_device(upload.on_device)
            self._graphs[bucket] = Recorded(
                partial(self._decode, layout, views), self._device, pool
            )
            if self._heartbeat is not None:
                self._heartbeat(0)

    def tiles(self, starts: tuple[int, ...]) -> tuple[int, list[int], list[int]]:
        """What attention's plan of such a batch holds."""
        return tiles_of(starts, self._backend.tile_queries, self._backend.is_deterministic)

    def bucket_layout(self, bucket: int) -> Layout:
        """Of the captured step of so many rows."""
        _, tiles, _ = self.tiles(tuple(range(bucket + 1)))
        return Layout(
            num_tokens=bucket,
            num_seqs=bucket,
            num_tiles=len(tiles),
            num_rows=bucket,
            table_width=self._table_width,
            num_penalties=MAX_PENALTIES,
            num_biases=MAX_BIASES,
        )

    def upload(self, layout: Layout, bucket: int | None) -> Upload:
        """The buffers of a step. Those of steps that are not captured are as large as the
        largest so far."""
        if bucket is not None:
            if self._graph_upload is None:
                raise RuntimeError("a bucket without its buffer")
            return self._graph_upload
        if layout.size > self._upload.size:
            self._upload = Upload(2 * layout.size, self._device)
        return self._upload

    def together(self, plan: StepPlan) -> AbstractContextManager[None]:
        """Around a step, from its buffer on, that other GPUs do too; see `FusedForward.step`."""
        return self.forward.step(plan.layout.num_tokens, plan.layout.num_rows)

    @torch.inference_mode()
    def launch(
        self, plan: StepPlan, asked: Asked = (), mask: TokenMask | None = None
    ) -> tuple[Drawn | None, Scores | None]:
        """Start a step whose buffer was sent; nothing is waited for. None: nothing is drawn."""
        layout, num_rows = plan.layout, plan.layout.num_rows
        if plan.bucket is not None:
            drawn = self._graphs[plan.bucket].launch()
            rows = max((row for row, _ in asked), default=-1) + 1
            if not asked:
                return drawn, None
            return drawn, score(drawn.logits[:rows], drawn.token_ids[:rows], asked)
        views = layout.on_device(self.upload(layout, None).on_device)
        heartbeat = self._heartbeat and partial(self._heartbeat, layout.num_tokens)
        logits = self.forward(self._batch(plan.starts, layout, views), heartbeat)
        if not num_rows:
            return None, None
        return self._draw(logits, views, asked, mask, is_adjusted=plan.is_adjusted)

    def _batch(
        self, starts: tuple[int, ...], layout: Layout, views: Mapping[str, Tensor]
    ) -> ForwardBatch:
        num_decodes, _, _ = self.tiles(starts)
        return ForwardBatch(
            input_ids=views["input_ids"],
            positions=views["positions"],
            query_start=views["query_start"],
            context_lens=views["context_lens"],
            block_tables=views["tables"],
            slot_mapping=views["slots"],
            logits_rows=views["logits_rows"],
            query_start_host=starts,
            context_lens_host=(0,) * layout.num_seqs,  # only the device knows
            plan=AttentionPlan(num_decodes, views["tile_seqs"], views["tile_starts"]),
        )

    def _draw(
        self,
        logits: Tensor,
        views: Mapping[str, Tensor],
        asked: Asked,
        mask: TokenMask | None,
        *,
        is_adjusted: bool,
    ) -> tuple[Drawn, Scores | None]:
        last_tokens = self.forward.last_tokens
        # Log-probabilities are those of the logits as they came.
        plain = logits.clone() if asked and (is_adjusted or mask is not None) else logits
        if is_adjusted:
            self._kernels.adjust(logits, _adjust_rows(views), last_tokens)
        if mask is not None:
            mask.apply_(logits)
        token_ids, peaks = self._kernels.draw(logits, _draw_rows(views), last_tokens)
        scores = score(plain, token_ids, asked) if asked else None
        return Drawn(plain, token_ids, peaks), scores

    def _decode(self, layout: Layout, views: Mapping[str, Tensor]) -> Drawn:
        """A step to be captured, which adjusts whatever there is to adjust."""
        starts = tuple(range(layout.num_seqs + 1))
        logits = self.forward(self._batch(starts, layout, views))
        return self._draw(logits, views, (), None, is_adjusted=True)[0]


def _draw_rows(views: Mapping[str, Tensor]) -> DrawRows:
    return DrawRows(
        views["inverse_temperature"],
        views["top_k"],
        views["top_p"],
        views["min_p"],
        views["seeds"],
        views["draw_positions"],
        views["seats"],
    )


def _adjust_rows(views: Mapping[str, Tensor]) -> AdjustRows:
    return AdjustRows(
        views["penalty_starts"],
        views["penalties"],
        views["bias_starts"],
        views["biases"],
        views["repetition"],
        views["unread_seats"],
        views["unread_amounts"],
    )
