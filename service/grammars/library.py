"""llguidance: the only file that knows the library. Engine and worker process compile here,
with the same limits, so that what passed in the one passes in the other.

A compiled grammar is a matcher at its beginning, and a copy of it costs 10 us: copies share the
states that the lexer has found. A mask is a function of the grammar and the tokens so far.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark
from numpy.typing import NDArray

from model.grammar_spec import GrammarSpec
from model.tokenizer import Tokenizer
from service.grammars import GrammarError

# Several times what schemas of a few hundred fields need (loadtests/NOTES.md). The first one
# does not bound all of a compilation: for that there is the worker process.
LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=50_000,  # some ms of a mask
    step_max_items=5_000,  # tens of ms of a mask, or of taking a token, at the very worst
    max_lexer_states=30_000,  # about 60 MB a grammar
    max_grammar_size=50_000,
    verbose_errors=False,  # or they hold the parser's whole state
)
# Where the grammar leaves no choice, the library would allow the one token that the tokenizer
# gives for it, which need not even be that text: "<|endoftext|>" spelt out, or a space that
# SentencePiece puts before it. Without this, every token that fits is allowed.
_NO_FORCING = '\n%llguidance {"no_forcing": true}\n'
JSON_OPTIONS = {
    # One space, or a line break and an indent. Without a bound a model can fill max_tokens
    # with white space.
    "whitespace_pattern": r" |\n[ \t]{0,16}",
    # One spelling for each string: "a" and "\u0061" are the same member name to whoever reads
    # the text, and two to the grammar. Control characters other than these are left out.
    "json_allowed_escapes": '"\\bfnrt',
    "lenient": False,  # what is not enforced is refused
    "coerce_one_of": False,
}
# One request may hold up the steps of all others by so much. A text of 1,000 tokens takes 0.02 s
# in a common schema.
TEXT_CPU_S = 5.0
NO_TEXT = "no text fits it, or none that can be spelt with this model's tokens"
_MAX_MESSAGE_CHARS = 300
_PLACE = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")
_EXCERPT = re.compile(r"\n +\d+ \| .*", re.DOTALL)  # of the grammar, at the end of an error
_WORD_BITS = 32  # of a mask (model/token_mask.py)
_TEMPERATURE = re.compile(r"^\s*[?!]*\w+\s*\[[^\]]*\btemperature\b", re.MULTILINE)


class LibraryMatcher:
    """A `TextMatcher`."""

    __slots__ = ("_cpu_s", "_matcher", "_tokens", "error", "num_words")

    def __init__(self, matcher: LLMatcher, tokens: NDArray[np.int32]) -> None:
        self._matcher = matcher
        self._tokens = tokens
        self._cpu_s = 0.0
        self.num_words = len(tokens)
        self.error: str | None = None

    @property
    def is_complete(self) -> bool:
        return self.error is None and bool(self._matcher.is_stopped())

    def fill(self, words: NDArray[np.int32]) -> None:
        words.fill(0)
        if self.error is not None:
            return
        began = time.thread_time()
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._book(began)
        words &= self._tokens  # a Lark grammar may name a row that is no token by its number
        if self.error is None and not words.any():
            self.error = NO_TEXT
        if self.error is not None:
            words.fill(0)

    def advance(self, token_ids: Sequence[int]) -> None:
        if self.error is not None:
            return
        began = time.thread_time()
        self._matcher.consume_tokens(list(token_ids))
        self._book(began)

    def _book(self, began: float) -> None:
        """What the library's call had to say, and what it took."""
        self._cpu_s += time.thread_time() - began
        if self._matcher.is_error():
            self.error = _message(self._matcher.get_error())
        elif self._cpu_s > TEXT_CPU_S:
            self.error = f"it took more than {TEXT_CPU_S:g} s of processor time"


