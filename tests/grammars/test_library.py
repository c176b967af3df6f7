"""The library behind its door: what is allowed token by token, what is refused, and why."""

from __future__ import annotations

import json
import random
import re
from functools import cache

import numpy as np
import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from model.checkpoint_files import bundled_checkpoint
from model.grammar_spec import GrammarSpec
from model.token_bytes import _byte_alphabet
from model.tokenizer import Tokenizer
from service.grammars import GrammarError, library
from service.grammars.library import CompiledGrammar, GrammarCompiler, LibraryMatcher

VOCAB_SIZE = 4096
PADDED = 4200
EOS = 0


# Every combination would have to be written out: 3 ** 8 objects.
PRODUCT = {
    "allOf": [
        {"anyOf": [{"type": "object", "required": [f"{i}{j}"]} for j in range(3)]} for i in range(8)
    ]
}


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(bundled_checkpoint())


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(tokenizer(), PADDED, (EOS,))


def compile_regex(regex: str) -> CompiledGrammar:
    return compiler().compile(GrammarSpec("regex", regex))


def allowed(matcher: LibraryMatcher) -> list[int]:
    words = np.full(matcher.num_words, -1, np.int32)
    matcher.fill(words)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return [int(token_id) for token_id in np.nonzero(bits)[0]]


def advanced(matcher: LibraryMatcher, text: str) -> LibraryMatcher:
    matcher.advance(tokenizer().encode(text))
    return matcher


def fits(schema: object, text: str) -> bool:
    """Whether the text may be the whole of one."""
    spec = GrammarSpec("json_schema", json.dumps(schema))
    matcher = advanced(compiler().compile(spec).begin(), text)
    return matcher.error is None and EOS in allowed(matcher)


@pytest.mark.parametrize(
    ("regex", "before", "next_texts"),
    [
        ("ab?", "", {"a"}),
        ("ab?", "a", {"b", "<|endoftext|>"}),
        ("[0-9]{2}", "4", set("0123456789")),
        ("cat|dog", "", {"c", "d", "ca", "do", "cat", "dog"}),
    ],
)
def test_masks_hold_what_may_come_next(regex: str, before: str, next_texts: set[str]) -> None:
    ids = allowed(advanced(compile_regex(regex).begin(), before))
    known = {text for text in next_texts if len(tokenizer().encode(text)) == 1}
    assert {tokenizer().token_text(token_id) for token_id in ids} == known
    assert len(known) >= min(2, len(next_texts))


PATTERNS = (
    "([a-m]{2,6} ){1,3}end",
    "(once|upon)( a)? time[s.]*",
    "[^a-q]+ (is|was) .{2,8}",
    "little bird",
    "(é|東|\\n)*",
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PATTERNS), st.integers(0, 2**32), st.integers(0, 6))
def test_a_token_is_allowed_when_some_text_goes_on_with_it(
    pattern: str, seed: int, num_tokens: int
) -> None:
    """Against partial matches of another library: every token, at a random place of a text."""
    rng = random.Random(seed)
    matcher, text = compile_regex(pattern).begin(), ""
    for _ in range(num_tokens):
        whole = [i for i in allowed(matcher) if i != EOS and is_text(i)]
        if not whole:
            break
        token_id = rng.choice(whole)
        matcher.advance([token_id])
        text += tokenizer().token_text(token_id)
    ids = allowed(matcher)
    assert (EOS in ids) == bool(regex.fullmatch(pattern, text))
    for token_id in filter(is_text, range(1, VOCAB_SIZE)):
        goes_on = regex.fullmatch(pattern, text + tokenizer().token_text(token_id), partial=True)
        assert (token_id in ids) == bool(goes_on), tokenizer().token_text(token_id)


def is_text(token_id: int) -> bool:
    """Whether it holds whole characters."""
    return "\ufffd" not in tokenizer().token_text(token_id)


def test_rows_that_are_no_token_are_never_allowed() -> None:
    """The model has more rows than the tokenizer has tokens."""
    grammar = compile_regex("(.|\n)*")
    assert max(allowed(grammar.begin())) < VOCAB_SIZE
    with pytest.raises(GrammarError, match="no text fits"):
        compiler().compile(GrammarSpec("lark", f"start: <[{PADDED - 1}]>"))


def test_end_of_text_is_no_text() -> None:
    """Its name may be spelt, by other tokens."""
    matcher = compile_regex(re.escape("<|endoftext|>") + "x").begin()
    assert EOS not in allowed(matcher)
    spelt = tokenizer().encode("<|endoftext|")
    assert EOS not in spelt
    matcher.advance(spelt)
    assert matcher.error is None


def test_all_ends_of_text_are_allowed() -> None:
    many = GrammarCompiler(tokenizer(), VOCAB_SIZE, (EOS, 17))
    assert set(allowed(many.compile(GrammarSpec("regex", "(ab)*")).begin())) >= {EOS, 17}
    assert 17 not in allowed(many.compile(GrammarSpec("regex", "[0-9]")).begin())


