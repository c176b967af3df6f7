"""Stop strings and hold-back against an oracle that sees the whole text at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.tokenizer import IncrementalDecoder, Tokenizer
from service.api.text import AnswerText, StopMatcher, StopStrings

# Few letters, so that stop strings overlap, nest and nearly match.
letters = "abX"
texts = st.text(letters, max_size=40)
stop_lists = st.lists(st.text(letters, min_size=1, max_size=5), max_size=4)


def oracle(pieces: list[str], stops: list[str], min_tokens: int) -> tuple[str, str | None, int]:
    """Text, stop string and number of tokens of an answer whose tokens are `pieces`."""
    whole = "".join(pieces)
    end = 0
    for number, piece in enumerate(pieces, start=1):
        for _ in piece:
            end += 1
            found = [stop for stop in stops if whole[:end].endswith(stop)]
            if found and number >= min_tokens:
                stop = max(found, key=len)
                return whole[: end - len(stop)], stop, number
    return whole, None, len(pieces)


def may_begin(text: str, stops: list[str]) -> int:
    """Length of the longest end of `text` that is the beginning, not the whole, of a stop."""
    return max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
    )


@given(st.lists(st.text(letters, max_size=4), max_size=20), stop_lists, st.integers(0, 12))
def test_against_the_whole_text(pieces: list[str], stops: list[str], min_tokens: int) -> None:
    matcher = StopMatcher(StopStrings(stops))
    sent, stop, used = "", None, 0
    for number, piece in enumerate(pieces, start=1):
        ready, stop = matcher.push(piece, may_stop=number >= min_tokens)
        sent += ready
        used = number
        if stop is not None:
            break
        # Exactly what may become a stop string is held, and nothing else.
        so_far = "".join(pieces[:number])
        assert sent == so_far[: len(so_far) - may_begin(so_far, stops)]
    else:
        sent += matcher.flush()
    assert (sent, stop, used) == oracle(pieces, stops, min_tokens)


@given(texts, stop_lists, st.lists(st.integers(0, 4)))
def test_a_stop_string_is_never_partly_sent(text: str, stops: list[str], cuts: list[int]) -> None:
    """Whatever is sent before a match ends before the match begins."""
    matcher = StopMatcher(StopStrings(stops))
    sent, at = "", 0
    for size in [*cuts, len(text)]:
        ready, stop = matcher.push(text[at : at + size])
        at += size
        sent += ready
        if stop is not None:
            assert text.startswith(sent + stop)
            assert not any(other in sent for other in stops)
            return
    assert sent + matcher.flush() == text
    assert not any(stop in text for stop in stops)


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        (["\n\n"], "a\nb\n\nc", ("a\nb", "\n\n")),
        (["world", "lo w"], "hello world", ("hel", "lo w")),
        (["abc", "b"], "xabc", ("xa", "b")),  # complete first
        (["bc", "abc"], "xabc", ("x", "abc")),  # complete together: began first
        (["aab"], "aaab", ("a", "aab")),
        (["abab"], "ababab", ("", "abab")),
        (["\U0001f600"], "a\U0001f600", ("a", "\U0001f600")),
    ],
)
def test_the_earliest_match_wins(
    stops: list[str], text: str, expected: tuple[str, str | None]
) -> None:
    matcher = StopMatcher(StopStrings(stops))
    sent = ""
    for char in text:
        ready, stop = matcher.push(char)
        sent += ready
        if stop is not None:
            break
    assert (sent, stop) == expected
    assert StopMatcher(StopStrings(stops)).push(text) == expected


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])


def answer(
    tokenizer: Tokenizer, ids: list[int], stops: list[str], min_tokens: int, cuts: list[int]
) -> tuple[str, str | None, int]:
    text = AnswerText(IncrementalDecoder(tokenizer), StopStrings(stops), min_tokens)
    sent, used, at = "", 0, 0
    for size in [*cuts, len(ids)]:
        piece = text.push(ids[at : at + size])
        at += size
        sent += piece.text
        used += piece.num_tokens
        if piece.stop is not None:
            return sent, piece.stop, used
    piece = text.finish()
    return sent + piece.text, piece.stop, used


@given(data=st.data())
def test_tokens_against_the_whole_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size), max_size=20))
    whole = tokenizer.decode(ids)
    inside = st.builds(lambda a, n: whole[a : a + n], st.integers(0, 30), st.integers(1, 6))
    stops = data.draw(st.lists(inside.filter(bool) if whole else st.just("x"), max_size=3))
    min_tokens = data.draw(st.integers(0, 8))
    cuts = data.draw(st.lists(st.integers(0, 5)))
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push([token_id]) for token_id in ids]
    if pieces:
        pieces[-1] += decoder.flush()  # the last token completes what is left
    assert answer(tokenizer, ids, stops, min_tokens, cuts) == oracle(pieces, stops, min_tokens)


def test_a_stop_before_min_tokens_is_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a b a b a")
    ends = [tokenizer.decode(ids[: n + 1]) for n in range(len(ids))]
    second_b = next(n for n, text in enumerate(ends, start=1) if text.count("b") == 2)
    assert answer(tokenizer, ids, ["b"], 0, [])[0] == "a "
    text, stop, used = answer(tokenizer, ids, ["b"], second_b, [])
    assert (text, stop, used) == ("a b a ", "b", second_b)
