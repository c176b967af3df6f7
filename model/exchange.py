"""What the parts of a model do together in a forward: two sums a layer, then the logits.

Nobody's sum is done before everybody's addend has come. A process whose forward fails in the
middle, out of memory for one, would leave the others waiting for ever; so it takes part in what is
left, with zeros from memory that was put aside for it, and raises then. The others' numbers are
wrong, and finite; that they are not to be used is said by another way (service/engine/ranks.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from model.parallel import Group
from model.transformer import Transformer


class ApartError(Exception):
    """This process does not know any more where in a forward the others are. There is no going on
    but with new processes."""


class Exchange:
    """One process's end. `part` is its part of the model."""

    def __init__(self, group: Group, part: Transformer) -> None:
        self._size = group.size
        self._num_sums = 2 * part.config.num_layers
        self._hidden_size, self._num_logits = part.config.hidden_size, part.lm_head.weight.shape[0]
        self._weight = part.embedding.weight
        self._sums_done = 0
        self._has_gathered = self._is_inside = False
        self._aside = self._weight.new_empty(0)

    def reserve(self, *, num_tokens: int, num_rows: int) -> None:
        """Put memory aside to finish a step of so many tokens and rows of logits."""
        numbers = max(
            num_tokens * self._hidden_size, (1 + self._size) * num_rows * self._num_logits
        )
        if len(self._aside) < numbers:
            self._aside = self._aside[:0].clone()  # there may be no room for both
            self._aside = self._weight.new_empty(numbers)

    @contextmanager
    def step(self, num_tokens: int, num_rows: int) -> Iterator[None]:
        """A forward of so many tokens and rows of logits, which every process does. What is raised
        in here is raised when the others have had what they wait for. Raises `ApartError` when
        they cannot have it."""
        self._sums_done, self._has_gathered, self._is_inside = 0, num_rows == 0, False
        try:
            yield
        except Exception as error:
            if self._is_inside:  # others may have had this sum, and may not
                raise ApartError(f"{type(error).__name__}: {error}") from error
            try:
                self._finish(num_tokens, num_rows)
            except Exception as second:
                raise ApartError(f"{type(error).__name__}: {error}, then {second}") from second
            raise

    def add_up(self, partial: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        """The sum of everybody's `partial`, in its place."""
        self._is_inside = True
        dist.all_reduce(partial)
        self._is_inside = False
        self._sums_done += 1
        return partial

    def put_together(self, part: Float[Tensor, "rows part"]) -> Float[Tensor, "rows all_parts"]:
        """Everybody's runs of the vocabulary, side by side."""
        num_rows, num_logits = part.shape
        parts = part.new_empty(self._size, num_rows, num_logits)
        self._gather(parts, part.contiguous())
        return parts.movedim(0, 1).reshape(num_rows, self._size * num_logits)

    def _gather(
        self, parts: Float[Tensor, "size rows part"], part: Float[Tensor, "rows part"]
    ) -> None:
        """Into one tensor: a list of them would be memory taken in here, where nothing may fail."""
        self._is_inside = True
        dist.all_gather_into_tensor(parts.flatten(0, 1), part)
        self._is_inside = False
        self._has_gathered = True

    def _finish(self, num_tokens: int, num_rows: int) -> None:
        """Take part in what is left of the step, with zeros."""
        partial = self._aside[: num_tokens * self._hidden_size].view(num_tokens, self._hidden_size)
        while self._sums_done < self._num_sums:
            self.add_up(partial.zero_())
        if not self._has_gathered:
            numbers = (1 + self._size) * num_rows * self._num_logits
            all_rows = self._aside[:numbers].view(1 + self._size, num_rows, self._num_logits)
            self._gather(all_rows[1:], all_rows[0].zero_())
