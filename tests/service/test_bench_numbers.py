"""The arithmetic behind `vitrine bench`, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.config import ModelConfig
from service.bench.machine import CpuWatch, peak_memory_bytes
from service.bench.measure import RequestRecord, Run, StepRecord
from service.bench.random_weights import random_model
from service.bench.results import Measurement, summarize
from service.bench.workload import ClosedLoop, Workload, make_arrivals, make_loop
from service.engine.profile import StepProfile
from service.engine.roofline import Roofline
from service.engine.traffic import traffic_of, traffic_of_model

CONFIG = ModelConfig(
    vocab_size=100,
    hidden_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    intermediate_size=16,
    max_positions=64,
    tie_embeddings=True,
)
# Q, K, V, O; gate, up, down.
LAYER = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16
HEAD = 100 * 8
NORMS = (2 * 2 + 1) * 8
WORKLOAD = Workload(
    batch=2,
    num_requests=3,
    prompt_len=10,
    output_len=3,
    rate=4.0,
    shared_prefix_len=4,
    temperature=0.0,
    seed=1,
)


def test_what_a_decode_step_reads_and_does() -> None:
    traffic = traffic_of(CONFIG, torch.bfloat16)
    num_bytes, flops = traffic.decode([10, 20])
    # Two bytes a number; keys and values of both layers for every token in sight.
    assert num_bytes == 2 * (2 * LAYER + HEAD + NORMS) + 30 * (2 * 2 * 4 * 2)
    # Two operations a weight and row; a key and a value, each as wide as all heads' queries.
    assert flops == 2 * 2 * (2 * LAYER + HEAD) + 2 * (30 * 2 * 8 * 2)


def test_an_untied_embedding_is_not_read() -> None:
    untied = traffic_of(replace(CONFIG, tie_embeddings=False), torch.float32)
    assert untied.weight_bytes == traffic_of(CONFIG, torch.float32).weight_bytes


def test_a_window_bounds_what_is_seen() -> None:
    windowed = traffic_of(replace(CONFIG, sliding_windows=(None, 5)), torch.float32)
    plain = traffic_of(CONFIG, torch.float32)
    assert windowed.decode([5]) == plain.decode([5])
    missing_keys = 20 - 5
    assert plain.decode([20])[0] - windowed.decode([20])[0] == missing_keys * 2 * 4 * 4


def test_a_prefill_is_its_decodes_without_their_heads() -> None:
    traffic = traffic_of(CONFIG, torch.float32)
    decodes = sum(traffic.decode([context])[1] for context in range(4, 11))
    assert traffic.prefill_flops(3, 10) == decodes - 6 * 2 * HEAD


@pytest.mark.parametrize("windows", [(), (None, 5)])
def test_a_chunk_reads_its_keys_once_and_does_what_its_decodes_do(
    windows: tuple[int | None, ...],
) -> None:
    traffic = traffic_of(replace(CONFIG, sliding_windows=windows), torch.float32)
    decodes = [traffic.decode([context]) for context in range(8, 13)]
    num_bytes, flops = traffic.step([(7, 5)], num_drawn=0)
    assert flops == sum(done for _, done in decodes) - 5 * 2 * HEAD
    # The keys of 12 tokens in one layer; through a window of 5, five queries see nine.
    per_layer = 2 * 4 * 4
    keys = 12 * per_layer + (9 if windows else 12) * per_layer
    assert num_bytes == 4 * (2 * LAYER + NORMS) + keys
    together, _ = traffic.step([(7, 5), (9, 1)], num_drawn=1)
    alone = traffic.decode([10])[0]
    assert together == num_bytes + alone - 4 * (2 * LAYER + NORMS), "weights are read once"


def test_a_model_that_is_there_counts_as_its_architecture_does() -> None:
    for config in (CONFIG, replace(CONFIG, tie_embeddings=False)):
        model = random_model(config, 16, torch.device("cpu"), torch.bfloat16, seed=0)
        assert traffic_of_model(model, torch.bfloat16) == traffic_of(config, torch.bfloat16)


def test_a_roof_is_the_slower_of_two() -> None:
    roof = Roofline(read_bytes_per_s=10.0, flops_per_s=100.0, gemm_size=1)
    assert roof.least_s(20, 100) == 2.0
    assert roof.least_s(20, 500) == 5.0


def test_a_workload_is_a_function_of_its_seed() -> None:
    first, again = (make_arrivals(WORKLOAD, 100, 0) for _ in range(2))
    assert first == again
    other = make_arrivals(WORKLOAD, 100, 1)
    assert [a.arrives_s for a in first] == [a.arrives_s for a in other]
    assert first[0].arrives_s == 0 < first[1].arrives_s < first[2].arrives_s
    prompts = [a.request.prompt_token_ids for a in first]
    assert {len(prompt) for prompt in prompts} == {10}
    assert len({tuple(prompt[:4]) for prompt in prompts}) == 1
    assert len({tuple(prompt[4:]) for prompt in prompts}) == 3
    assert prompts[0][:4] != other[0].request.prompt_token_ids[:4]


def test_users_of_a_closed_loop_ask_again_when_they_have_thought() -> None:
    requests = [arrival.request for arrival in make_arrivals(WORKLOAD, 100, 0)]
    loop = ClosedLoop(requests, [iter([0.3, 0.5]), iter([0.1, 9.0, 9.0])])
    assert [loop.take().arrives_s for _ in range(2)] == [0.1, 0.3]
    assert loop.due_s() is None, "both wait for their answers"
    loop.ended(requests[1].id, 2.0)
    assert loop.due_s() == 2.5, "the first user's second pause"
    assert loop.take().request is requests[2]
    loop.ended(requests[0].id, 3.0)
    assert loop.due_s() is None, "there are no more"


def test_thinking_takes_the_time_it_should_on_average() -> None:
    users = replace(WORKLOAD, batch=400, num_requests=400, is_closed=True, think_s=0.05, rate=None)
    loop = make_loop(users, 100, 0)
    mean = sum(loop.take().arrives_s for _ in range(400)) / 400
    assert mean == pytest.approx(0.05, rel=0.2)  # 4 standard deviations


def test_a_closed_loop_counts_its_steady_state() -> None:
    """Two users; the window is from 2.0, when two requests have ended, to 5.0, when the last one
    is sent: the request of 2.5 counts, and of tokens those at 2.0, 3.0, 4.0 and 5.0."""
    prefill = StepProfile(num_tokens=10, referenced_blocks=3, step_s=0.2)
    run = Run(
        requests=[
            RequestRecord(10, 0.0, [0.5, 1.0]),
            RequestRecord(10, 0.0, [1.5, 2.0]),
            RequestRecord(10, 2.5, [3.0, 4.0]),
            RequestRecord(10, 5.0, [5.0, 9.0]),
        ],
        steps=[StepRecord(prefill, 10, (10,))],
        elapsed_s=9.0,
        preemptions=0,
        foreign_cores=None,
    )
    workload = replace(WORKLOAD, is_closed=True, rate=None)
    roof = Roofline(read_bytes_per_s=1e6, flops_per_s=1e6, gemm_size=1)
    result = summarize(run, workload, traffic_of(CONFIG, torch.float32), roof)
    assert result.output_tokens_per_s == pytest.approx(4 / 3.0)
    assert result.ttft_p99_s == pytest.approx(0.495)  # of 0.5 and 0.0
    assert result.generated_tokens == 8


def test_the_numbers_of_a_run() -> None:
    """One request: a prefill of 0.2 s, then two decodes of 0.1 s."""
    prefill = StepProfile(num_tokens=10, referenced_blocks=3, step_s=0.2)
    decode = StepProfile(
        num_tokens=1,
        referenced_blocks=4,
        schedule_s=0.01,
        build_s=0.02,
        forward_s=0.05,
        sample_s=0.01,
        step_s=0.1,
    )
    run = Run(
        requests=[RequestRecord(10, 1.0, [1.5, 1.6, 1.8])],
        steps=[
            StepRecord(prefill, 10, (10,)),
            StepRecord(decode, 0, (11,)),
            StepRecord(decode, 0, (12,)),
        ],
        elapsed_s=2.0,
        preemptions=0,
        foreign_cores=None,
    )
    traffic = traffic_of(CONFIG, torch.float32)
    roof = Roofline(read_bytes_per_s=1e6, flops_per_s=1e9, gemm_size=1)
    result = summarize(run, WORKLOAD, traffic, roof)
    assert result.generated_tokens == 3
    assert result.output_tokens_per_s == 1.5
    assert result.decode_tokens_per_s == pytest.approx(10)
    assert result.prefill_tokens_per_s == pytest.approx(50)
    assert result.ttft_p50_s == result.ttft_p99_s == pytest.approx(0.5)
    assert result.itl_p50_s == result.tpot_p50_s == pytest.approx(0.15)
    assert result.e2el_p50_s == pytest.approx(0.8)
    assert result.host_s == pytest.approx(0.04)
    assert result.book_s == pytest.approx(0.01)
    assert result.peak_blocks == 4
    need_bytes = traffic.decode([11])[0] + traffic.decode([12])[0]
    assert result.decode_bytes_per_s == pytest.approx(need_bytes / 0.2)
    assert result.decode_roof_share == pytest.approx(need_bytes / 1e6 / 0.2)
    assert Measurement.of(WORKLOAD, [result, result]).median == result


def test_a_step_that_computes_again_is_no_decode() -> None:
    assert StepRecord(StepProfile(num_tokens=2), 0, (11, 12)).is_decode
    assert not StepRecord(StepProfile(num_tokens=5), 0, (11,)).is_decode
    assert not StepRecord(StepProfile(num_tokens=1), 1, (1,)).is_decode


def test_random_weights_are_the_seed_s() -> None:
    def build(seed: int) -> dict[str, torch.Tensor]:
        device = torch.device("cpu")
        return random_model(CONFIG, 16, device, torch.bfloat16, seed).state_dict()

    one, again, other = build(1), build(1), build(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])
    assert one["embedding.weight"].data_ptr() == one["lm_head.weight"].data_ptr()
    assert one["embedding.weight"].dtype == torch.bfloat16
    assert 0.01 < one["embedding.weight"].float().std() < 0.03
    assert bool((one["final_norm.weight"] == 1).all())


def test_the_machine_is_watched() -> None:
    watch = CpuWatch()
    assert peak_memory_bytes() > 2**20
    foreign = watch.foreign_cores()
    assert foreign is None or foreign >= 0
