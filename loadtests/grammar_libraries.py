"""llguidance beside xgrammar: what a token mask costs, what a compilation costs, and which
JSON-schema keywords each one enforces, refuses or lets pass.

    python -m loadtests.grammar_libraries --model DIR [--model DIR]

xgrammar is no dependency: where it is not installed its columns are left out. To have it
without what it drags in: `pip install --no-deps --target DIR xgrammar apache-tvm-ffi`, and DIR
in PYTHONPATH. Each library walks along the same valid document, token by token. All times are
processor time, which a busy machine does not change much.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from model.grammar_spec import GrammarSpec
from model.tokenizer import Tokenizer
from service.grammars.library import CompiledGrammar, GrammarCompiler

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 8},
    },
    "required": ["name", "age", "email", "tags"],
    "additionalProperties": False,
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "text": {"type": "string"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["text", "children"],
            "additionalProperties": False,
        }
    },
}
WIDE = {
    "type": "object",
    "properties": {f"field_{i}": {"type": ["string", "null"]} for i in range(100)},
    "required": [f"field_{i}" for i in range(100)],
    "additionalProperties": False,
}
LEAF = {"text": "a little bird said so", "children": []}
# name: (schema, a document of it)
WALKS: dict[str, tuple[dict[str, Any], Any]] = {
    "person": (
        PERSON,
        {"name": "Ada Lovelace", "age": 36, "email": "ada@example.org", "tags": ["red", "blue"]},
    ),
    "tree": (TREE, {"text": "Once upon a time", "children": [LEAF, {**LEAF, "children": [LEAF]}]}),
    "100 fields": (WIDE, {f"field_{i}": "once" if i % 2 else None for i in range(100)}),
    "any object": ({"type": "object"}, {"a": [1, 2.5, True, None], "b": {"c": "the end"}}),
}
# keyword: (schema, text that fits, text that does not)
KEYWORDS: dict[str, tuple[Any, str, str]] = {
    "minLength": ({"type": "string", "minLength": 2}, '"ab"', '"a"'),
    "pattern": ({"type": "string", "pattern": "^a+$"}, '"aa"', '"b"'),
    "format: date": ({"type": "string", "format": "date"}, '"2024-02-29"', '"2024-99-29"'),
    "minimum": ({"type": "integer", "minimum": 5}, "7", "4"),
    "multipleOf": ({"type": "integer", "multipleOf": 7}, "14", "15"),
    "minItems": ({"type": "array", "minItems": 2}, "[1,2]", "[1]"),
    "uniqueItems": ({"type": "array", "uniqueItems": True}, "[1,2]", "[1,1]"),
    "prefixItems": ({"type": "array", "prefixItems": [{"type": "null"}]}, "[null]", "[1]"),
    "contains": ({"type": "array", "contains": {"const": 1}}, "[2,1]", "[2]"),
    "required": ({"type": "object", "required": ["a"]}, '{"a":1}', '{"b":1}'),
    "patternProperties": (
        {"type": "object", "patternProperties": {"^n": {"type": "null"}}},
        '{"n":null}',
        '{"n":1}',
    ),
    "propertyNames": ({"type": "object", "propertyNames": {"maxLength": 1}}, '{"a":1}', '{"ab":1}'),
    "minProperties": ({"type": "object", "minProperties": 1}, '{"a":1}', "{}"),
    "dependentRequired": (
        {"type": "object", "dependentRequired": {"a": ["b"]}},
        '{"b":1}',
        '{"a":1}',
    ),
    "anyOf": ({"anyOf": [{"type": "null"}, {"const": 1}]}, "1", "2"),
    "allOf": (
        {"allOf": [{"type": "integer", "minimum": 5}, {"type": "integer", "maximum": 6}]},
        "5",
        "7",
    ),
    "oneOf, disjoint": ({"oneOf": [{"type": "null"}, {"const": 1}]}, "1", "2"),
    "oneOf, overlapping": (
        {"oneOf": [{"type": "integer"}, {"type": "integer", "minimum": 5}]},
        "1",
        "7",
    ),
    "not": ({"type": "integer", "not": {"const": 3}}, "1", "3"),
    "if/then": ({"type": "integer", "if": {"const": 1}, "then": {"const": 2}}, "3", "1"),
    "$ref to the web": ({"$ref": "http://127.0.0.1:9/schema.json"}, "1", "1"),
}


class Matcher(Protocol):
    """One text on its way."""

    def fill(self) -> None: ...
    def accept(self, token_id: int) -> bool: ...
    def may_end(self) -> bool: ...


class OurMatcher:
    """llguidance as it is served."""

    def __init__(self, compiled: CompiledGrammar, eos_id: int) -> None:
        self.matcher = compiled.begin()
        self.words = np.zeros(self.matcher.num_words, np.int32)
        self.eos_id = eos_id

    def fill(self) -> None:
        self.matcher.fill(self.words)

    def accept(self, token_id: int) -> bool:
        self.matcher.advance([token_id])
        return self.matcher.error is None

    def may_end(self) -> bool:
        self.fill()
        return bool(self.words[self.eos_id // 32] >> (self.eos_id % 32) & 1)


class XgrammarMatcher:
    """xgrammar with its defaults."""

    def __init__(self, compiled: Any, vocab_size: int) -> None:
        import xgrammar

        self.matcher = xgrammar.GrammarMatcher(compiled)
        self.bits = xgrammar.allocate_token_bitmask(1, vocab_size)

    def fill(self) -> None:
        self.matcher.fill_next_token_bitmask(self.bits)

    def accept(self, token_id: int) -> bool:
        return bool(self.matcher.accept_token(token_id))

    def may_end(self) -> bool:
        return bool(self.matcher.is_completed())


Compile = Callable[[Any], Matcher]


def our_compiler(tokenizer: Tokenizer, eos_id: int) -> Compile:
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, (eos_id,))

    def compile_schema(schema: Any) -> Matcher:
        spec = GrammarSpec("json_schema", json.dumps(schema))
        return OurMatcher(compiler.compile(spec), eos_id)

    return compile_schema


def xgrammar_compiler(tokenizer: Tokenizer, eos_id: int) -> Compile:
    import xgrammar

    tokens = [tokenizer.token_bytes(i) or b"" for i in range(tokenizer.vocab_size)]
    table = xgrammar.TokenizerInfo(tokens, xgrammar.VocabType.RAW, stop_token_ids=[eos_id])
    compiler = xgrammar.GrammarCompiler(table, max_threads=1, cache_enabled=False)

    def compile_schema(schema: Any) -> Matcher:
        compiled = compiler.compile_json_schema(json.dumps(schema), strict_mode=False)
        return XgrammarMatcher(compiled, tokenizer.vocab_size)

    return compile_schema


def walk(matcher: Matcher, ids: list[int]) -> tuple[list[float], list[float]]:
    """Seconds of each mask, and of each token taken."""
    masks, accepts = [], []
    for token_id in ids:
        began = time.process_time()
        matcher.fill()
        filled = time.process_time()
        if not matcher.accept(token_id):
            raise RuntimeError(f"token {token_id} of a valid document was refused")
        masks.append(filled - began)
        accepts.append(time.process_time() - filled)
    return masks, accepts


def fits(matcher: Matcher, tokenizer: Tokenizer, text: str) -> bool:
    ids = tokenizer.encode(text, add_special_tokens=False)
    return all(matcher.accept(i) for i in ids) and matcher.may_end()


def verdict(compile_schema: Compile, tokenizer: Tokenizer, keyword: str) -> str:
    schema, good, bad = KEYWORDS[keyword]
    try:
        fits_good = fits(compile_schema(schema), tokenizer, good)
        fits_bad = fits(compile_schema(schema), tokenizer, bad)
    except Exception as error:  # noqa: BLE001 - whatever a library raises is its refusal
        return f"refused ({str(error).splitlines()[0][:40]})"
    if not fits_good:
        return "WRONG: a fitting text does not pass"
    return "ignored" if fits_bad else "enforced"


def import_seconds(module: str) -> float:
    code = f"import time; t = time.process_time(); import {module}; print(time.process_time() - t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", required=True, help="a checkpoint directory")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    makers: dict[str, Callable[[Tokenizer, int], Compile]]
    makers = {"llguidance": our_compiler, "xgrammar": xgrammar_compiler}
    makers = {name: make for name, make in makers.items() if importlib.util.find_spec(name)}
    for name in makers:
        print(f"import {name}: {import_seconds(name):.2f} s")
    for directory in arguments.model:
        tokenizer = Tokenizer.from_directory(Path(directory))
        eos_id = tokenizer.encode("<|endoftext|>")[0]
        for name, make in makers.items():
            began = time.process_time()
            compile_schema = make(tokenizer, eos_id)
            table_s = time.process_time() - began
            print(f"\n{name}, {tokenizer.vocab_size} tokens: token table {table_s * 1e3:.0f} ms")
            for walk_name, (schema, document) in WALKS.items():
                text = json.dumps(document, separators=(",", ":"))
                ids = tokenizer.encode(text, add_special_tokens=False)
                compiles, masks, accepts = [], [], []
                for _ in range(arguments.rounds):
                    began = time.process_time()
                    matcher = compile_schema(schema)
                    compiles.append(time.process_time() - began)
                    some_masks, some_accepts = walk(matcher, ids)
                    masks += some_masks
                    accepts += some_accepts
                masks.sort()
                print(
                    f"  {walk_name:10} compile {statistics.median(compiles) * 1e3:8.2f} ms; "
                    f"mask median {statistics.median(masks) * 1e6:6.0f}, "
                    f"99 % {masks[int(len(masks) * 0.99)] * 1e6:6.0f}, "
                    f"worst {masks[-1] * 1e6:6.0f} us; "
                    f"token {statistics.median(accepts) * 1e6:4.0f} us"
                )
    print()
    compilers = {name: make(tokenizer, eos_id) for name, make in makers.items()}
    for keyword in KEYWORDS:
        verdicts = [f"{n}: {verdict(c, tokenizer, keyword)}" for n, c in compilers.items()]
        print(f"{keyword:20} " + "; ".join(verdicts))


if __name__ == "__main__":
    main()
