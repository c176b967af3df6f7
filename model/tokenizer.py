"""Text to token ids and back; no torch here, the API process reads it too.

Encoding is the `tokenizers` library's. Decoding is ours: every token is a fixed string of
bytes (token_bytes.py), so text is given out token by token at a constant cost, however long
the answer has become, and a character only when all of its bytes are there.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from model.token_bytes import ByteRules, DecoderUnsupportedError, byte_rules

GPT2_END_OF_TEXT = "<|endoftext|>"
_LONGEST_CHARACTER_BYTES = 4


class TokenizerError(ValueError):
    """The tokenizer's files are missing or broken, or a text cannot be encoded."""


class Tokenizer:
    """One model's tokenizer. Safe to use from several threads."""

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any] | None = None) -> None:
        """`config` is tokenizer_config.json: `bos_token`, `eos_token`, `add_bos_token` count.

        Raises `TokenizerError` when the decoder is of a kind that cannot be streamed, or
        `config` contradicts the vocabulary.
        """
        config = config or {}
        self._backend = backend
        # Limits left in the file by whoever trained it would silently cut prompts.
        backend.no_truncation()
        backend.no_padding()
        self.special_ids = frozenset(
            token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special
        )
        try:
            # The library shows a decoder's parameters in its pickled state alone, which is JSON.
            state = None if backend.decoder is None else backend.decoder.__getstate__()
            self.rules: ByteRules = byte_rules(None if state is None else json.loads(state))
        except (DecoderUnsupportedError, KeyError) as error:
            raise TokenizerError(f"tokenizer.json: {error}") from error
        self._longest_token_chars = _longest_token_chars(backend, self.rules)
        self._bytes: dict[int, bytes] = {}
        self._shown = _MiddleBytes(self, hidden=frozenset())
        self._shown_plain = _MiddleBytes(self, hidden=self.special_ids)
        self._texts: dict[int, str] = {}
        self.bos_id = self._special_id(config, "bos_token")
        self.eos_id = self._special_id(config, "eos_token")
        self._prepend_bos, self._drop_bos = self._bos_policy(config.get("add_bos_token"))

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Open tokenizer.json, or GPT-2's vocab.json and merges.txt, with tokenizer_config.json
        beside it if there is one.

        Raises `TokenizerError` when neither is there or a file is broken.
        """
        directory = Path(path)
        config = _read_config(directory / "tokenizer_config.json")
        if (directory / "tokenizer.json").is_file():
            return cls(_open_tokenizer_json(directory / "tokenizer.json"), config)
        vocab, merges = directory / "vocab.json", directory / "merges.txt"
        if vocab.is_file() and merges.is_file():
            return cls(_open_gpt2(vocab, merges), config)
        raise TokenizerError(
            f"{directory.name}: there is neither a tokenizer.json nor vocab.json with merges.txt"
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; they begin with BOS if the tokenizer's files say so.

        Raises `TokenizerError` when `text` is no valid Unicode (lone surrogates).
        """
        _check_text(text)
        # Only the batch calls let go of the interpreter lock: with the plain one, a long prompt
        # stalls every stream. The fast one leaves out the offsets.
        encoding = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding[0].ids
        if add_special_tokens:
            ids = ids[self._drop_bos :]
            if self._prepend_bos and self.bos_id is not None:
                ids.insert(0, self.bos_id)
        return ids

    def encode_with_offsets(
        self, text: str, *, add_special_tokens: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and for each the (start, end) characters of `text` that it stands for.

        Tokens that hold parts of one character share its offsets; an added special token has
        (0, 0). Raises `TokenizerError` as `encode` does.
        """
        _check_text(text)
        encoding = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding[0].ids
        offsets: list[tuple[int, int]] = encoding[0].offsets
        if add_special_tokens:
            ids, offsets = ids[self._drop_bos :], offsets[self._drop_bos :]
            if self._prepend_bos and self.bos_id is not None:
                ids.insert(0, self.bos_id)
                offsets.insert(0, (0, 0))
        return ids, offsets

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Bytes that make no character become U+FFFD; an id that is in no
        vocabulary has no text."""
        decoder = IncrementalDecoder(self, skip_special_tokens=skip_special_tokens)
        return decoder.push(ids) + decoder.flush()

    def token_text(self, token_id: int) -> str:
        """One token on its own, special ones too, as it is in the middle of a text; what is only
        a part of a character shows as U+FFFD."""
        text = self._texts.get(token_id)
        if text is None:
            data = self.token_bytes(token_id)
            if data is None:
                return ""
            text = self._texts[token_id] = data.decode("utf-8", self.rules.errors)
        return text

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes that a token adds in the middle of a text; None if there is no such token."""
        data = self._bytes.get(token_id)
        if data is None:
            token = self._token(token_id)
            if token is None:
                return None
            data = self._bytes[token_id] = self.rules.token(token)
        return data

    def middle_bytes(self, *, skip_special_tokens: bool) -> Mapping[int, bytes]:
        """The bytes of every token in the middle of a text; none for a special one that is to be
        skipped, and for an id that is no token."""
        return self._shown_plain if skip_special_tokens else self._shown

    def first_token_bytes(self, token_id: int) -> bytes | None:
        """The bytes that a token adds at the start of a text; None if there is no such token."""
        token = self._token(token_id)
        return None if token is None else self.rules.first_token(token)

    def fewest_tokens(self, text: str) -> int:
        """Fewer tokens than this `text` cannot have; 0 when nothing is known. Costs nothing, so
        that a text far over the limits is refused without tokenizing it."""
        if self._longest_token_chars is None:
            return 0
        return -(-len(text) // self._longest_token_chars)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def _token(self, token_id: int) -> str | None:
        if not 0 <= token_id < 2**32:  # the library's integers; no token is beyond
            return None
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def _special_id(self, config: dict[str, Any], name: str) -> int | None:
        """The id of a token that tokenizer_config.json names as a string or as {"content"}."""
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if content is None:
            return None
        if not isinstance(content, str):
            raise TokenizerError(f"tokenizer_config.json: {name} is {content!r}, not a string")
        found: int | None = self._backend.token_to_id(content)
        return found

    def _bos_policy(self, wanted: object) -> tuple[bool, int]:
        """Whether to put BOS before what the post-processor gives, and how many ids of that to
        drop, so that `add_bos_token` holds whatever the post-processor does."""
        if wanted is None:
            return False, 0
        if not isinstance(wanted, bool):
            raise TokenizerError(f"tokenizer_config.json: add_bos_token is {wanted!r}, not a bool")
        if self.bos_id is None:
            if wanted:
                raise TokenizerError(
                    "tokenizer_config.json: add_bos_token is true, but bos_token is not in the "
                    "vocabulary"
                )
            return False, 0
        adds_bos = self._backend.encode("").ids[:1] == [self.bos_id]
        return wanted and not adds_bos, int(adds_bos and not wanted)


class _MiddleBytes(dict[int, bytes]):
    """See `Tokenizer.middle_bytes`; a token is looked up when it is wanted first."""

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int]) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._hidden = hidden

    def __missing__(self, token_id: int) -> bytes:
        data = None if token_id in self._hidden else self._tokenizer.token_bytes(token_id)
        if data is None:
            return b""  # and not kept: of ids that are no token there is no end
        self[token_id] = data
        return data


class IncrementalDecoder:
    """Token ids in, newly complete text out, at a constant cost per token.

    What `push` returns and what `flush` returns concatenate to exactly `decode` of all ids,
    however they were cut into calls. With `context_ids`, the ids go on from those: `decode` of
    context and ids is the context's text and then the pieces, where a character that the
    context began comes whole in the pieces.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        context_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        rules = tokenizer.rules
        self._tokenizer = tokenizer
        self._hidden: frozenset[int] = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._middle_bytes = tokenizer.middle_bytes(skip_special_tokens=skip_special_tokens)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(rules.errors)
        self._before_first_token = True
        self._strip_char = rules.strip_char
        self._strip_left = rules.strip_start
        if context_ids:
            self._read_context(context_ids)

    def push(self, token_ids: Iterable[int]) -> str:
        """Text that these ids make complete."""
        ids = iter(token_ids)
        data = self._first_bytes(ids) if self._before_first_token else b""
        data += b"".join(map(self._middle_bytes.__getitem__, ids))
        return self._strip(self._utf8.decode(data)) if data else ""

    def _first_bytes(self, ids: Iterator[int]) -> bytes:
        """Those of the text's first token, if it is among `ids`, of which it takes as many."""
        for token_id in ids:
            if token_id not in self._hidden:
                data = self._tokenizer.first_token_bytes(token_id)
                if data is not None:
                    self._before_first_token = False
                    return data
        return b""

    @property
    def is_within_character(self) -> bool:
        """Whether the ids so far end in a part of a character."""
        return bool(self._utf8.getstate()[0])

    def flush(self) -> str:
        """The rest at the end: bytes that never became a character, as U+FFFD."""
        return self._strip(self._utf8.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        """Leave out what the rules leave out at the start of a text."""
        while self._strip_left and text:
            if not text.startswith(self._strip_char):
                self._strip_left = 0
                break
            text = text[len(self._strip_char) :]
            self._strip_left -= 1
        return text

    def _read_context(self, ids: Sequence[int]) -> None:
        """Take the state that the context leaves behind, from its two ends: the first tokens
        settle what is special at the start, the last bytes may have begun a character."""
        read = 0
        while read < len(ids) and (self._before_first_token or self._strip_left):
            self.push(ids[read : read + 1])
            read += 1
        tail, num_bytes = len(ids), 0
        while tail > read and num_bytes < _LONGEST_CHARACTER_BYTES:
            tail -= 1
            if ids[tail] not in self._hidden:
                num_bytes += len(self._tokenizer.token_bytes(ids[tail]) or b"")
        self.push(ids[tail:])


def _longest_token_chars(backend: tokenizers.Tokenizer, rules: ByteRules) -> int | None:
    """Characters of the longest token where every character becomes at least a byte of one."""
    if not rules.byte_level or backend.normalizer is not None:
        return None
    return max((len(token) for token in backend.get_vocab(with_added_tokens=True)), default=None)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text is no valid Unicode: a lone surrogate at character {error.start}"
        ) from error


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{path.name} is no JSON object")
    return config


def _open_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path.name} cannot be read: {error}") from error
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"{path.name} is broken: {error}") from error


def _open_gpt2(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    """Byte-level BPE as GPT-2 set it up: no space put before the text, no post-processor."""
    try:
        model = models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"{vocab.name} and {merges.name} are broken: {error}") from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id(GPT2_END_OF_TEXT) is not None:
        backend.add_special_tokens([GPT2_END_OF_TEXT])
    return backend
