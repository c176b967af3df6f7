"""When a guest's piece of work may lie between two steps that streams wait for.

A guest is work that nobody streams: an explanation. Beside running streams it may neither take
their throughput nor make the longest of their gaps longer. Both are held by measured times, as
two credits that fill with every gap:

- time: SHARE of it is the guest's, so streams lose that much at most;
- risk: a piece makes one gap longer. How likely it is that this gap then is one of the longest,
  more than ROOM times the 99th percentile, is read from the last gaps as they were without
  guests, and settled when the gap is over. One gap in RARE may become so: too few to move the
  percentile itself.

Where a piece never fits, its risk is 1, and it waits RARE gaps; in the gap that it then spoils,
more pieces cost no more risk, and it takes the time that was saved: it still gets to its end.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque

SHARE = 0.05
ROOM = 1.05
RARE = 1024
NUM_GAPS = 256
NUM_PIECES = 8
FEWEST_GAPS = 32  # fewer say nothing of a 99th percentile
MOST_CREDIT_S = 0.05


class GuestPace:
    """Told of every gap between steps and of every piece; says when the next piece may run."""

    def __init__(self) -> None:
        self._gaps_s: deque[float] = deque(maxlen=NUM_GAPS)  # without the guest's part
        self._by_length: list[float] | None = None  # the same; None: nobody asked since the last
        self._pieces_s: deque[float] = deque(maxlen=NUM_PIECES)
        self._time_s = 0.0  # credits
        self._risk = 1.0  # nothing is known of the first piece
        self._guest_s = 0.0  # in the gap that runs
        self._staked = 0.0  # of the risk, in it

    def stepped(self, gap_s: float) -> None:
        """A step ended, `gap_s` after the one before it, pieces between them included."""
        own_s = max(0.0, gap_s - self._guest_s)
        if self._guest_s and self._knows_gaps:
            has_spoilt = own_s <= self._longest_s < gap_s
            self._risk += self._staked - has_spoilt
        self._gaps_s.append(own_s)
        self._by_length = None
        self._guest_s = self._staked = 0.0
        self._time_s = min(MOST_CREDIT_S, self._time_s + SHARE * gap_s)
        self._risk = min(1.0, self._risk + 1 / RARE)

    def worked(self, seconds: float) -> None:
        """A piece ran between steps."""
        before = self._risk_of(self._guest_s)
        self._guest_s += seconds
        stake = self._risk_of(self._guest_s) - before
        self._staked += stake
        self._risk -= stake
        self._time_s -= seconds
        self.learn(seconds)

    def learn(self, seconds: float) -> None:
        """A piece took so long, with no stream to wait for it."""
        self._pieces_s.append(seconds)

    @property
    def allows_piece(self) -> bool:
        """Whether one may run now, before the next step."""
        if not self._pieces_s:
            return self._risk >= 1.0
        # The second longest of the last: one that the system interrupted counts for nothing.
        piece_s = sorted(self._pieces_s)[-2:][0]
        if self._time_s < min(piece_s, MOST_CREDIT_S):
            return False
        risk = self._risk_of(self._guest_s + piece_s) - self._risk_of(self._guest_s)
        return risk <= max(0.0, self._risk)

    @property
    def _knows_gaps(self) -> bool:
        return len(self._gaps_s) >= FEWEST_GAPS

    @property
    def _ordered_s(self) -> list[float]:
        """The gaps by length. Most engines have no guest most of the time, and nobody asks."""
        if self._by_length is None:
            self._by_length = sorted(self._gaps_s)
        return self._by_length

    @property
    def _longest_s(self) -> float:
        """A longer gap is one that no stream would have without guests."""
        ordered_s = self._ordered_s
        return ROOM * ordered_s[int(0.99 * (len(ordered_s) - 1))] if ordered_s else 0.0

    def _risk_of(self, guest_s: float) -> float:
        """How likely a gap with so much of a guest in it is one of the longest."""
        if guest_s == 0.0:
            return 0.0
        if not self._knows_gaps:
            return 1.0
        num_fitting = bisect_right(self._ordered_s, self._longest_s - guest_s)
        return 1.0 - num_fitting / len(self._ordered_s)
