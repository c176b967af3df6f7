"""Sequences -> one copy to the device -> a launched step, whose tokens are read later.

A step of nothing but decodes is a captured one, if there is a bucket for it; with chunks of
prompts, with a grammar, or with penalties and log-probabilities at once, it is launched kernel by
kernel (steps.py).

Drawn tokens stay on the device, at a seat each; the next step refers to them by it. Seats are
given out round and round: a token is referred to only until the host has read it, one step later.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.config import ModelConfig
from model.exchange import ApartError
from model.fused import FusedForward
from model.kv_cache import KVCache
from model.sampling import SampledTokens, Scores, find_bad_rows, read_scores
from model.token_mask import TokenMask
from service.engine.device.columns import Columns
from service.engine.device.layout import Layout
from service.engine.device.steps import (
    BUCKETS,
    MAX_BIASES,
    MAX_PENALTIES,
    Asked,
    DeviceSteps,
    Drawn,
    StepPlan,
)
from service.engine.device.transfer import Event, Upload, download
from service.engine.profile import StepProfile
from service.engine.runner import NOTHING_SAMPLED, Done, Result, build_mask
from service.engine.scheduler import Limits, Scheduled
from service.engine.sequence import UNREAD
from service.engine.sights import Sights


class Others(Protocol):
    """The processes that have the other parts of the model; they do the same steps."""

    def launch(self, plan: StepPlan, numbers: NDArray[np.int32]) -> None: ...

    def agree(self, failure: Exception | None) -> None:
        """Wait until each has launched the step. Raises `failure`, this process's own, or what
        happened to another: nobody's step counts then."""
        ...

    def await_end(self) -> None:
        """If one of them has ended, this process ends here as it did."""
        ...

    def free_memory(self) -> None: ...

    def clear(self, blocks: list[int]) -> None: ...


