"""Structured output: the grammar library behind one door, and the process that tries grammars
out before the engine sees them. The library is an extra: `library.py` alone imports it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # the API process does without it
    import numpy as np
    from numpy.typing import NDArray

MISSING = "this server was installed without grammars (pip install 'vitrine[grammar]')"


def are_installed() -> bool:
    """Whether the library is there."""
    return find_spec("llguidance") is not None


class GrammarError(ValueError):
    """A grammar that cannot be used, and why, in words for whoever sent it."""


class TextMatcher(Protocol):
    """One text on its way through a grammar. Once `error` is set, no token can follow."""

    num_words: int  # of a mask
    error: str | None

    @property
    def is_complete(self) -> bool:
        """Whether the text fits and nothing but its end can follow."""
        ...

    def fill(self, words: NDArray[np.int32]) -> None:
        """Write the bits of the tokens that may come next, laid out as in
        model/token_mask.py. When there is none, all bits are 0 and `error` is set."""
        ...

    def advance(self, token_ids: Sequence[int]) -> None:
        """Take tokens; `error` is set when they do not fit or a limit is reached."""
        ...
