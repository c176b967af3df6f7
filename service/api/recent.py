"""The tokens of recent requests, so that they can be explained by their id: of each API key its
last ones, running and ended. Bounded in requests for each key, and in tokens for each of them."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

RequestKey = tuple[str | None, str]  # owner, request id

MAX_REQUESTS = 64  # of one key


class TokenLog:
    """Prompt and output of one continuation, as far as they came. What is too long to be
    explained is only counted."""

    __slots__ = ("_ids", "_max_tokens", "num_tokens")

    def __init__(self, prompt_token_ids: Sequence[int], max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._ids = array("i")
        self.num_tokens = 0
        self.extend(prompt_token_ids)

    def extend(self, token_ids: Sequence[int]) -> None:
        """These came."""
        self.num_tokens += len(token_ids)
        if self.num_tokens <= self._max_tokens:
            self._ids.extend(token_ids)
        elif self._ids:
            self._ids = array("i")

    @property
    def token_ids(self) -> list[int] | None:
        """All of them; None where they are too many."""
        return list(self._ids) if self.num_tokens <= self._max_tokens else None


class RecentRequests:
    """The last requests of every key; there are as many keys as the server was started with."""

    def __init__(self, max_tokens: int, max_requests: int = MAX_REQUESTS) -> None:
        """`max_tokens` of one continuation with its prompt; 0: nothing is kept."""
        self.max_tokens = max_tokens
        self._max_requests = max_requests
        self._requests: dict[str | None, OrderedDict[str, list[TokenLog]]] = {}

    def add(self, key: RequestKey, prompts: Iterable[Sequence[int]]) -> list[TokenLog]:
        """A request begins: a log for each of its continuations, which have these prompts. An
        earlier one with the same id is forgotten, and so is the oldest where they are many."""
        logs = [TokenLog(prompt, self.max_tokens) for prompt in prompts]
        if self.max_tokens:
            owner, request_id = key
            requests = self._requests.setdefault(owner, OrderedDict())
            requests.pop(request_id, None)
            requests[request_id] = logs
            if len(requests) > self._max_requests:
                requests.popitem(last=False)
        return logs

    def find(self, key: RequestKey) -> list[TokenLog] | None:
        """The logs of a request's continuations; None when it is not kept, or another key's."""
        owner, request_id = key
        requests = self._requests.get(owner)
        return None if requests is None else requests.get(request_id)