def test_a_model_without_an_end_of_text_stops_where_nothing_follows() -> None:
    without = GrammarCompiler(tokenizer(), VOCAB_SIZE, ())
    matcher = without.compile(GrammarSpec("regex", "a{2}")).begin()
    assert allowed(matcher) == tokenizer().encode("a")
    advanced(matcher, "a")
    assert not matcher.is_complete
    advanced(matcher, "a")
    assert matcher.is_complete


def test_what_the_vocabulary_cannot_spell_is_refused() -> None:
    letters = {char: i for i, char in enumerate(sorted(set(_byte_alphabet()) - {"z"}))}
    backend = tokenizers.Tokenizer(models.BPE(letters, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    small = GrammarCompiler(Tokenizer(backend), len(letters), ())
    with pytest.raises(GrammarError, match="no text fits it, or none that can be spelt"):
        small.compile(GrammarSpec("regex", "z"))
    matcher = small.compile(GrammarSpec("regex", "yz")).begin()
    matcher.advance([letters["y"]])
    assert allowed(matcher) == []
    assert matcher.error is not None


def test_a_copy_goes_its_own_way() -> None:
    grammar = compile_regex("ab|cd")
    one, other = grammar.begin(), grammar.begin()
    advanced(one, "a")
    advanced(other, "c")
    assert [tokenizer().token_text(i) for i in allowed(one)] == ["b"]
    assert [tokenizer().token_text(i) for i in allowed(other)] == ["d"]


def test_beginning_after_tokens_is_where_they_lead() -> None:
    grammar = compile_regex("[a-z ]{5,60}[.]")
    ids = tokenizer().encode("once upon a time there was a bird")
    walked = grammar.begin()
    for place, token_id in enumerate(ids):
        assert allowed(grammar.begin(ids[:place])) == allowed(walked)
        walked.advance([token_id])


def test_a_token_that_does_not_fit_is_an_error_that_stays() -> None:
    matcher = advanced(compile_regex("ab").begin(), "x")
    assert "doesn't satisfy" in str(matcher.error)
    assert allowed(matcher) == []
    assert not matcher.is_complete


@pytest.mark.parametrize(
    ("text", "is_fine"),
    [
        ('{"a":[1,2]}', True),
        ('{"a": [1, 2]}', True),
        ('{\n  "a": [\n    1\n  ]\n}', True),
        ('{"a":  [1]}', False),
        ('{\n\n"a":[1]}', False),
        (' {"a":[1]}', False),
    ],
)
def test_white_space_in_json_is_bounded(text: str, is_fine: bool) -> None:
    assert fits({"type": "object", "properties": {"a": {"type": "array"}}}, text) is is_fine


def test_a_member_name_has_one_spelling() -> None:
    """Or a reader would take the last of two members that are one."""
    schema = {"type": "object", "properties": {"a/b": {"type": "integer"}}}
    assert fits(schema, '{"a/b":1}')
    assert not fits(schema, '{"a\\/b":"x"}')
    assert not fits(schema, '{"\\u0061/b":"x"}')
    assert fits({"type": "string"}, '"\\n\\t\\"\\\\"')


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (GrammarSpec("regex", "(?=a)b"), "look-around"),
        (GrammarSpec("json_schema", json.dumps(PRODUCT)), "too big"),
        (GrammarSpec("json_schema", '{"not":{}}'), 'Unimplemented keys: ["not"]'),
        (GrammarSpec("json_schema", '{"format":"moon"}'), "moon"),
        (GrammarSpec("json_schema", '{"not":{},"x-guidance":{"lenient":true}}'), "not"),
        (GrammarSpec("json_schema", '{"$ref":"http://127.0.0.1:9/a.json"}'), "does not fetch"),
        (GrammarSpec("json_schema", '{"$ref":"#"}'), ""),
        (GrammarSpec("json_schema", '{"type":"string","minLength":2,"maxLength":1}'), "minLength"),
        (GrammarSpec("lark", 'root ::= "a"'), "Expected token"),
        (GrammarSpec("lark", 'start: "a"\nstart: "b"'), "start"),
        (GrammarSpec("lark", '{"grammars":[{"lark_grammar":"start: /a/"}]}'), "'{'"),
        (GrammarSpec("lark", "start[temperature=0.5]: /a/"), "temperature"),
        (GrammarSpec("lark", "start: start"), "no text fits"),
    ],
)
def test_what_cannot_be_used_is_refused_in_words(spec: GrammarSpec, words: str) -> None:
    with pytest.raises(GrammarError) as refusal:
        compiler().compile(spec)
    message = str(refusal.value)
    assert words in message
    assert 0 < len(message) <= 310
    assert "\n" not in message
    assert "guidance" not in message, "what we put around it is not the client's"


def test_one_text_has_a_limit_of_processor_time(monkeypatch: pytest.MonkeyPatch) -> None:
    grammar = compile_regex("([a-z]{1,9} ?)*")
    monkeypatch.setattr(library, "TEXT_CPU_S", 1e-4)
    matcher = grammar.begin()
    for _ in range(10_000):
        if matcher.error is not None:
            break
        advanced(matcher, "a")
    assert "processor time" in str(matcher.error)
    assert allowed(matcher) == []
