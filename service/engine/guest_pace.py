"""When a guest's piece of work may lie between two steps that streams wait for.

A guest is work that nobody streams: an explanation. Beside running streams it may neither take
their throughput nor make the longest of their gaps longer. Both are held by measured times:

- a credit: SHARE of the time that passes is the guest's, so streams lose that much at most;
- the fit: a piece goes in only when the step that comes, with the piece before it, stays within
  ROOM times the 99th percentile of the gaps as they are without guests.

Where gaps are so even that no piece ever fits, one goes in every RARE gaps: too few for the 99th
percentile to move, and the guest still gets to its end.
"""

from __future__ import annotations

from collections import deque
from statistics import median

SHARE = 0.05
ROOM = 1.05
RARE = 256
NUM_GAPS = 128
NUM_STEPS = 16  # what the next step will take is the median of so many
NUM_PIECES = 8
FEWEST_GAPS = 32  # fewer say nothing of a 99th percentile
MOST_CREDIT_S = 0.05


class GuestPace:
    """Told of every gap between steps and of every piece; says when the next piece may run."""

    def __init__(self) -> None:
        self._gaps_s: deque[float] = deque(maxlen=NUM_GAPS)  # without the guest's part
        self._pieces_s: deque[float] = deque(maxlen=NUM_PIECES)
        self._credit_s = 0.0
        self._guest_s = 0.0  # in the gap that runs
        self._since_misfit = 0  # gaps

    def stepped(self, gap_s: float) -> None:
        """A step ended, `gap_s` after the one before it, pieces between them included."""
        self._gaps_s.append(max(0.0, gap_s - self._guest_s))
        self._guest_s = 0.0
        self._since_misfit += 1
        self._credit_s = min(MOST_CREDIT_S, self._credit_s + SHARE * gap_s)

    def worked(self, seconds: float) -> None:
        """A piece ran between steps."""
        self._guest_s += seconds
        self.learn(seconds)
        if not self._fits(0.0):
            self._since_misfit = 0
        self._credit_s -= seconds

    def learn(self, seconds: float) -> None:
        """A piece took so long, with no stream to wait for it."""
        self._pieces_s.append(seconds)

    @property
    def allows_piece(self) -> bool:
        """Whether one may run now, before the next step."""
        piece_s = self._next_piece_s
        if self._credit_s < piece_s:
            return False
        return self._since_misfit >= RARE or (bool(self._pieces_s) and self._fits(piece_s))

    @property
    def _next_piece_s(self) -> float:
        """The second longest of the last: one that the system interrupted counts for nothing."""
        longest = sorted(self._pieces_s)
        return longest[-2] if len(longest) > 1 else sum(longest)

    def _fits(self, piece_s: float) -> bool:
        if len(self._gaps_s) < FEWEST_GAPS:
            return False
        ordered = sorted(self._gaps_s)
        longest = ordered[int(0.99 * (len(ordered) - 1))]
        step_s = median(list(self._gaps_s)[-NUM_STEPS:])
        return step_s + self._guest_s + piece_s <= ROOM * longest