class CompiledGrammar:
    """A grammar that compiled, and has at least one token to begin with."""

    __slots__ = ("_beginning", "_tokens")

    def __init__(self, beginning: LLMatcher, tokens: NDArray[np.int32]) -> None:
        self._beginning = beginning
        self._tokens = tokens

    def begin(self, token_ids: Sequence[int] = ()) -> LibraryMatcher:
        """A matcher of its own, after these tokens."""
        matcher = LibraryMatcher(self._beginning.deep_copy(), self._tokens)
        matcher.advance(token_ids)
        return matcher


class GrammarCompiler:
    """Compiles grammars for one vocabulary. Compiling lets go of the interpreter lock."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """`vocab_size` is the model's, which may have rows that are no token. Takes about
        0.1 s for 50,000 tokens."""
        vocabulary = _Vocabulary(tokenizer, vocab_size, eos_token_ids)
        self._table = LLTokenizer(TokenizerWrapper(vocabulary), eos_token=vocabulary.eos_token_ids)
        self._tokens = _bits(vocabulary.tokens, eos_token_ids)

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        """Raises `GrammarError` for what is wrong, too large, or can have no text."""
        matcher = LLMatcher(self._table, _library_grammar(spec), log_level=0, limits=LIMITS)
        if matcher.is_error():
            words = _message(matcher.get_error())
            # The place is one in the Lark that we put around it.
            raise GrammarError(words if spec.kind == "lark" else _PLACE.sub("", words))
        if warnings := matcher.get_grammar_warnings():
            raise GrammarError(_message("; ".join(warnings)))
        compiled = CompiledGrammar(matcher, self._tokens)
        # The first mask is the dearest, and shows whether there is any text at all.
        beginning = compiled.begin()
        beginning.fill(np.zeros(beginning.num_words, np.int32))
        if beginning.error is not None:
            raise GrammarError(beginning.error)
        return compiled


class _Vocabulary:
    """What the library asks of a tokenizer. Tokens come in the middle of a text: the prompt's
    is before them."""

    # It is asked for the tokens of a text, too, but uses them only for what is switched off.

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        # Rows that are no token have no bytes. The library wants an end of text: for a model
        # without one, a row beyond the vocabulary.
        self.tokens = [tokenizer.token_bytes(token_id) or b"" for token_id in range(vocab_size)]
        if not eos_token_ids:
            self.tokens.append(b"")
        self.eos_token_ids = list(eos_token_ids) or [vocab_size]
        self.eos_token_id = self.eos_token_ids[0]
        self.special_token_ids = sorted(tokenizer.special_ids.union(self.eos_token_ids))
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def _bits(tokens: Sequence[bytes], eos_token_ids: Sequence[int]) -> NDArray[np.int32]:
    """A mask of all rows of the model's vocabulary that are tokens."""
    flags = np.zeros(-(-len(tokens) // _WORD_BITS) * _WORD_BITS, np.bool_)
    flags[: len(tokens)] = [bool(token) for token in tokens]
    flags[list(eos_token_ids)] = True
    return np.packbits(flags, bitorder="little").view(np.int32)


def _library_grammar(spec: GrammarSpec) -> str:
    match spec.kind:
        case "regex":
            text = f"start: /{regex_to_lark(spec.text, '')}/"
        case "json_schema":
            schema = json.loads(spec.text) | {"x-guidance": JSON_OPTIONS}
            text = f"start: %json {json.dumps(schema)}"
        case "lark":
            if spec.text.lstrip().startswith("{"):  # the library would take it for its own JSON
                raise GrammarError("a Lark grammar does not begin with '{'")
            if _TEMPERATURE.search(spec.text):  # the library leaves that to whoever samples
                raise GrammarError("a rule's temperature is not supported; the request's is")
            text = spec.text
    return LLMatcher.grammar_from_lark(text + _NO_FORCING)


def _message(text: str) -> str:
    """What the library says, short and on one line."""
    if text.startswith("NoExtension"):
        return NO_TEXT
    line = " ".join(_EXCERPT.sub("", text).replace("<non-verbose/>", "").split())
    return line if len(line) <= _MAX_MESSAGE_CHARS else line[:_MAX_MESSAGE_CHARS] + "..."
