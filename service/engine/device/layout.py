"""One row of int32 numbers that holds all a step needs: written on the host, copied once.

Sections stand one after the other, each at a multiple of 16 bytes, which Triton's kernels are
compiled for; floats are there by their bits. The layout of a decode step depends on nothing but
its number of rows, so that a CUDA graph finds everything where it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 4  # numbers
FLOATS = frozenset({"inverse_temperature", "top_p", "min_p", "repetition", "unread_amounts"})


@dataclass(frozen=True)
class Layout:
    """How many there are of everything. `num_rows` counts rows of logits that are drawn from."""

    num_tokens: int
    num_seqs: int
    num_tiles: int
    num_rows: int
    table_width: int  # blocks of the longest sequence, and zeros for the others
    num_penalties: int
    num_biases: int

    @cached_property
    def sections(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """(first number, shape) of each section. The last two may be filled in part, and only
        what is filled is copied."""
        rows, tokens = (self.num_rows,), (self.num_tokens,)
        shapes: dict[str, tuple[int, ...]] = {
            "input_ids": tokens,
            "positions": tokens,
            "slots": tokens,
            "query_start": (self.num_seqs + 1,),
            "context_lens": (self.num_seqs,),
            "tile_seqs": (self.num_tiles,),
            "tile_starts": (self.num_tiles,),
            "logits_rows": rows,
            "inverse_temperature": rows,
            "top_k": rows,
            "top_p": rows,
            "min_p": rows,
            "seeds": (2, self.num_rows),
            "draw_positions": rows,
            "seats": rows,
            "repetition": rows,
            "unread_seats": rows,
            "unread_amounts": rows,
            "penalty_starts": (self.num_rows + 1,),
            "bias_starts": (self.num_rows + 1,),
            "tables": (self.num_seqs, self.table_width),
            "biases": (self.num_biases, 2),
            "penalties": (self.num_penalties, 3),
        }
        sections, place = {}, 0
        for name, shape in shapes.items():
            sections[name] = (place, shape)
            place += -(-int(np.prod(shape)) // ALIGNMENT) * ALIGNMENT
        return sections

    @property
    def size(self) -> int:
        """Numbers of all sections."""
        return self.used(self.num_penalties)

    def used(self, num_penalties: int) -> int:
        """Numbers up to the end of so many penalties."""
        return self.sections["penalties"][0] + 3 * num_penalties

    def on_host(self, buffer: NDArray[np.int32]) -> dict[str, NDArray[np.generic]]:
        """Each section of a host's buffer, to be written."""
        views: dict[str, NDArray[np.generic]] = {}
        for name, (start, shape) in self.sections.items():
            flat = buffer[start : start + int(np.prod(shape))].reshape(shape)
            views[name] = flat.view(np.float32) if name in FLOATS else flat
        return views

    def on_device(self, buffer: Tensor) -> dict[str, Tensor]:
        """Each section of the device's buffer."""
        views = {}
        for name, (start, shape) in self.sections.items():
            flat = buffer[start : start + int(np.prod(shape))].view(shape)
            views[name] = flat.view(torch.float32) if name in FLOATS else flat
        return views
