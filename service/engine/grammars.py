"""Sequences that wait for their grammar: compiling runs in a thread beside the steps.

The thread compiles one grammar at a time and lets go of the interpreter lock meanwhile. What
it is given passed in the API's worker process, so it comes to an end. Compiled grammars are
kept, the least recently used go first.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence as Ids
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

from model.grammar_spec import GrammarSpec
from model.tokenizer import Tokenizer
from service.engine.sequence import Sequence
from service.grammars import GrammarError, TextMatcher

if TYPE_CHECKING:
    from service.grammars.library import CompiledGrammar, GrammarCompiler


MAX_KEPT = 32
# More than the worker process has: what was not too deep there is not too deep here.
_STACK_BYTES = 32 * 2**20


class GrammarQueue:
    """Compiles for the sequences it is given, in order."""

    def __init__(self, directory: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        """`directory` holds the tokenizer, which is read for the first grammar."""
        self._directory = directory
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._pending: dict[int, tuple[Sequence, Future[TextMatcher]]] = {}
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._compiler: GrammarCompiler | None = None  # of the thread alone, like the next
        self._kept: OrderedDict[GrammarSpec, CompiledGrammar] = OrderedDict()

    def __len__(self) -> int:
        """Sequences that wait."""
        return len(self._pending)

    def add(self, sequence: Sequence, spec: GrammarSpec) -> None:
        """Queue a sequence; `take_ready` gives it back with its matcher."""
        output = sequence.token_ids[sequence.num_prompt :]
        stack_bytes = threading.stack_size(_STACK_BYTES)  # the first submit starts the thread
        future = self._thread.submit(self._make_matcher, spec, output)
        threading.stack_size(stack_bytes)
        self._pending[sequence.id] = (sequence, future)

    def remove(self, sequence_id: int) -> bool:
        """Forget a sequence; False when it does not wait here."""
        waiting = self._pending.pop(sequence_id, None)
        if waiting is None:
            return False
        waiting[1].cancel()
        return True

    def take_ready(self, wait_s: float) -> list[tuple[Sequence, TextMatcher | Exception]]:
        """The sequences whose grammars are compiled, or why one is not. Waits for the first
        of them, at most `wait_s`."""
        if not self._pending:
            return []
        futures = [future for _, future in self._pending.values()]
        done, _ = wait(futures, wait_s, FIRST_COMPLETED)
        ready: list[tuple[Sequence, TextMatcher | Exception]] = []
        for sequence, future in [pair for pair in self._pending.values() if pair[1] in done]:
            del self._pending[sequence.id]
            error = future.exception()
            if error is not None and not isinstance(error, Exception):
                raise error
            ready.append((sequence, future.result() if error is None else error))
        return ready

    def give_up(self, spec: GrammarSpec) -> None:
        """A text failed in this grammar: its states, which texts share, may have come to their
        limit. The next text begins with new ones."""
        self._thread.submit(self._kept.pop, spec, None)

    def _make_matcher(self, spec: GrammarSpec, output_token_ids: Ids[int]) -> TextMatcher:
        """In the thread: the grammar's matcher after these tokens. Raises `GrammarError`."""
        if self._compiler is None:
            from service.grammars.library import GrammarCompiler

            tokenizer = Tokenizer.from_directory(self._directory)
            self._compiler = GrammarCompiler(tokenizer, self._vocab_size, self._eos_token_ids)
        compiled = self._kept.pop(spec, None) or self._compiler.compile(spec)
        self._kept[spec] = compiled
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        matcher = compiled.begin(output_token_ids)
        if matcher.error is not None:
            raise GrammarError(matcher.error)
        return matcher
