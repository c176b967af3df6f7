"""Sequences -> one copy to the device -> a launched step, whose tokens are read later.

A step of nothing but decodes is launched as a CUDA graph, one for each bucket of rows: the batch is
padded to the bucket with rows that are nobody's (context length 0, slot -1, a seat that nobody
reads). Everything else, a step with chunks of prompts, with a grammar, or with penalties and
log-probabilities at once, is launched kernel by kernel from a layout of its own.

Drawn tokens stay on the device, at a seat each; the next step refers to them by it. Seats are
given out round and round: a token is referred to only until the host has read it, one step later.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from model.backends.cuda import tiles_of
from model.batch import AttentionPlan, ForwardBatch
from model.config import ModelConfig
from model.fused import FusedForward
from model.graphs import Recorded, new_pool
from model.kernels.gpu.adjust import AdjustRows
from model.kernels.gpu.draw import DrawRows
from model.kv_cache import KVCache
from model.sampling import SampledTokens, Scores, find_bad_rows, read_scores, score
from model.token_mask import TokenMask
from service.engine.device.columns import Columns
from service.engine.device.layout import Layout
from service.engine.device.transfer import Event, Upload, download
from service.engine.profile import StepProfile
from service.engine.runner import NOTHING_SAMPLED, Done, Result, build_mask
from service.engine.scheduler import Limits, Scheduled
from service.engine.sequence import UNREAD
from service.engine.sights import Sights

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
# Places of logits that a captured step can change, of all its rows together.
MAX_PENALTIES = 2**17
MAX_BIASES = 2**13
SEAT_ROUNDS = 4  # steps after which a seat is given out again


class Drawn(NamedTuple):
    """What a step leaves on the device."""

    logits: Tensor  # before penalties only where somebody asked for log-probabilities
    token_ids: Tensor
    peaks: Tensor


@dataclass(frozen=True, slots=True)
class Pending:
    """A step under way; its numbers are on the host when `done` has passed."""

    num_rows: int
    token_ids: Tensor
    peaks: Tensor
    asked: tuple[tuple[int, int], ...]
    scores: Scores | None
    refused: Mapping[int, str]
    done: Event
    sights: Sights = field(default_factory=dict)  # see `can_watch`

    def read(self, profile: StepProfile) -> SampledTokens:
        began = time.monotonic()
        self.done.wait()
        profile.sample_s += time.monotonic() - began
        bad_rows = find_bad_rows(self.peaks[: self.num_rows], self.refused)
        token_ids = self.token_ids[: self.num_rows].long()
        logprobs = None
        if self.scores is not None:
            logprobs = read_scores(self.scores, self.asked, self.num_rows)
        return SampledTokens(token_ids, bad_rows, logprobs)


class DeviceRunner:
    """`StepRunner` of a device that works by itself. `buckets` are the row counts of captured
    steps, none to launch every step kernel by kernel."""

    can_watch = False  # the kernels do not add attention weights up

    def __init__(
        self,
        forward: FusedForward,
        limits: Limits,
        *,
        eos_token_ids: tuple[int, ...],
        buckets: tuple[int, ...] = BUCKETS,
        heartbeat: Callable[[int], None] | None = None,
    ) -> None:
        backend = forward.backend
        self.config: ModelConfig = backend.config
        self.eos_token_ids = eos_token_ids
        self._forward, self._kernels, self._backend = forward, backend.kernels, backend
        self._block_size = backend.cache.block_size
        self._device = backend.cache.keys.device
        self._heartbeat = heartbeat
        self._num_seats = SEAT_ROUNDS * limits.max_num_seqs
        self._next_seat = 0
        fitting = bisect_left(buckets, limits.max_num_seqs)
        self._buckets = buckets[: fitting + 1]
        # The last seat is where rows that only pad put their token.
        forward.reserve(
            num_seats=self._num_seats + 1, num_rows=max(limits.max_num_seqs, *self._buckets, 0)
        )
        self._upload = Upload(1, self._device)
        self._table_width = -(-limits.max_model_len // self._block_size)
        self._graphs: dict[int, Recorded[Drawn]] = {}
        self._graph_upload: Upload | None = None
        if self._buckets:
            self._capture()

    @property
    def cache(self) -> KVCache:
        return self._backend.cache

    @torch.inference_mode()
    def launch(self, step: list[Scheduled], profile: StepProfile) -> Result:
        """Start a forward and a draw; nothing is waited for."""
        began = time.monotonic()
        columns = Columns(self.config.vocab_size, self.eos_token_ids)
        sampled = [item.sequence for item in step if item.samples]
        for sequence in sampled:
            columns.add(sequence)
        bucket = self._bucket(step, columns)
        layout = self._layout(step, columns) if bucket is None else self._bucket_layout(bucket)
        upload = self._upload_for(layout) if bucket is None else self._graph_upload
        if upload is None:
            raise RuntimeError("a bucket without its buffer")
        seats = [(self._next_seat + i) % self._num_seats for i in range(len(sampled))]
        self._write(step, columns, seats, layout, upload)
        built = time.monotonic()
        profile.build_s += built - began
        asked, scores = tuple(columns.logprobs), None
        if bucket is not None:
            drawn = self._graphs[bucket].launch()
            if asked:
                scores = score(drawn.logits[: len(sampled)], drawn.token_ids, asked)
        else:
            views = layout.on_device(upload.on_device)
            heartbeat = self._heartbeat and partial(self._heartbeat, layout.num_tokens)
            logits = self._forward(self._batch(step, layout, views), heartbeat)
            if not sampled:
                profile.forward_s += time.monotonic() - built
                return Done(NOTHING_SAMPLED)
            drawn, scores = self._draw(
                logits, views, asked, build_mask(sampled, self._device), columns
            )
        if scores is not None:
            scores = Scores(*map(download, scores))
        pending = Pending(
            len(sampled),
            download(drawn.token_ids),
            download(drawn.peaks),
            asked,
            scores,
            columns.refused,
            Event(self._device),
        )
        for sequence, seat in zip(sampled, seats, strict=True):
            sequence.seat = seat
        self._next_seat = (self._next_seat + len(sampled)) % self._num_seats
        profile.forward_s += time.monotonic() - built
        return pending

    def _bucket(self, step: list[Scheduled], columns: Columns) -> int | None:
        """The smallest captured step that can be this one."""
        place = bisect_left(self._buckets, len(step))
        if (
            place == len(self._buckets)
            or any(not item.samples or item.num_tokens != 1 for item in step)
            or any(item.sequence.matcher is not None for item in step)
            or (columns.logprobs and columns.has_adjustments)
            or len(columns.penalties) > MAX_PENALTIES
            or len(columns.biases) > MAX_BIASES
        ):
            return None
        return self._buckets[place]

    def _layout(self, step: list[Scheduled], columns: Columns) -> Layout:
        """Of a step that is not captured."""
        starts = tuple(accumulate((item.num_tokens for item in step), initial=0))
        _, tiles, _ = self._tiles(starts)
        return Layout(
            num_tokens=starts[-1],
            num_seqs=len(step),
            num_tiles=len(tiles),
            num_rows=len(columns.positions),
            table_width=max(len(item.sequence.blocks) for item in step),
            num_penalties=len(columns.penalties),
            num_biases=len(columns.biases),
        )

    def _bucket_layout(self, bucket: int) -> Layout:
        _, tiles, _ = self._tiles(tuple(range(bucket + 1)))
        return Layout(
            num_tokens=bucket,
            num_seqs=bucket,
            num_tiles=len(tiles),
            num_rows=bucket,
            table_width=self._table_width,
            num_penalties=MAX_PENALTIES,
            num_biases=MAX_BIASES,
        )

    def _tiles(self, starts: tuple[int, ...]) -> tuple[int, list[int], list[int]]:
        return tiles_of(starts, self._backend.tile_queries, self._backend.is_deterministic)

    def _upload_for(self, layout: Layout) -> Upload:
        """Of steps that are not captured: as large as the largest so far."""
        if layout.size > self._upload.size:
            self._upload = Upload(2 * layout.size, self._device)
        return self._upload

    def _write(
        self,
        step: list[Scheduled],
        columns: Columns,
        seats: list[int],
        layout: Layout,
        upload: Upload,
    ) -> None:
        """Fill the next buffer and send it; rows beyond the step's own are nobody's."""
        size = self._block_size
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts, logits_rows = [0], []
        for item in step:
            sequence, start = item.sequence, item.sequence.num_computed
            end = start + item.num_tokens
            ids += sequence.token_ids[start:end]
            if ids[-1] == UNREAD:
                ids[-1] = -1 - sequence.seat
            positions += range(start, end)
            slots += [sequence.blocks[p // size] * size + p % size for p in range(start, end)]
            starts.append(len(ids))
            if item.samples:
                logits_rows.append(len(ids) - 1)
        spare_tokens = layout.num_tokens - len(ids)
        spare_seqs = layout.num_seqs - len(step)
        spare_rows = layout.num_rows - len(seats)
        starts += range(len(ids) + 1, len(ids) + 1 + spare_seqs)
        _, tile_seqs, tile_starts = self._tiles(tuple(starts))

        view = layout.on_host(upload.begin())
        view["input_ids"][:] = ids + [0] * spare_tokens
        view["positions"][:] = positions + [0] * spare_tokens
        view["slots"][:] = slots + [-1] * spare_tokens
        view["query_start"][:] = starts
        view["context_lens"][:] = [
            item.sequence.num_computed + item.num_tokens for item in step
        ] + [0] * spare_seqs
        view["tile_seqs"][:], view["tile_starts"][:] = tile_seqs, tile_starts
        for row, item in zip(view["tables"], step, strict=False):
            row[: len(item.sequence.blocks)] = item.sequence.blocks
        view["logits_rows"][:] = logits_rows + [0] * spare_rows
        for name, column, nothing in (
            ("inverse_temperature", columns.inverse_temperature, 0.0),
            ("top_k", columns.top_k, 0),
            ("top_p", columns.top_p, 1.0),
            ("min_p", columns.min_p, 0.0),
            ("draw_positions", columns.positions, 0),
            ("seats", seats, self._num_seats),
            ("repetition", columns.repetition, 1.0),
            ("unread_seats", columns.unread_seats, -1),
            ("unread_amounts", columns.unread_amounts, 0.0),
            ("penalty_starts", columns.penalty_starts, columns.penalty_starts[-1]),
            ("bias_starts", columns.bias_starts, columns.bias_starts[-1]),
        ):
            view[name][: len(column)] = column
            view[name][len(column) :] = nothing
        for words, seeds in zip(view["seeds"], columns.seeds, strict=True):
            words[: len(seeds)] = seeds
        if columns.biases:
            view["biases"][: len(columns.biases)] = columns.biases
        if columns.penalties:
            view["penalties"][: len(columns.penalties)] = columns.penalties
        upload.send(layout.used(len(columns.penalties)))

    def _batch(
        self, step: list[Scheduled], layout: Layout, views: Mapping[str, Tensor]
    ) -> ForwardBatch:
        """`step` is empty when a step is captured, whose numbers nobody knows yet."""
        starts = tuple(accumulate((item.num_tokens for item in step), initial=0))
        contexts = tuple(item.sequence.num_computed + item.num_tokens for item in step)
        if not step:
            starts, contexts = tuple(range(layout.num_seqs + 1)), (0,) * layout.num_seqs
        num_decodes, _, _ = self._tiles(starts)
        return ForwardBatch(
            input_ids=views["input_ids"],
            positions=views["positions"],
            query_start=views["query_start"],
            context_lens=views["context_lens"],
            block_tables=views["tables"],
            slot_mapping=views["slots"],
            logits_rows=views["logits_rows"],
            query_start_host=starts,
            context_lens_host=contexts,
            plan=AttentionPlan(num_decodes, views["tile_seqs"], views["tile_starts"]),
        )

    def _draw(
        self,
        logits: Tensor,
        views: Mapping[str, Tensor],
        asked: tuple[tuple[int, int], ...],
        mask: TokenMask | None,
        columns: Columns | None,
    ) -> tuple[Drawn, Scores | None]:
        """`columns` is None for a captured step, which adjusts whatever there is."""
        last_tokens = self._forward.last_tokens
        is_adjusted = columns is None or columns.has_adjustments
        # Log-probabilities are those of the logits as they came.
        plain = logits.clone() if asked and (is_adjusted or mask is not None) else logits
        if is_adjusted:
            self._kernels.adjust(logits, _adjust_rows(views), last_tokens)
        if mask is not None:
            mask.apply_(logits)
        token_ids, peaks = self._kernels.draw(logits, _draw_rows(views), last_tokens)
        scores = score(plain, token_ids, asked) if asked else None
        return Drawn(plain, token_ids, peaks), scores

    @torch.inference_mode()
    def _capture(self) -> None:
        """One graph a bucket, the largest first: the memory that it needs is enough for the
        others."""
        largest = self._bucket_layout(self._buckets[-1])
        upload = self._graph_upload = Upload(largest.size, self._device)
        pool = new_pool(self._device)
        for bucket in reversed(self._buckets):
            layout = self._bucket_layout(bucket)
            self._write_nobody(layout, upload)
            views = layout.on_device(upload.on_device)
            self._graphs[bucket] = Recorded(
                partial(self._decode, layout, views), self._device, pool
            )
            if self._heartbeat is not None:
                self._heartbeat(0)

    def _write_nobody(self, layout: Layout, upload: Upload) -> None:
        """A batch of rows that are all nobody's."""
        self._write([], Columns(self.config.vocab_size, ()), [], layout, upload)

    def _decode(self, layout: Layout, views: Mapping[str, Tensor]) -> Drawn:
        logits = self._forward(self._batch([], layout, views))
        return self._draw(logits, views, (), None, None)[0]


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
