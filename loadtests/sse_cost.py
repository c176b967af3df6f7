"""What the API process pays for an event: the app on real sockets, an engine that only counts.

    python -m loadtests.sse_cost --streams 32 --tokens 300

Streams are read by a second process. Every step gives each stream one token, told as the engine
tells it; CPU time of this process, over the events sent, is what is measured. Nothing is computed,
so the numbers hold for any model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable

import uvicorn

from loadtests.peers.streams import Seen, read_all
from model.hub import resolve_model
from model.tokenizer import Tokenizer
from service.api.app import create_app
from service.api.limits import ApiLimits
from service.client import EngineState
from service.engine.messages import (
    EngineConfig,
    EngineStats,
    ModelInfo,
    SequenceOutput,
    StepOutput,
    encoder,
    from_engine_decoder,
)
from service.engine.outbox import Outbox
from service.engine_record import EngineRecord
from service.health import EngineHealth
from service.journal import JournalEntry, SequenceRequest, TokenStream

STEP_S = 0.004  # of the engine that is played: 250 tokens a second for each stream
INFO = ModelInfo(
    family="none",
    num_parameters=0,
    dtype="float32",
    device="cpu",
    vocab_size=4096,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=1,
    hidden_size=1,
    context_length=100_000,
    eos_token_ids=[0],
    block_size=16,
    num_blocks=1_000_000,
    kv_cache_bytes=0,
    weight_bytes=0,
    load_s=0.0,
    torch_version="",
    threads=1,
    deterministic=True,
    attention_backend="none",
)


class PlayedEngine:
    """Has every sequence say one token a step, through the messages of the real one."""

    def __init__(self, outbox: Outbox) -> None:
        self.outbox = outbox
        self.info: ModelInfo | None = INFO
        self.stats = EngineStats()
        self.state: EngineState = "idle"
        self.state_reason = ""
        self.health = EngineHealth("idle")
        self.record = EngineRecord()
        self.entries: dict[int, JournalEntry] = {}

    def submit(self, requests: list[SequenceRequest], timeout_s: float) -> list[TokenStream]:
        first = len(self.entries)
        entries = [JournalEntry(first + i, one, self._drop) for i, one in enumerate(requests)]
        self.entries |= {entry.id: entry for entry in entries}
        return list(entries)

    def _drop(self, entry: JournalEntry) -> None:
        self.entries.pop(entry.id, None)

    def step(self, token_id: int, *, is_last: bool) -> None:
        """One message of the engine, encoded and decoded as between the processes."""
        reason = "length" if is_last else None
        outputs = [SequenceOutput(i, [token_id], finish_reason=reason) for i in self.entries]
        self.stats = EngineStats(num_running=len(outputs))
        self.outbox.add(outputs)
        if not (due := self.outbox.due(len(outputs))):
            return
        encoded = encoder.encode(self.outbox.take(due, self.stats))
        message = from_engine_decoder.decode(encoded)
        assert isinstance(message, StepOutput)
        for output in message.outputs:
            if (entry := self.entries.get(output.id)) is not None:
                entry.receive(output)


async def measure(num_streams: int, num_tokens: int, max_events_s: float) -> dict[str, float]:
    """Serve `num_streams` streams of `num_tokens` tokens and say what they cost."""
    engine = PlayedEngine(Outbox(max_events_s))
    tokenizer = Tokenizer.from_directory(resolve_model(None, None))
    app = create_app(ApiLimits(), engine, lambda: tokenizer, "none")
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    command = [sys.executable, "-m", "loadtests.sse_cost", "--read", str(port)]
    reader = await asyncio.create_subprocess_exec(
        *command, "--streams", str(num_streams), stdout=asyncio.subprocess.PIPE
    )
    await until(lambda: len(engine.entries) == num_streams)
    cpu, wall = time.process_time(), time.perf_counter()
    words = tokenizer.encode("Once upon a time there was a little glass case")
    for number in range(num_tokens):
        due = wall + number * STEP_S
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        engine.step(words[number % len(words)], is_last=number == num_tokens - 1)
    await until(lambda: not app.state.context.generations)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    seen, _ = await reader.communicate()
    server.should_exit = True
    await serving
    num_events = json.loads(seen)["events"]
    return {
        "cpu_us_per_event": 1e6 * cpu / num_events,
        "cpu_us_per_token": 1e6 * cpu / (num_streams * num_tokens),
        "events": num_events,
        "tokens": num_streams * num_tokens,
        "cpu_share": cpu / wall,
    }


async def until(condition: Callable[[], bool]) -> None:
    """Wait until it holds."""
    while not condition():  # noqa: ASYNC110 (polled, so as to leave what is measured alone)
        await asyncio.sleep(0.001)


def read(port: int, num_streams: int) -> dict[str, float]:
    """The client: read all streams to their end."""
    events = 0

    def understand(_: dict[str, object]) -> Seen:
        nonlocal events
        events += 1
        return Seen()

    body: dict[str, object] = {"prompt": "Once", "max_tokens": 50_000, "ignore_eos": True}
    read_all(f"http://127.0.0.1:{port}/generate", [body] * num_streams, understand)
    return {"events": events}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.sse_cost", description=__doc__)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=300, help="per stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-events-s", type=float, default=EngineConfig("").max_events_s)
    parser.add_argument("--read", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.read:
        print(json.dumps(read(given.read, given.streams)))
        return
    for _ in range(given.rounds):
        found = asyncio.run(measure(given.streams, given.tokens, given.max_events_s))
        print("  ".join(f"{name} {value:.4g}" for name, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
