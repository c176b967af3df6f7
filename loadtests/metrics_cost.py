"""What recording metrics costs, twice: `python -m loadtests.metrics_cost --rounds 5`

1. Throughput: two servers, one of which records nothing (loadtests/unrecorded.py), get the same
   streams in turns; printed is the ratio of each round, and their median. Machines change their
   speed between two rounds by more than recording costs, so many rounds are needed, and a quiet
   machine.
2. The recorders by themselves: microseconds for what a step of so many streams records, in the
   engine and in the API, set against the step's duration as the server measured it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import timeit
from collections.abc import Callable
from statistics import median

import httpx2
from prometheus_client import CollectorRegistry

from loadtests.faults.common import Target, add_server_arguments, target
from loadtests.served import served
from model.hub import resolve_model
from service.buckets import TOKEN_SECONDS, Distribution
from service.engine.messages import (
    EngineStats,
    SequenceOutput,
    StepOutput,
    StepRecord,
    encoder,
    from_engine_decoder,
)
from service.engine_record import EngineRecord
from service.metrics import Latency

REPEATS = 2_000
MODULE = "loadtests.unrecorded"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.metrics_cost", description=__doc__)
    add_server_arguments(parser)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompt-len", type=int, default=16)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    # Nothing to do in a pause of one server while the other is measured.
    flags = ("--roofline", "1e10,1e11", "--no-standby")
    with target(given, *flags) as recorded, target(given, *flags, module=MODULE) as unrecorded:
        ratios = in_turns(recorded, unrecorded, given)
        step_s = decode_step_s(recorded)
        scrape_s = asyncio.run(scrape(recorded.url))
    print(f"throughput with recording over without: median {median(ratios):.3f}")
    costs = recorders(given.streams, given.prompt_len + given.output_len // 2)
    for name, cost_us in costs.items():
        print(f"{name}: {cost_us:.1f} us a step, {cost_us / step_s / 1e4:.2f} % of one")
    print(f"a decode step of the recorded server: {1e3 * step_s:.2f} ms")
    print(f"a scrape: {1e3 * scrape_s:.1f} ms")
    values = f"ours {value_us(ours=True):.2f} us, the library's {value_us(ours=False):.2f} us"
    print(f"a value in a histogram: {values}")
    if given.out is not None:
        given.out.write_text(json.dumps({"ratios": ratios, "us_a_step": costs}) + "\n")


def in_turns(recorded: Target, unrecorded: Target, given: argparse.Namespace) -> list[float]:
    """Tokens a second of both, round by round; who begins takes turns."""
    for server in (recorded, unrecorded):
        served(server.url, given)  # warm
    ratios = []
    for number in range(given.rounds):
        order = [recorded, unrecorded] if number % 2 else [unrecorded, recorded]
        found = {server.url: served(server.url, given) for server in order}
        ratios.append(found[recorded.url] / found[unrecorded.url])
        print(
            f"round {number + 1}: {found[recorded.url]:.0f} tokens/s with, "
            f"{found[unrecorded.url]:.0f} without, ratio {ratios[-1]:.3f}",
            flush=True,
        )
    return ratios


def decode_step_s(server: Target) -> float:
    """Mean duration of its decode steps so far."""
    values = {}
    for line in httpx2.get(f"{server.url}/metrics").text.splitlines():
        name, _, value = line.rpartition(" ")
        values[name] = value
    total, count = (
        float(values[f'vitrine_step_seconds_{what}{{phase="decode"}}']) for what in ("sum", "count")
    )
    return total / count


async def scrape(url: str) -> float:
    """Seconds that a scrape takes while nothing else goes on, the shortest of ten."""
    loop = asyncio.get_running_loop()
    times = []
    headers = {"accept": "application/openmetrics-text; version=1.0.0"}
    async with httpx2.AsyncClient() as client:
        for _ in range(10):
            began = loop.time()
            await client.get(f"{url}/metrics", headers=headers)
            times.append(loop.time() - began)
    return min(times)


def recorders(num_streams: int, context: int) -> dict[str, float]:
    """Microseconds of what a step of decodes alone records, by process."""
    import torch

    from model.checkpoint_files import read_checkpoint_info
    from service.engine.traffic import traffic_of

    shape = read_checkpoint_info(resolve_model(None, None)).config
    traffic = traffic_of(shape, torch.float32)
    numbers = list(range(num_streams))
    record = StepRecord(num_streams, num_streams, num_streams, *([0.001] * 5), 1e6, 1e6)
    outputs = [SequenceOutput(number, [7]) for number in numbers]
    bare = StepOutput(outputs, EngineStats())
    full = StepOutput(outputs, EngineStats(), [record])
    books, gaps = EngineRecord(), Distribution(TOKEN_SECONDS)

    def engine() -> None:
        traffic.decode([context + 1 for _ in numbers])
        StepRecord(num_streams, num_streams, num_streams, *([0.001] * 5), 1e6, 1e6)

    def api() -> None:
        books.stepped(record)
        for _ in numbers:
            gaps.observe(0.004)

    def sent(message: StepOutput) -> float:
        data = encoder.encode(message)
        return _us(lambda: encoder.encode(message)) + _us(lambda: from_engine_decoder.decode(data))

    return {"engine": _us(engine), "API": _us(api), "both, sending": sent(full) - sent(bare)}


def value_us(*, ours: bool) -> float:
    """Of one value into a histogram of token times."""
    if ours:
        distribution = Distribution(TOKEN_SECONDS)
        return _us(lambda: distribution.observe(0.004))
    histogram = Latency.INTER_TOKEN.to_histogram(CollectorRegistry())
    return _us(lambda: histogram.observe(0.004))


def _us(function: Callable[[], object]) -> float:
    """Of a call, the shortest of some."""
    return 1e6 * min(timeit.repeat(function, number=REPEATS, repeat=5)) / REPEATS


if __name__ == "__main__":
    main()