@dataclass(frozen=True, slots=True)
class Pending:
    """A step under way; its numbers are on the host when `done` has passed."""

    num_rows: int
    token_ids: Tensor
    peaks: Tensor
    asked: Asked
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
    steps, none to launch every step kernel by kernel; `others` have the other parts of a model
    that is cut over several devices."""

    can_watch = False  # the kernels do not add attention weights up

    def __init__(
        self,
        forward: FusedForward,
        limits: Limits,
        *,
        eos_token_ids: tuple[int, ...],
        buckets: tuple[int, ...] = BUCKETS,
        heartbeat: Callable[[int], None] | None = None,
        others: Others | None = None,
    ) -> None:
        backend = forward.backend
        self.config: ModelConfig = backend.config
        self.eos_token_ids = eos_token_ids
        self._cache = backend.cache
        self._device = backend.cache.keys.device
        self._others = others
        self._next_seat = 0
        self._steps = DeviceSteps(forward, limits, buckets=buckets, heartbeat=heartbeat)
        began = time.monotonic()
        if self._steps.buckets:
            self._steps.capture(self._write_nobody)
        self.capture_s = time.monotonic() - began

    @property
    def cache(self) -> KVCache:
        return self._cache

    def clear(self, blocks: list[int]) -> None:
        """Zero these blocks, of every part of the model."""
        if self._others is not None:
            self._others.clear(blocks)
        self._cache.clear(blocks)

    def free_memory(self) -> None:
        """Blocks of memory that torch keeps may be of the wrong sizes."""
        if self._others is not None:
            self._others.free_memory()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def launch(self, step: list[Scheduled], profile: StepProfile) -> Result:
        """Start a forward and a draw; nothing is waited for."""
        began = time.monotonic()
        columns = Columns(self.config.vocab_size, self.eos_token_ids)
        sampled = [item.sequence for item in step if item.samples]
        for sequence in sampled:
            columns.add(sequence)
        plan, mask = self._plan(step, columns), build_mask(sampled, self._device)
        upload = self._steps.upload(plan.layout, plan.bucket)
        num_seats = self._steps.num_seats
        seats = [(self._next_seat + i) % num_seats for i in range(len(sampled))]
        buffer = upload.begin()
        self._write(step, columns, seats, plan.layout, buffer)
        built = time.monotonic()
        profile.build_s += built - began
        asked = tuple(columns.logprobs)
        drawn, scores = self._launch(plan, upload, buffer, asked, mask)
        if drawn is None:
            profile.forward_s += time.monotonic() - built
            return Done(NOTHING_SAMPLED)
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
        self._next_seat = (self._next_seat + len(sampled)) % num_seats
        profile.forward_s += time.monotonic() - built
        return pending

    def _launch(
        self,
        plan: StepPlan,
        upload: Upload,
        buffer: NDArray[np.int32],
        asked: Asked,
        mask: TokenMask | None,
    ) -> tuple[Drawn | None, Scores | None]:
        """Here, and on the others."""
        if self._others is None:
            upload.send(plan.num_numbers)
            return self._steps.launch(plan, asked, mask)
        self._others.launch(plan, buffer[: plan.num_numbers])
        launched: tuple[Drawn | None, Scores | None] = None, None
        failure: Exception | None = None
        try:
            with self._steps.together(plan):
                upload.send(plan.num_numbers)
                launched = self._steps.launch(plan, asked, mask)
        except ApartError:
            self._others.await_end()
            raise
        except Exception as error:  # noqa: BLE001 - it is raised when the others have been heard
            failure = error
        try:
            self._others.agree(failure)
        finally:  # its traceback holds this frame, which would hold all that the step had
            failure = None
        return launched

    def _plan(self, step: list[Scheduled], columns: Columns) -> StepPlan:
        bucket = self._bucket(step, columns)
        starts = tuple(accumulate((item.num_tokens for item in step), initial=0))
        if bucket is None:
            layout = self._layout(step, starts, columns)
        else:
            layout, starts = self._steps.bucket_layout(bucket), tuple(range(bucket + 1))
        used = layout.used(len(columns.penalties))
        return StepPlan(layout, bucket, starts, columns.has_adjustments, used)

    def _bucket(self, step: list[Scheduled], columns: Columns) -> int | None:
        """The smallest captured step that can be this one."""
        place = bisect_left(self._steps.buckets, len(step))
        if (
            place == len(self._steps.buckets)
            or any(not item.samples or item.num_tokens != 1 for item in step)
            or any(item.sequence.matcher is not None for item in step)
            or (columns.logprobs and columns.has_adjustments)
            or len(columns.penalties) > MAX_PENALTIES
            or len(columns.biases) > MAX_BIASES
        ):
            return None
        return self._steps.buckets[place]

    def _layout(self, step: list[Scheduled], starts: tuple[int, ...], columns: Columns) -> Layout:
        """Of a step that is not captured."""
        _, tiles, _ = self._steps.tiles(starts)
        return Layout(
            num_tokens=starts[-1],
            num_seqs=len(step),
            num_tiles=len(tiles),
            num_rows=len(columns.positions),
            table_width=max(len(item.sequence.blocks) for item in step),
            num_penalties=len(columns.penalties),
            num_biases=len(columns.biases),
        )

    def _write(
        self,
        step: list[Scheduled],
        columns: Columns,
        seats: list[int],
        layout: Layout,
        buffer: NDArray[np.int32],
    ) -> None:
        """Fill a buffer; rows beyond the step's own are nobody's."""
        size = self._cache.block_size
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
        _, tile_seqs, tile_starts = self._steps.tiles(tuple(starts))

        view = layout.on_host(buffer)
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
            ("seats", seats, self._steps.num_seats),
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

    def _write_nobody(self, layout: Layout, upload: Upload) -> None:
        """A batch of rows that are all nobody's."""
        self._write([], Columns(self.config.vocab_size, ()), [], layout, upload.begin())
        upload.send(layout.used(0))
