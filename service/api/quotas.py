"""What one API key may have at a time, so that no caller takes the machine from the others.

Tokens are counted in a bucket for each key: it holds a minute's worth and fills evenly. A request
is charged for all that it may take, its prompt and n times max_tokens, when it is admitted; when
it ends, by whatever way, what the engine did not generate goes back. So a key can never owe, and
the wait that a 429 tells is exact: requests that end earlier only make it shorter.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from service.api.errors import ProblemError, retry_after
from service.backlog import DrainRate

Clock = Callable[[], float]


class TokenBucket:
    """Tokens that flow in evenly, up to a minute's worth."""

    def __init__(self, tokens_per_minute: int, clock: Clock = time.monotonic) -> None:
        self.capacity = float(tokens_per_minute)
        self._per_s = tokens_per_minute / 60
        self._level = self.capacity
        self._clock = clock
        self._as_of_s = clock()

    def take(self, amount: int) -> float:
        """0 when `amount` was taken; else nothing was, and in so many seconds it will be there.
        An amount over the capacity never is."""
        level = self._flow()
        if amount <= level:
            self._level -= amount
            return 0.0
        return (amount - level) / self._per_s

    def give_back(self, amount: int) -> None:
        """Tokens that were taken and not used."""
        self._level = min(self.capacity, self._flow() + amount)

    def _flow(self) -> float:
        now_s = self._clock()
        self._level = min(self.capacity, self._level + (now_s - self._as_of_s) * self._per_s)
        self._as_of_s = now_s
        return self._level


@dataclass(slots=True)
class Charge:
    """What a request was charged; `settle` it once, when it ends."""

    account: _Account
    num_tokens: int
    is_open: bool = True

    def settle(self, num_used: int) -> None:
        """Give back what was not used. A second time does nothing."""
        if self.is_open:
            self.is_open = False
            self.account.settle(self.num_tokens - min(num_used, self.num_tokens))


class KeyQuotas:
    """The limits of every key, and what each has of them. None: without that limit."""

    def __init__(
        self,
        max_requests: int | None,
        max_tokens_per_minute: int | None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._max_requests = max_requests
        self._max_tokens_per_minute = max_tokens_per_minute
        self._clock = clock
        self._accounts: dict[str, _Account] = {}  # as many as there are keys

    def take(self, key_name: str, num_tokens: int) -> Charge:
        """Charge a request to a key. Raises `ProblemError`: 422 for what no minute of this key
        holds, 429 with the time to wait for what it cannot have now."""
        account = self._accounts.get(key_name)
        if account is None:
            account = _Account(self._max_requests, self._max_tokens_per_minute, self._clock)
            self._accounts[key_name] = account
        account.take(key_name, num_tokens)
        return Charge(account, num_tokens)


class _Account:
    """One key's requests and tokens."""

    def __init__(self, max_requests: int | None, tokens_per_minute: int | None, clock: Clock):
        self._max_requests = max_requests
        self._bucket = None if tokens_per_minute is None else TokenBucket(tokens_per_minute, clock)
        self._num_running = 0
        self._ends = DrainRate(clock)

    def take(self, name: str, num_tokens: int) -> None:
        if self._bucket is not None and num_tokens > self._bucket.capacity:
            raise ProblemError(
                "never-fits",
                422,
                f"prompt and max_tokens are {num_tokens} tokens; key {name!r} may take "
                f"{self._bucket.capacity:.0f} a minute",
                field="max_tokens",
            )
        if self._max_requests is not None and self._num_running >= self._max_requests:
            raise ProblemError(
                "key-concurrency",
                429,
                f"key {name!r} has {self._num_running} requests in flight; its limit is "
                f"{self._max_requests}",
                headers=retry_after(self._ends.time_for(1)),
            )
        wait_s = 0.0 if self._bucket is None else self._bucket.take(num_tokens)
        if wait_s > 0 and self._bucket is not None:
            raise ProblemError(
                "key-rate",
                429,
                f"prompt and max_tokens are {num_tokens} tokens; key {name!r} may take "
                f"{self._bucket.capacity:.0f} a minute and has used too many: again in "
                f"{wait_s:.1f} s",
                headers=retry_after(wait_s),
            )
        if self._num_running == 0:
            self._ends.begin()
        self._num_running += 1

    def settle(self, num_unused: int) -> None:
        self._num_running -= 1
        self._ends.ended()
        if self._bucket is not None:
            self._bucket.give_back(num_unused)
