"""/metrics: the vocabulary, the laws, exemplars, bounded labels, aliases."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse

from loadtests.unrecorded import RECORDERS
from service.api.app import create_app
from service.api.limits import ApiLimits
from service.client import QueueFullError
from service.engine.messages import EngineStats, Measured, StepRecord
from service.metric_families import PREFIX
from service.metric_recording import Metrics
from service.metrics import SECTIONS, Http, Requests, vocabulary
from tests.api.fake_engine import INFO, FakeEngine, FakeStream, say

Houses = Callable[..., Any]
ACCEPT = {"accept": "application/openmetrics-text; version=1.0.0"}
# Of the server around the app: tests/service/test_server.py sees them.
SERVERS_OWN = {Requests.JOURNAL_ENTRIES, Http.CONNECTIONS, Http.TASKS}
# Every state, reason, route and bucket of this code, twice over.
MANY_SERIES = 2_500


async def scrape(house: Any) -> list[Metric]:
    async with house.client() as client:
        return list(parse((await client.get("/metrics", headers=ACCEPT)).text))


def total(families: list[Metric], sample_name: str, **labels: str) -> float:
    """The sum of the samples of this name that have these labels."""
    found = [
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == PREFIX + sample_name and labels.items() <= sample.labels.items()
    ]
    assert found, f"there is no {sample_name} {labels}"
    return sum(found)


async def test_the_scrape_has_the_vocabulary_and_nothing_else(house: Houses) -> None:
    h = house()
    h.engine.record.roofline = Measured(1.0, 1.0)
    families = {family.name: family for family in await scrape(h)}
    described = {
        PREFIX + one.name: one
        for section in SECTIONS
        for one in vocabulary(section)
        if one not in SERVERS_OWN
    }
    assert set(families) == set(described)
    for name, one in described.items():
        assert (families[name].type, families[name].documentation) == (one.kind, one.text)
        for sample in families[name].samples:
            assert set(sample.labels) - {"le"} == set(one.labels), name


def test_names_are_as_prometheus_wants_them() -> None:
    names = [one.name for section in SECTIONS for one in vocabulary(section)]
    assert len(names) == len(set(names))
    for section in SECTIONS:
        assert section.__doc__, section
        for one in vocabulary(section):
            assert one.text.endswith("."), one.name
            assert not one.name.endswith(("_total", "_ms", "_percent", "_count", "_sum")), one.name
            assert (one.kind == "histogram") == bool(one.buckets), one.name


def check_laws(families: list[Metric]) -> None:
    outcomes = {
        name: total(families, f"requests_{name}_total")
        for name in ("finished", "aborted", "failed")
    }
    in_flight = total(families, "requests_in_flight")
    assert total(families, "requests_accepted_total") == sum(outcomes.values()) + in_flight
    for outcome, count in outcomes.items():
        assert total(families, "request_duration_seconds_count", outcome=outcome) == count
    assert total(families, "kv_blocks") == total(families, "kv_blocks_capacity")
    for phase in ("decode", "prefill", "mixed"):
        counts = {
            total(families, f"step_{what}_count", phase=phase)
            for what in ("seconds", "sequences", "tokens")
        }
        assert len(counts) == 1
    assert total(families, "cached_prompt_tokens_total") <= total(families, "prompt_tokens_total")
    begun = total(families, "time_to_first_token_seconds_count")
    assert begun <= total(families, "requests_accepted_total")


async def test_laws_hold_at_every_scrape(house: Houses) -> None:
    open_streams: list[FakeStream] = []
    h, rng, exchanges = house(open_streams.append), random.Random(1), []
    for _ in range(120):
        match rng.choice(["come", "come", "speak", "end", "fail", "leave", "refused"]):
            case "come":
                exchanges.append(h.exchange({"prompt": [1, 2], "n": rng.choice([1, 1, 3])}))
            case "refused":
                h.engine.refuse = QueueFullError("full", 1.0)
                exchanges.append(h.exchange({"prompt": [1]}))
                await asyncio.sleep(0.005)
                h.engine.refuse = None
            case "leave" if exchanges:
                exchanges.pop(rng.randrange(len(exchanges))).disconnect()
            case "speak" if open_streams:
                rng.choice(open_streams).give(65)
            case "end" if open_streams:
                open_streams.pop(rng.randrange(len(open_streams))).give(65, finish="length")
            case "fail" if open_streams:
                open_streams.pop(rng.randrange(len(open_streams))).give(finish="error", error="x")
        await asyncio.sleep(0.003)
        check_laws(await scrape(h))
    families = await scrape(h)
    for name in ("finished", "aborted", "failed"):
        assert total(families, f"requests_{name}_total") > 0, f"no request {name}: a weaker test"
    assert total(families, "requests_rejected_total", reason="queue-full") > 0
    for exchange in exchanges:
        exchange.disconnect()
        await exchange.task


def test_the_measure_of_recording_leaves_no_recorder_out() -> None:
    """`python -m loadtests.metrics_cost` compares with a server that records nothing."""
    recorders = {name for name, value in vars(Metrics).items() if inspect.isfunction(value)}
    left = {"__init__", "_begin_with", "watch", "exposition", "slow_reader"}
    assert set(RECORDERS[Metrics]) == recorders - left
    for owner, names in RECORDERS.items():
        for name in names:
            assert hasattr(owner, name)


async def test_times_are_those_that_the_client_is_told(house: Houses) -> None:
    h = house(say(65, 66, 67))
    async with h.client() as client:
        body = {"prompt": [1, 2, 3], "stream": False}
        timing = (await client.post("/generate", json=body)).json()["timing"]
    families = await scrape(h)
    for name, told in (
        ("time_to_first_token_seconds", timing["time_to_first_token_s"]),
        ("request_queue_seconds", timing["queue_s"]),
        ("request_prefill_seconds", timing["prefill_s"]),
        ("request_decode_seconds", timing["decode_s"]),
        ("time_per_output_token_seconds", timing["decode_s"] / 2),
    ):
        assert total(families, f"{name}_count") == 1, name
        assert total(families, f"{name}_sum") == pytest.approx(told, abs=2e-6), name
    assert total(families, "cached_prompt_tokens_total") == 1


async def test_continuations_are_sequences_and_a_request_begins_once(house: Houses) -> None:
    h = house(say(65, 66))
    async with h.client() as client:
        await client.post("/generate", json={"prompt": [1, 2], "n": 3, "stream": False})
    families = await scrape(h)
    assert total(families, "time_to_first_token_seconds_count") == 1
    assert total(families, "request_duration_seconds_count") == 1
    assert total(families, "time_per_output_token_seconds_count") == 3
    assert total(families, "cached_prompt_tokens_total") == 1, "the prompt counts once"


@pytest.mark.parametrize(("length", "is_named"), [(8, True), (118, True), (119, False)])
async def test_exemplars_name_the_request(house: Houses, length: int, is_named: bool) -> None:
    h, request_id = house(say(65, 66)), "r" * length
    async with h.client() as client:
        headers = {"x-request-id": request_id}
        await client.post("/generate", json={"prompt": [1], "stream": False}, headers=headers)
    named = {
        sample.name.removeprefix(PREFIX)
        for family in await scrape(h)
        for sample in family.samples
        if sample.exemplar is not None and sample.exemplar.labels == {"request_id": request_id}
    }
    assert named == (
        {
            "requests_finished_total",
            "time_to_first_token_seconds_bucket",
            "time_per_output_token_seconds_bucket",
            "request_duration_seconds_bucket",
            "request_queue_seconds_bucket",
            "request_prefill_seconds_bucket",
            "request_decode_seconds_bucket",
        }
        if is_named
        else set()
    )


async def test_clients_cannot_make_series(house: Houses) -> None:
    h = house(say(65))
    async with h.client() as client:
        for number in range(30):
            odd = f"x{number}"
            await client.get(f"/{odd}", headers={"x-request-id": odd})
            await client.request(f"M{number}", "/generate")
            await client.get(f"/generate/{odd}")
            await client.post("/generate", json={odd: 1})
            await client.post("/v1/completions", json={"model": odd, "prompt": "a"})
            await client.post("/generate", json={"prompt": [1], "seed": number, "stream": False})
    families = await scrape(h)
    samples = [sample for family in families for sample in family.samples]
    assert len(samples) < MANY_SERIES
    words = {value for sample in samples for value in sample.labels.values()}
    assert not any(word.lstrip("xM").isdecimal() and word[0] in "xM" for word in words)
    assert total(families, "http_requests_total", route="none", status="404") == 30
    assert total(families, "http_requests_total", method="other") == 30


async def test_http_requests_are_counted_when_they_end(house: Houses) -> None:
    h = house()
    exchange = h.exchange({"prompt": [1]})
    await asyncio.sleep(0.01)
    assert total(await scrape(h), "http_requests_in_flight") == 2, "it, and the scrape itself"
    exchange.disconnect()
    await exchange.task
    families = await scrape(h)
    assert total(families, "http_requests_in_flight") == 1
    assert total(families, "http_requests_total", route="/generate", status="200") == 1


async def test_the_engine_s_books_are_shown(house: Houses) -> None:
    h = house()
    h.engine.record.stepped(StepRecord(2, 2, 2, 0.004, num_bytes=100.0, flops=7.0))
    h.engine.record.lost(EngineStats(steps=5))
    families = await scrape(h)
    assert total(families, "step_seconds_sum", phase="decode") == 0.004
    assert total(families, "step_read_bytes_total", phase="decode") == 100
    assert total(families, "step_flops_total") == 7
    assert total(families, "engine_steps_total") == 5
    assert total(families, "engine_up") == 1
    assert not any("roofline" in family.name for family in families), "not known, so not there"
    h.engine.state = "restarting"
    assert total(await scrape(h), "engine_up") == 0


def aliased(*names: str) -> tuple[FakeEngine, Any]:
    engine = FakeEngine(say(65, 66))
    app = create_app(ApiLimits(), engine, lambda: None, "case", metric_aliases=names)
    return engine, app.state.context.metrics


async def test_others_names_are_there_on_demand_only(house: Houses) -> None:
    assert not any(f.name.startswith(("gen_ai", "vllm")) for f in await scrape(house()))


async def test_opentelemetry_s_names_show_the_same_numbers() -> None:
    _, metrics = aliased("otel")
    metrics.began("/v1/chat/completions", "r", 0.3)
    metrics.sequence_ended("/generate", "r", 0.5, 6)
    for outcome in ("finished", "failed"):
        metrics.ended("/generate", "r", outcome, "stop", duration_s=2.0, num_cached=0)
    text = (await metrics.exposition(ACCEPT["accept"]))[0].decode()
    families = {family.name: family for family in parse(text)}
    labels = {"gen_ai_provider_name": "vitrine", "gen_ai_request_model": "case"}

    def value(name: str, **wanted: str) -> float:
        samples = families[name.rsplit("_", 1)[0]].samples
        wanted |= labels
        return sum(
            s.value for s in samples if s.name == name and wanted.items() <= s.labels.items()
        )

    first = "gen_ai_server_time_to_first_token_seconds"
    assert value(f"{first}_sum", gen_ai_operation_name="chat") == 0.3
    assert value("gen_ai_server_time_per_output_token_seconds_sum") == pytest.approx(0.1)
    duration = "gen_ai_server_request_duration_seconds"
    assert value(f"{duration}_count", error_type="", gen_ai_operation_name="text_completion") == 1
    assert value(f"{duration}_count", error_type="failed") == 1
    bounds = {s.labels["le"] for s in families[first].samples if s.name.endswith("_bucket")}
    ours = {s.labels.get("le") for s in families["vitrine_time_to_first_token_seconds"].samples}
    assert bounds == ours - {None}
    assert any(sample.exemplar for sample in families[first].samples)


async def test_the_gateway_s_names_show_the_queue_and_the_cache() -> None:
    engine, metrics = aliased("gateway")
    engine.stats = EngineStats(num_running=3, total_blocks=64, referenced_blocks=16, free_blocks=48)

    def values() -> Iterator[tuple[str, float, dict[str, str]]]:
        for family in metrics.registry.collect():
            if family.name.startswith("vllm"):
                for sample in family.samples:
                    yield sample.name, sample.value, sample.labels

    model = {"model_name": "case"}
    sizes = {"block_size": str(INFO.block_size), "num_gpu_blocks": str(INFO.num_blocks)}
    assert list(values()) == [
        ("vllm:num_requests_waiting", 0, model),
        ("vllm:num_requests_running", 3, model),
        ("vllm:kv_cache_usage_perc", 0.25, model),
        ("vllm:cache_config_info", 1, model | sizes),
    ]
    engine.info, engine.stats = None, EngineStats()
    assert [value for _, value, _ in values()] == [0, 0, 0], "before there is a model"
