"""From token ids to what a client may read: complete characters, and no part of a stop string.

Law 9: the pieces concatenate to exactly the final text, and a stop string is never partly
sent. Text that may be the beginning of a stop string is held until it is decided. Plain
Python, and a constant cost per character whatever the stops and the length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model.tokenizer import IncrementalDecoder


@dataclass(frozen=True, slots=True)
class TextPiece:
    """What some tokens added to an answer."""

    text: str  # may be sent now
    num_tokens: int  # how many of the tokens pushed belong to the answer
    stop: str | None = None  # the stop string that ended it; tokens after it do not count


class StopStrings:
    """Stop strings compiled into one automaton (Aho and Corasick 1975).

    A state is the longest end of the text so far that begins some stop string. Immutable:
    the continuations of a request share it.
    """

    __slots__ = ("held", "match", "next", "root_chars", "stops")

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises `ValueError` for an empty stop string: it would end every answer at once."""
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self.stops = tuple(dict.fromkeys(stops))
        self.next: list[dict[str, int]] = [{}]
        depth = [0]
        # The longest stop string that ends in a state: of those complete at a character, the
        # one that began first.
        self.match: list[str | None] = [None]
        for stop in self.stops:
            state = 0
            for place, char in enumerate(stop):
                if char not in self.next[state]:
                    self.next[state][char] = len(self.next)
                    self.next.append({})
                    depth.append(place + 1)
                    self.match.append(None)
                state = self.next[state][char]
            self.match[state] = stop
        self._complete(depth)

    def _complete(self, depth: list[int]) -> None:
        """Add what happens when a beginning does not go on: breadth first, each state takes the
        transitions of its longest proper end that is a state too."""
        self.root_chars = frozenset(self.next[0])
        # How many characters a state must hold back: its depth, unless nothing can follow it
        # (a whole stop string that did not count), then that of its longest proper end.
        self.held = [level if self.next[state] else 0 for state, level in enumerate(depth)]
        fallback = [0] * len(self.next)
        queue = [0]
        for state in queue:
            back = fallback[state]
            if not self.next[state]:
                self.held[state] = self.held[back]
            if self.match[state] is None:
                self.match[state] = self.match[back]
            children = self.next[state]
            for char, child in children.items():
                fallback[child] = self.next[back].get(char, 0) if state else 0
                queue.append(child)
            if state:
                self.next[state] = self.next[back] | children


class StopMatcher:
    """Finds the earliest stop string in a growing text and holds back what may become one.

    Of all stop strings, the one that is complete first wins; of two complete at the same
    character, the one that began first.
    """

    __slots__ = ("_held", "_state", "_stops")

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._state = 0
        self._held = ""

    @property
    def has_stops(self) -> bool:
        """Whether there is anything to look for."""
        return bool(self._stops.stops)

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Text that may be sent, and the stop string that `text` completed, if any.

        `may_stop` False: a stop string completed now is text like any other.
        """
        stops, state = self._stops, self._state
        if not stops.stops:
            return text, None
        if state == 0 and stops.root_chars.isdisjoint(text):
            return text, None
        transitions, match = stops.next, stops.match
        for place, char in enumerate(text):
            state = transitions[state].get(char, 0)
            found = match[state]
            if found is not None and may_stop:
                before = self._held + text[: place + 1]
                self._held, self._state = "", 0
                return before[: len(before) - len(found)], found
        self._state = state
        text = self._held + text
        cut = len(text) - stops.held[state]
        self._held = text[cut:]
        return text[:cut], None

    def flush(self) -> str:
        """What was held, now that nothing follows."""
        held, self._held, self._state = self._held, "", 0
        return held


class AnswerText:
    """The text of one continuation, token by token."""

    __slots__ = ("_decoder", "_matcher", "_min_tokens", "_num_tokens")

    def __init__(self, decoder: IncrementalDecoder, stops: StopStrings, min_tokens: int) -> None:
        """A stop string that is complete before the `min_tokens`-th token is no stop."""
        self._decoder = decoder
        self._matcher = StopMatcher(stops)
        self._min_tokens = min_tokens
        self._num_tokens = 0

    def push(self, token_ids: Sequence[int]) -> TextPiece:
        """The text that these tokens make ready. After a piece with a `stop`, no more calls.

        Token by token where something may stop it, so that the answer does not depend on how
        tokens arrive together.
        """
        if not self._matcher.has_stops:
            self._num_tokens += len(token_ids)
            return TextPiece(self._decoder.push(token_ids), len(token_ids))
        parts = []
        for place, token_id in enumerate(token_ids):
            self._num_tokens += 1
            text = self._decoder.push((token_id,))
            if not text:
                continue
            may_stop = self._num_tokens >= self._min_tokens
            ready, stop = self._matcher.push(text, may_stop=may_stop)
            parts.append(ready)
            if stop is not None:
                return TextPiece("".join(parts), place + 1, stop)
        return TextPiece("".join(parts), len(token_ids))

    def finish(self) -> TextPiece:
        """The rest, when no token follows; bytes that make no character are U+FFFD, and those
        may still complete a stop string."""
        may_stop = self._num_tokens >= self._min_tokens
        ready, stop = self._matcher.push(self._decoder.flush(), may_stop=may_stop)
        if stop is not None:
            return TextPiece(ready, 0, stop)
        return TextPiece(ready + self._matcher.flush(), 0)
