"""The tokenizer: what goes in comes out, piece by piece as well as at once."""

from __future__ import annotations

import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from model.tokenizer import IncrementalDecoder, Tokenizer, TokenizerError

CORPUS = [
    "Once upon a time there was a little glass case. The case was full of light.",
    "naïve café, größer, 東京は静か, Привет мир, \U0001f600 smiles \U0001f469\u200d\U0001f4bb",
    "def f(x):\n\treturn  x + 1\r\n",
] * 3
BOS = "<s>"


@cache
def byte_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["two words", "京"])  # added, not special, outside the byte alphabet
    return backend


@cache
def llama_like() -> tokenizers.Tokenizer:
    """SentencePiece as Llama 2's tokenizer.json has it: a space prepended, byte fallback."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    specials = ["<unk>", BOS, "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, show_progress=False, limit_alphabet=40
    )
    backend.train_from_iterator(CORPUS, trainer)
    data = json.loads(backend.to_str())
    vocab = data["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    data["model"]["byte_fallback"] = True
    backend = tokenizers.Tokenizer.from_str(json.dumps(data))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return backend


@cache
def metaspace() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(llama_like().to_str())
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    )
    return backend


@cache
def words() -> tokenizers.Tokenizer:
    """No decoder at all: the library joins the tokens with spaces."""
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


KINDS = {
    "byte_level": byte_level,
    "llama_like": llama_like,
    "metaspace": metaspace,
    "words": words,
}


@cache
def tokenizer(kind: str) -> Tokenizer:
    return Tokenizer(KINDS[kind]())


kinds = st.sampled_from(sorted(KINDS))
texts = st.text(max_size=60) | st.lists(
    st.sampled_from(["Once upon", " a time", "東京", "\U0001f600", " ", "\n", "é"])
).map("".join)


@st.composite
def kind_and_ids(draw: st.DrawFn, max_size: int = 40) -> tuple[str, list[int]]:
    kind = draw(kinds)
    # A few ids beyond the vocabulary: models have padded embeddings.
    token_id = st.integers(0, tokenizer(kind).vocab_size + 3)
    ids = st.lists(token_id, max_size=max_size) | texts.map(tokenizer(kind).encode)
    return kind, draw(ids)


def pieces(decoder: IncrementalDecoder, ids: list[int], cuts: list[int]) -> list[str]:
    """Push `ids` in chunks whose lengths are `cuts`, then flush."""
    given_out = []
    at = 0
    for size in [*cuts, len(ids)]:
        given_out.append(decoder.push(ids[at : at + size]))
        at += size
    return [*given_out, decoder.flush()]


@given(kind_and_ids(), st.lists(st.integers(0, 5), max_size=60))
def test_pieces_concatenate_to_the_whole(case: tuple[str, list[int]], cuts: list[int]) -> None:
    kind, ids = case
    decoder = IncrementalDecoder(tokenizer(kind))
    assert "".join(pieces(decoder, ids, cuts)) == tokenizer(kind).decode(ids)


@given(kind_and_ids())
def test_only_complete_characters_are_given_out(case: tuple[str, list[int]]) -> None:
    """What is out is never taken back: it is a prefix of every later decode."""
    kind, ids = case
    decoder = IncrementalDecoder(tokenizer(kind))
    out = ""
    for place, token_id in enumerate(ids):
        out += decoder.push([token_id])
        assert tokenizer(kind).decode(ids[: place + 1]).startswith(out)
        assert tokenizer(kind).decode(ids).startswith(out)


@given(kind_and_ids(), st.data())
def test_a_continuation_goes_on_from_its_context(
    case: tuple[str, list[int]], data: st.DataObject
) -> None:
    kind, ids = case
    cut = data.draw(st.integers(0, len(ids)))
    whole = IncrementalDecoder(tokenizer(kind))
    before = whole.push(ids[:cut])
    continuation = IncrementalDecoder(tokenizer(kind), context_ids=ids[:cut])
    after = continuation.push(ids[cut:]) + continuation.flush()
    assert before + after == tokenizer(kind).decode(ids)


@pytest.mark.parametrize("skip_special_tokens", [True, False])
@given(data=st.data())
def test_decodes_as_the_library_does(skip_special_tokens: bool, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["byte_level", "words"]))
    ids = data.draw(st.lists(st.integers(0, tokenizer(kind).vocab_size + 3), max_size=40))
    expected = KINDS[kind]().decode(ids, skip_special_tokens=skip_special_tokens)
    assert tokenizer(kind).decode(ids, skip_special_tokens=skip_special_tokens) == expected


@given(st.sampled_from(["llama_like", "metaspace"]), texts)
def test_decodes_byte_fallback_as_the_library_does(kind: str, text: str) -> None:
    """On texts. On runs of bytes that are no UTF-8, the library replaces the characters in them
    as well; we keep those, as SentencePiece does, for they were sent already."""
    ids = tokenizer(kind).encode(text)
    assert tokenizer(kind).decode(ids) == KINDS[kind]().decode(ids)


def test_a_run_of_fallback_bytes_keeps_its_characters() -> None:
    encode_byte = [llama_like().token_to_id(f"<0x{b:02X}>") for b in "é".encode() + b"\xe2\x82"]
    assert tokenizer("llama_like").decode(encode_byte) == "é\ufffd\ufffd"


@pytest.mark.parametrize("kind", ["byte_level", "llama_like"])
@given(text=texts)
def test_text_comes_back(kind: str, text: str) -> None:
    if "<|endoftext|>" in text or "▁" in text:
        return
    ids = tokenizer(kind).encode(text)
    if llama_like().token_to_id("<unk>") in ids and kind == "llama_like":
        return
    assert tokenizer(kind).decode(ids) == text


def test_the_first_space_depends_on_the_context() -> None:
    for kind in ("llama_like", "metaspace"):
        tok = tokenizer(kind)
        ids = tok.encode("Once upon a time")
        assert IncrementalDecoder(tok).push(ids).startswith("Once")
        bos = KINDS[kind]().token_to_id(BOS)
        # BOS is no text: what follows it is still the start.
        assert IncrementalDecoder(tok, context_ids=[bos]).push(ids).startswith("Once")
        assert IncrementalDecoder(tok, context_ids=ids).push(ids).startswith(" Once")


def test_a_character_begun_by_the_context_is_completed() -> None:
    tok = tokenizer("byte_level")
    alphabet = {bytes(tok.token_bytes(i) or b""): i for i in range(300)}
    euro = [alphabet[bytes([b])] for b in "€".encode()]
    decoder = IncrementalDecoder(tok, context_ids=[*tok.encode("a price of "), *euro[:2]])
    assert decoder.push(euro[2:]) == "€"


def test_cost_does_not_grow_with_the_length() -> None:
    tok = tokenizer("byte_level")
    ids = tok.encode("Once upon a time there was a little glass case. ") * 400

    def seconds_for(decoder: IncrementalDecoder) -> float:
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            for token_id in ids[:500]:
                decoder.push([token_id])
            best = min(best, time.perf_counter() - start)
        return best

    fresh, long_run = IncrementalDecoder(tok), IncrementalDecoder(tok)
    for _ in range(10):
        long_run.push(ids)
    assert seconds_for(long_run) < 5 * seconds_for(fresh) + 0.001


@given(kinds, texts)
def test_offsets_lie_in_the_text_in_order(kind: str, text: str) -> None:
    ids, offsets = tokenizer(kind).encode_with_offsets(text)
    assert ids == tokenizer(kind).encode(text)
    assert len(ids) == len(offsets)
    starts = [start for start, _ in offsets]
    assert starts == sorted(starts)
    assert all(0 <= start <= end <= len(text) for start, end in offsets)


def test_offsets_count_characters_not_bytes() -> None:
    ids, offsets = tokenizer("byte_level").encode_with_offsets("東京 \U0001f600!")
    assert offsets[-1] == (4, 5)
    assert {offset for offset in offsets if offset[0] == 0} == {(0, 1)}
    assert len(ids) == len(offsets)


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff"])
def test_a_lone_surrogate_is_a_typed_error(text: str) -> None:
    for method in (tokenizer("byte_level").encode, tokenizer("byte_level").encode_with_offsets):
        with pytest.raises(TokenizerError, match=f"character {len(text) // 2}"):
            method(text)


@given(st.integers(-(2**70), 2**70))
def test_an_id_of_no_token_has_no_text(token_id: int) -> None:
    tok = tokenizer("byte_level")
    if not 0 <= token_id < tok.vocab_size:
        assert tok.decode([token_id]) == tok.token_text(token_id) == ""


def test_token_text_shows_special_tokens_and_parts_of_characters() -> None:
    tok = tokenizer("byte_level")
    assert tok.token_text(0) == "<|endoftext|>"
    assert tok.decode([0]) == ""
    assert tok.decode([0], skip_special_tokens=False) == "<|endoftext|>"
    part = next(i for i in range(300) if tok.token_bytes(i) == b"\xe2")
    assert tok.token_text(part) == "\ufffd"
    space = llama_like().token_to_id("▁")
    assert tokenizer("llama_like").token_text(space) == " "


def save(directory: Path, backend: tokenizers.Tokenizer, config: dict[str, Any] | None) -> Path:
    backend.save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def with_bos_template() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(llama_like().to_str())
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 1)]
    )
    return backend


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("add_bos_token", [True, False, None])
@pytest.mark.parametrize("bos_token", [BOS, {"content": BOS, "lstrip": False}])
def test_bos_is_added_as_the_files_say(
    tmp_path: Path, template: bool, add_bos_token: bool | None, bos_token: object
) -> None:
    config = {"bos_token": bos_token}
    if add_bos_token is not None:
        config["add_bos_token"] = add_bos_token
    backend = with_bos_template() if template else llama_like()
    tok = Tokenizer.from_directory(save(tmp_path, backend, config))
    wanted = template if add_bos_token is None else add_bos_token
    plain = tok.encode("a case", add_special_tokens=False)
    assert tok.bos_id == 1
    assert 1 not in plain
    assert tok.encode("a case") == ([1, *plain] if wanted else plain)
    ids, offsets = tok.encode_with_offsets("a case")
    assert ids == tok.encode("a case")
    assert len(offsets) == len(ids)


def test_truncation_left_in_the_file_does_not_cut_prompts(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(byte_level().to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    tok = Tokenizer.from_directory(save(tmp_path, backend, None))
    text = "Once upon a time there was a little glass case."
    assert tok.decode(tok.encode(text)) == text


def write_gpt2(directory: Path) -> None:
    # Not `byte_level().model.save`: the added tokens stay out, as in GPT-2's own files.
    model = json.loads(byte_level().to_str())["model"]
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (directory / "merges.txt").write_text("#version: 0.2\n" + merges + "\n", encoding="utf-8")


def test_gpt2_files(tmp_path: Path) -> None:
    write_gpt2(tmp_path)
    tok = Tokenizer.from_directory(tmp_path)
    text = "Once upon a time<|endoftext|> \U0001f600 é"
    assert tok.encode(text)[len(tok.encode("Once upon a time"))] == 0
    assert tok.decode(tok.encode(text), skip_special_tokens=False) == text
    assert tok.decode(tok.encode(text)) == text.replace("<|endoftext|>", "")
    reference = byte_level().encode("a little naïve case").ids
    assert tok.encode("a little naïve case") == reference


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="neither") as caught:
        Tokenizer.from_directory(tmp_path)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b'{"model": '),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"\xff\xfe"),
        ("vocab.json", b"{"),
        ("vocab.json", b"[1]"),
        ("merges.txt", b"one two three four\n"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"[" * 100_000),
        ("tokenizer_config.json", b'{"add_bos_token": "yes"}'),
        ("tokenizer_config.json", b'{"add_bos_token": true}'),
        ("tokenizer_config.json", b'{"bos_token": 7}'),
    ],
)
def test_broken_files_are_typed_errors(tmp_path: Path, name: str, content: bytes) -> None:
    write_gpt2(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.CTC(),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.Replace(tokenizers.Regex("x+"), " "), decoders.Fuse()]),
        decoders.Sequence([decoders.ByteLevel(), decoders.ByteFallback()]),
    ],
)
def test_a_decoder_without_rules_is_refused_by_name(decoder: Any) -> None:
    backend = tokenizers.Tokenizer.from_str(byte_level().to_str())
    backend.decoder = decoder
    with pytest.raises(TokenizerError, match="decoder"):
        Tokenizer(backend)
