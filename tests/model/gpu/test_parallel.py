"""A model over two processes: the logits and tokens of the whole one (gloo, on the CPU)."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from model.backends.cuda import CudaBackend
from model.batch import single_sequence
from model.config import ConfigError, ModelConfig
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
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(results))
    dist.destroy_process_group()


@torch.inference_mode()
def greedy(
    model: torch.nn.Module, config: ModelConfig, group: Group | None
) -> tuple[torch.Tensor, list[int]]:
    part = model.config
    cache = KVCache.allocate(part, num_blocks=3, block_size=8, dtype=torch.float32, by_token=True)
    backend = CudaBackend(part, cache, 256, kernels=TWINS)
    forward = (
        FusedForward(model, backend)
        if group is None
        else FusedForward(model, backend, reduce=group.add_up, gather_logits=group.put_together)
    )
    first = logits = forward(single_sequence(PROMPT, block_table=[2, 0, 1], block_size=8)).clone()
    tokens: list[int] = []
    for start in range(len(PROMPT), 20):
        tokens.append(int(logits[-1].argmax()))
        logits = forward(
            single_sequence(tokens[-1:], start=start, block_table=[2, 0, 1], block_size=8)
        )
    return first, tokens


def test_two_processes_are_one_model(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.model.gpu.test_parallel", str(rank), "2", str(tmp_path)],
            cwd=Path(__file__).parents[3],
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    parts = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(2)]
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
