"""Our logits are those of transformers, in every family and shape (see parity.py)."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from model.checkpoint import Checkpoint, load_checkpoint
from tests.model.parity import (
    BOUND,
    CASES,
    NUM_GREEDY,
    Case,
    Oracle,
    differences,
    forwards_for,
    make_oracle,
    our_greedy,
    our_logits,
    prompt,
)


@dataclass(frozen=True)
class Pair:
    """Theirs and ours of one case."""

    oracle: Oracle
    checkpoint: Checkpoint


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    case: Case = request.param
    directory = tmp_path_factory.mktemp(case.family)
    oracle = make_oracle(case, directory)
    return Pair(oracle, load_checkpoint(directory))


def test_logits_equal(pair: Pair) -> None:
    for forward in forwards_for(pair.checkpoint.config):
        for length, how, difference in differences(pair.oracle, pair.checkpoint, forward):
            assert difference <= BOUND, f"{forward}, {length} tokens {how}: {difference}"


def test_greedy_continuations_equal(pair: Pair) -> None:
    ids = prompt(17)
    expected = pair.oracle.greedy(ids, NUM_GREEDY)
    assert len(set(expected)) > 4, "too uniform to tell two models apart"
    for forward in forwards_for(pair.checkpoint.config):
        assert our_greedy(pair.checkpoint, forward, ids, NUM_GREEDY) == expected, forward


def test_shards_are_shards(tmp_path: Path) -> None:
    """The cases that claim several files have them."""
    for case in (case for case in CASES if "shard" in case.shape):
        directory = tmp_path / case.name
        make_oracle(case, directory)
        assert len(list(directory.glob("model-*.safetensors"))) >= 3


# A case, and a change of its config.json that leaves every shape as it is.
MISREAD: tuple[tuple[str, str, dict[str, object]], ...] = (
    ("mistral: window 16", "window forgotten", {"sliding_window": None}),
    ("mistral: window 16", "window one longer", {"sliding_window": 17}),
    ("llama: linear rope, old form", "factor forgotten", {"rope_scaling": None}),
    ("llama: linear rope, old form", "theta forgotten", {"rope_theta": 10_000.0}),
    ("llama: llama3 rope", "scaling forgotten", {"rope_parameters": None}),
    ("llama: yarn rope", "scaling forgotten", {"rope_parameters": None}),
    ("gpt2: untied, n_inner 100, exact GELU", "tanh", {"activation_function": "gelu_new"}),
    ("gpt2: 3 shards, epsilon 1e-3", "epsilon", {"layer_norm_epsilon": 1e-5}),
    ("qwen3: qk norm, head_dim 32", "epsilon", {"rms_norm_eps": 1e-4}),
)


@pytest.mark.parametrize(("name", "what", "change"), MISREAD)
def test_would_notice_a_config_misread(
    tmp_path: Path, name: str, what: str, change: dict[str, object]
) -> None:
    """The bound is far below what a single misread field does to the logits."""
    case = next(case for case in CASES if case.name == name)
    oracle = make_oracle(replace(case, max_shard_size="1GB"), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    ids = prompt(200)
    ours = our_logits(load_checkpoint(tmp_path), "reference", ids, len(ids))
    assert float((ours - oracle.logits(ids)).abs().max()) > BOUND
