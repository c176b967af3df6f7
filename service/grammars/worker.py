"""The process that tries grammars out: a hostile one may take all of its time or memory.

    python -m service.grammars.worker

Lines of JSON: it takes a `WorkerConfig`, answers `null` when it is ready, and then for every
`GrammarSpec` `null` when the engine can compile it, or the reason why not. One that takes too
long or too much ends the process: the system counts, nothing in here has to stay responsive.
"""

from __future__ import annotations

import resource
import signal
import sys
from pathlib import Path

import msgspec

from model.grammar_spec import GrammarSpec
from model.tokenizer import Tokenizer
from service.grammars import GrammarError
from service.grammars.library import GrammarCompiler

# What was not too deep for this stack is not too deep for the engine's thread, which has more.
STACK_BYTES = 8 * 2**20


class WorkerConfig(msgspec.Struct, frozen=True):
    """The first line."""

    directory: str  # of the tokenizer
    vocab_size: int
    eos_token_ids: list[int]
    cpu_s: float  # for one grammar
    memory_bytes: int  # of data, for everything


def main() -> None:
    """Answer until standard input closes."""
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=WorkerConfig)
    _lower(resource.RLIMIT_STACK, STACK_BYTES)
    tokenizer = Tokenizer.from_directory(Path(config.directory))
    compiler = GrammarCompiler(tokenizer, config.vocab_size, config.eos_token_ids)
    _lower(resource.RLIMIT_DATA, config.memory_bytes)
    _lower(resource.RLIMIT_CORE, 0)
    _answer(None)
    while line := sys.stdin.buffer.readline():
        spec = msgspec.json.decode(line, type=GrammarSpec)
        # Nobody handles the signal: it ends the process.
        signal.setitimer(signal.ITIMER_PROF, config.cpu_s)
        reason = None
        try:
            compiler.compile(spec)
        except GrammarError as error:
            reason = str(error)
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        _answer(reason)


def _answer(reason: str | None) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(reason) + b"\n")
    sys.stdout.buffer.flush()


def _lower(limit: int, value: int) -> None:
    _, hard = resource.getrlimit(limit)
    ceiling = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (ceiling, hard))


if __name__ == "__main__":
    main()
