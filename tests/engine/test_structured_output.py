"""Grammars in the engine, on the bundled model: what it writes at temperature 1 fits them."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.checkpoint_files import bundled_checkpoint
from model.grammar_spec import GrammarSpec
from model.sampling_params import SamplingParams
from model.tokenizer import IncrementalDecoder, Tokenizer
from service.engine.core import EngineCore
from service.engine.messages import EngineConfig, Submit, encoder, to_engine_decoder
from service.engine.start import start_engine
from tests.engine.engines import EOS, Result, collect, make_core, random_model, run_all, submit
from tests.grammars.schemas import Schema, schemas

PERSON: Schema = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "likes": {"type": "array", "items": {"enum": ["cake", "rain"]}, "maxItems": 3},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
ANY_OBJECT = GrammarSpec("json_schema", '{"type":"object"}')


@pytest.fixture(scope="module")
def core() -> EngineCore:
    """The engine as it is served. Idle between tests."""
    core, _ = start_engine(EngineConfig(str(bundled_checkpoint()), threads=1, max_num_seqs=16))
    return core


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(bundled_checkpoint())


def json_spec(schema: Schema) -> GrammarSpec:
    return GrammarSpec("json_schema", json.dumps(schema, ensure_ascii=False))


def request(
    tokenizer: Tokenizer, sequence_id: int, grammar: GrammarSpec | None, **params: Any
) -> Submit:
    sampling: dict[str, Any] = {"max_tokens": 450, "seed": sequence_id, "logprobs": 1}
    sampling |= {"grammar": grammar} | params
    return Submit(sequence_id, tokenizer.encode("Once upon a time"), SamplingParams(**sampling))


def text_of(tokenizer: Tokenizer, result: Result) -> str:
    """As the API makes it: the continuation of a prompt."""
    decoder = IncrementalDecoder(tokenizer, tokenizer.encode("Once upon a time"))
    return decoder.push(result.token_ids) + decoder.flush()


@pytest.mark.slow
def test_random_schemas_hold(core: EngineCore, tokenizer: Tokenizer) -> None:
    """100 random schemas and more; what ends with "stop" is JSON that fits its schema.

    Up to a fifth may be cut off: a member's free name can fill 450 tokens (6 in 100 do).
    """
    ends = {"stop": 0, "length": 0}
    numbers = iter(range(10**9))

    @settings(max_examples=9, deadline=None)
    @given(st.lists(schemas, min_size=14, max_size=14))
    def check(some: list[Schema]) -> None:
        requests = {next(numbers): schema for schema in some}
        results = run_all(
            core, [request(tokenizer, i, json_spec(schema)) for i, schema in requests.items()]
        )
        for sequence_id, schema in requests.items():
            result = results[sequence_id]
            assert result.finish_reason in ends, (schema, result.error)
            ends[result.finish_reason] += 1
            if result.finish_reason == "stop":
                jsonschema.validate(json.loads(text_of(tokenizer, result)), schema)

    check()
    assert ends["stop"] >= 100, ends


REGEXES = (
    "[a-z]{3,9}",
    "(yes|no|maybe)(, (yes|no|maybe)){2}",
    "[0-9]{4}-[0-9]{2}-[0-9]{2}",
    "The (cat|dog) was [a-z]{1,8}( and [a-z]{1,8})?[.!]",
    "[щ-я]{2,5} \U0001f600?",
    "(.|\n){4,12}",
    "a|ab|abc",
)


@pytest.mark.parametrize("regex", REGEXES)
@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_regexes_match_fully(
    core: EngineCore, tokenizer: Tokenizer, regex: str, temperature: float
) -> None:
    spec = GrammarSpec("regex", regex)
    requests = [request(tokenizer, i, spec, temperature=temperature) for i in range(5)]
    for result in run_all(core, requests).values():
        assert result.finish_reason == "stop"
        assert re.fullmatch(regex, text_of(tokenizer, result)), text_of(tokenizer, result)


def test_a_lark_grammar_is_followed(core: EngineCore, tokenizer: Tokenizer) -> None:
    grammar = 'start: sum\nsum: NUMBER ("+" NUMBER){1,4}\nNUMBER: /[1-9][0-9]{0,2}/\n'
    spec = GrammarSpec("lark", grammar)
    for result in run_all(core, [request(tokenizer, i, spec) for i in range(8)]).values():
        assert re.fullmatch(r"[1-9]\d{0,2}(\+[1-9]\d{0,2}){1,4}", text_of(tokenizer, result))


def test_json_object_is_an_object_or_too_long(core: EngineCore, tokenizer: Tokenizer) -> None:
    requests = [request(tokenizer, i, ANY_OBJECT, max_tokens=60) for i in range(16)]
    results = run_all(core, requests)
    finished = [r for r in results.values() if r.finish_reason == "stop"]
    assert finished
    for result in finished:
        assert isinstance(json.loads(text_of(tokenizer, result)), dict)
    for result in results.values():
        assert result.finish_reason in ("stop", "length")
        assert text_of(tokenizer, result).startswith("{")


def test_a_text_that_may_go_on_ends_where_the_model_says(
    core: EngineCore, tokenizer: Tokenizer
) -> None:
    """End of text is in the mask when the text fits, and only then: with everything else
    unlikely, it comes at the first place where it may."""
    for regex, text in (("(ab)*", ""), ("(ab)+", "ab"), ("x(ab)?(cd)?", "x")):
        spec = GrammarSpec("regex", regex)
        result = run_all(core, [request(tokenizer, 1, spec, logit_bias={0: 100.0})])[1]
        assert (result.finish_reason, result.token_ids[-1]) == ("stop", 0)
        assert text_of(tokenizer, result) == text


def test_a_stop_token_ends_a_text_early(core: EngineCore, tokenizer: Tokenizer) -> None:
    comma = tokenizer.encode("a,b")[1]
    spec = GrammarSpec("regex", "[0-9](,[0-9]){5}")
    result = run_all(core, [request(tokenizer, 1, spec, stop_token_ids=(comma,))])[1]
    assert result.finish_reason == "stop"
    assert re.fullmatch("[0-9],", text_of(tokenizer, result))


def test_a_text_that_ends_with_its_last_token_ends_with_stop(
    core: EngineCore, tokenizer: Tokenizer
) -> None:
    spec = GrammarSpec("regex", "[0-9]{3}")
    enough = run_all(core, [request(tokenizer, 1, spec, max_tokens=3)])[1]
    assert (enough.finish_reason, len(enough.token_ids)) == ("stop", 3)
    short = run_all(core, [request(tokenizer, 1, spec, max_tokens=2)])[1]
    assert (short.finish_reason, len(short.token_ids)) == ("length", 2)


def test_other_rows_do_not_notice(core: EngineCore, tokenizer: Tokenizer) -> None:
    """Tokens and the bits of log-probabilities are the same beside grammars and without."""
    plain = [
        request(tokenizer, i, None, max_tokens=40, temperature=t, top_k=k)
        for i, (t, k) in enumerate([(0.0, 0), (1.0, 0), (1.0, 20), (0.7, 0)])
    ]
    grammars = [request(tokenizer, 10 + i, json_spec(PERSON)) for i in range(4)]
    alone = run_all(core, plain)
    mixed = run_all(core, [r for pair in zip(plain, grammars, strict=True) for r in pair])
    for one in plain:
        assert mixed[one.id] == alone[one.id]
    crowd = {r.id: mixed[r.id] for r in grammars}
    assert crowd == {r.id: run_all(core, [r])[r.id] for r in grammars}


def test_a_sequence_goes_on_where_another_engine_left_it(
    core: EngineCore, tokenizer: Tokenizer
) -> None:
    whole = request(tokenizer, 1, json_spec(PERSON))
    result = run_all(core, [whole])[1]
    assert result.finish_reason == "stop"
    for cut in range(1, len(result.token_ids), 3):
        rest = Submit(2, whole.prompt_token_ids, whole.sampling, 0, result.token_ids[:cut])
        rest = to_engine_decoder.decode(encoder.encode(rest))  # as it crosses the boundary
        assert run_all(core, [rest])[2].token_ids == result.token_ids[cut:]


def test_preemption_changes_nothing(tokenizer: Tokenizer, core: EngineCore) -> None:
    directory = str(bundled_checkpoint())
    small, info = start_engine(
        EngineConfig(directory, threads=1, max_num_seqs=8, max_model_len=128, kv_cache_bytes=2**20)
    )
    requests = [request(tokenizer, i, json_spec(PERSON), max_tokens=100) for i in range(8)]
    assert info.num_blocks * info.block_size < 8 * 104, "the cache must be too small for all"
    results = run_all(small, requests)
    assert small.stats().preemptions > 0
    assert results == run_all(core, requests)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (GrammarSpec("regex", "("), "unclosed group"),
        (GrammarSpec("regex", "[^\\s\\S]"), "no text fits"),
        (GrammarSpec("json_schema", '{"uniqueItems":true}'), "uniqueItems"),
        (GrammarSpec("lark", "start: other"), "other"),
    ],
)
def test_a_bad_grammar_hurts_only_itself(
    core: EngineCore, tokenizer: Tokenizer, spec: GrammarSpec, words: str
) -> None:
    good = [request(tokenizer, 1, json_spec(PERSON)), request(tokenizer, 2, None, max_tokens=9)]
    results = run_all(core, [*good, request(tokenizer, 3, spec)])
    assert results[3].finish_reason == "error"
    assert words in str(results[3].error)
    del results[3]
    assert results == run_all(core, good)


def test_a_grammar_that_becomes_too_complex_fails_alone(
    core: EngineCore, tokenizer: Tokenizer
) -> None:
    """Ambiguous: the parser's rows grow with every token until a limit is reached."""
    ambiguous = GrammarSpec("lark", 'start: ("a"? | "b"?){1,2000}\n')
    good = request(tokenizer, 1, None, max_tokens=60)
    no_end = {0: -100.0}
    outputs = []
    for one in (good, request(tokenizer, 2, ambiguous, logit_bias=no_end)):
        core.add(one)
    results: dict[int, Result] = {}
    while core.has_work:
        step = core.step()
        outputs += step
        collect(step, results)
    assert results[2].finish_reason == "error"
    assert "many items" in str(results[2].error)
    assert [o.is_grammar_error for o in outputs if o.error] == [True]
    assert results[1] == run_all(core, [good])[1]


def test_steps_go_on_while_a_grammar_compiles(core: EngineCore, tokenizer: Tokenizer) -> None:
    """One that takes seconds (the API would have refused it): the others are done first."""
    slow = GrammarSpec("json_schema", '{"type":"integer","multipleOf":299993}')
    core.add(request(tokenizer, 1, slow))
    core.add(request(tokenizer, 2, None, max_tokens=50))
    results: dict[int, Result] = {}
    while not results.get(2) or not results[2].finish_reason:
        collect(core.step(), results)
    assert 1 not in results
    assert core.stats().num_waiting == 1
    core.abort(1)
    assert not core.has_work
    assert core.sequences == {}


def test_an_engine_without_grammars_says_so() -> None:
    core = make_core(random_model())
    results = run_all(core, [submit(1, [5], grammar=ANY_OBJECT), submit(2, [5], max_tokens=3)])
    assert results[1].finish_reason == "error"
    assert "vitrine[grammar]" in str(results[1].error)
    assert results[2].finish_reason == "length" or results[2].token_ids[-1] == EOS
