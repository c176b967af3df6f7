"""A model over two processes: the logits and tokens of the whole one (gloo, on the CPU)."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from model.backends.cuda import CudaBackend
from model.batch import single_sequence
from model.config import ConfigError, ModelConfig
from model.exchange import ApartError, Exchange
from model.fused import FusedForward
from model.kernels.gpu.kernels import TWINS
from model.kv_cache import KVCache
from model.parallel import Group, part_config, part_of
from tests.engine.engines import TINY, TINY_GPT2, random_model

CONFIGS = {
    "llama": replace(TINY, vocab_size=212),
    "qwen3": replace(TINY, vocab_size=211, qk_norm=True, tie_embeddings=True),
    "gpt2": replace(TINY_GPT2, vocab_size=211, num_heads=4, num_kv_heads=4),
}
PROMPT = [5, 3, 200, 17, 8, 99]


def run_process(rank: int, size: int, folder: str) -> None:
    """One process: logits of a prompt, then greedy tokens, each through the cache."""
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=size)
    results = {}
    for name, config in CONFIGS.items():
        part = part_of(random_model(config), Group(rank, size))
        results[name] = greedy(part, config, Group(rank, size))
        results[f"{name}, failing"] = fail_everywhere(part, Group(rank, size))
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(results))
    dist.destroy_process_group()


@torch.inference_mode()
def greedy(
    model: torch.nn.Module, config: ModelConfig, group: Group | None
) -> tuple[torch.Tensor, list[int]]:
    part = model.config
    cache = KVCache.allocate(part, num_blocks=3, block_size=8, dtype=torch.float32, by_token=True)
    backend = CudaBackend(part, cache, 256, kernels=TWINS)
    exchange = None if group is None else Exchange(group, model)
    forward = FusedForward(model, backend, exchange=exchange)
    first = logits = forward(single_sequence(PROMPT, block_table=[2, 0, 1], block_size=8)).clone()
    tokens: list[int] = []
    for start in range(len(PROMPT), 20):
        tokens.append(int(logits[-1].argmax()))
        logits = forward(
            single_sequence(tokens[-1:], start=start, block_table=[2, 0, 1], block_size=8)
        )
    return first, tokens


@torch.inference_mode()
def fail_everywhere(part: torch.nn.Module, group: Group) -> tuple[list[str], torch.Tensor]:
    """The prompt again and again; rank 1 fails at each norm in turn, then at the logits, then after
    them, then never. (what each process raised, the last logits)"""
    cache = KVCache.allocate(
        part.config, num_blocks=3, block_size=8, dtype=torch.float32, by_token=True
    )
    exchange = Exchange(group, part)
    forward = FusedForward(
        part, CudaBackend(part.config, cache, 256, kernels=TWINS), exchange=exchange
    )
    batch = single_sequence(PROMPT, block_table=[2, 0, 1], block_size=8)  # logits of each token
    forward.reserve(num_seats=1, num_rows=len(PROMPT), num_tokens=len(PROMPT))
    healthy_norm, put_together = forward._add_norm, exchange.put_together
    num_norms = 2 * part.config.num_layers + 1
    raised, logits = [], torch.empty(0)

    def call_next(norms: Iterator[Callable[..., torch.Tensor]], *inputs: Any) -> torch.Tensor:
        return next(norms)(*inputs)

    def fail(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("here")

    for place in range(num_norms + 3):
        norms = iter([healthy_norm] * place + [fail] + [healthy_norm] * num_norms)
        if group.rank == 1 and place < num_norms:
            forward._add_norm = partial(call_next, norms)  # type: ignore[method-assign]
        if group.rank == 1 and place == num_norms:
            exchange.put_together = fail  # type: ignore[method-assign]
        try:
            with forward.step(len(PROMPT), len(PROMPT)):
                logits = forward(batch).clone()
                if group.rank == 1 and place == num_norms + 1:
                    fail()
            raised.append("")
        except torch.OutOfMemoryError as error:
            raised.append(str(error))
        forward._add_norm = healthy_norm  # type: ignore[method-assign]
        exchange.put_together = put_together  # type: ignore[method-assign]
    return raised, logits


def test_one_that_fails_keeps_nobody_waiting(parts: list[dict[str, Any]]) -> None:
    """Wherever it fails: the other comes to the end, and the next forward is the right one."""
    for name, config in CONFIGS.items():
        places = 2 * config.num_layers + 4
        assert parts[0][f"{name}, failing"][0] == [""] * places
        assert parts[1][f"{name}, failing"][0] == ["here"] * (places - 1) + [""]
        for part in parts:
            assert torch.equal(part[f"{name}, failing"][1], part[name][0])


def test_what_fails_in_a_sum_cannot_be_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("connection reset")

    monkeypatch.setattr(dist, "all_reduce", broken)
    exchange = Exchange(Group(0, 2), random_model(TINY))
    with pytest.raises(ApartError, match="connection reset"), exchange.step(1, 0):
        exchange.add_up(torch.zeros(1, TINY.hidden_size))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found."""
    folder: Path = tmp_path_factory.mktemp("parts")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.model.gpu.test_parallel", str(rank), "2", str(folder)],
            cwd=Path(__file__).parents[3],
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(2)]


def test_two_processes_are_one_model(parts: list[dict[str, Any]]) -> None:
    for name, config in CONFIGS.items():
        logits, tokens = greedy(random_model(config), config, None)
        for part in parts:
            assert torch.allclose(part[name][0], logits, atol=1e-4), name
            assert part[name][1] == tokens, name
        assert torch.equal(parts[0][name][0], parts[1][name][0]), "both draw from the same"
        assert len(set(tokens)) > 4


def test_a_part_has_its_share_of_the_weights_and_the_cache() -> None:
    config = CONFIGS["llama"]
    part = part_of(random_model(config), Group(1, 2))
    assert part.config.kv_size * 2 == config.kv_size
    assert sum(p.numel() for p in part.blocks.parameters()) < 0.55 * sum(
        p.numel() for p in random_model(config).blocks.parameters()
    )
    assert part.lm_head.weight.shape[0] * 2 == config.vocab_size


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads 3"),
        ({"intermediate_size": 81}, "intermediate_size 81"),
    ],
)
def test_what_cannot_be_cut_is_refused(change: dict[str, int], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"{reason} cannot be cut into 2 parts"):
        part_config(replace(CONFIGS["llama"], **change), 2)


if __name__ == "__main__":
    run_process(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
