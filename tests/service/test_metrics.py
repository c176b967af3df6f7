"""/metrics of a real server: its engine's steps and its machine; the books outlive the engine."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from service.metric_families import PREFIX
from service.metrics import SECTIONS, vocabulary
from tests.servers import Server, running_server

STORY = {"prompt": "Once upon a time", "seed": 1, "ignore_eos": True}


def scrape(server: Server) -> dict[str, float]:
    """Every sample by name, and by name and one label's value; those with several, added up."""
    found: dict[str, float] = {}
    for family in parse(httpx2.get(f"{server.url}/metrics").text):
        for sample in family.samples:
            for value in ["", *(f":{v}" for k, v in sample.labels.items() if k != "le")]:
                name = sample.name.removeprefix(PREFIX) + value
                found[name] = found.get(name, 0) + sample.value
    return found


def test_what_a_server_shows_is_described_and_all_of_it_is_there(server: Server) -> None:
    families = {family.name for family in parse(httpx2.get(f"{server.url}/metrics").text)}
    described = {PREFIX + one.name for section in SECTIONS for one in vocabulary(section)}
    assert {name for name in described - families if "roofline" not in name} == set()
    assert families <= described


def test_steps_tokens_and_the_machine(server: Server) -> None:
    before = scrape(server)
    server.generate(STORY | {"max_tokens": 20})
    after = scrape(server)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["generated_tokens_total"] == grown["engine_generated_tokens_total"] == 20
    assert grown["step_seconds_count"] == 20
    assert grown["step_seconds_count:decode"] >= 18
    assert grown["inter_token_latency_seconds_count"] == 19
    assert grown["step_read_bytes_total"] > 0
    assert grown["engine_part_seconds_total"] == pytest.approx(grown["step_seconds_sum"])
    assert after["process_cpu_seconds_total:engine"] > 0
    assert after["process_resident_memory_bytes:api"] > 10 * 2**20
    assert after["device_memory_bytes:cpu"] > after["device_memory_used_bytes:cpu"] > 0
    assert after["engine_up"] == 1


def test_the_books_outlive_the_engine(tmp_path: Path) -> None:
    with running_server(tmp_path, "--threads", "1", unhurried=True) as server:
        server.generate(STORY | {"max_tokens": 20})
        before = scrape(server)
        events = server.events(STORY | {"max_tokens": 300})
        for _ in range(4):
            next(events)
        server.engine.kill()
        server.hurry()
        assert list(events)[-1][0] == "done"
        after = scrape(server)
    assert after["resumed_requests_total"] == 1
    assert after["engine_restarts_total:exit"] == 1
    for name, value in before.items():
        if name.partition(":")[0].endswith(("_total", "_count")) and "process" not in name:
            assert after.get(name, 0) >= value, f"{name} went back"
    assert after["generated_tokens_total"] == 320
    assert after["inter_token_latency_seconds_count"] == 318, "over the death, too"


def test_the_roof_is_as_given_and_steps_are_set_against_it(tmp_path: Path) -> None:
    flags = ("--threads", "1", "--no-standby", "--roofline", "1e9,1e12")
    with running_server(tmp_path, *flags, "--metric-aliases", "otel,gateway") as server:
        server.generate(STORY | {"max_tokens": 10})
        found = scrape(server)
    assert found["roofline_read_bytes_per_second"] == 1e9
    least_s = found["step_read_bytes_total"] / 1e9  # the memory is the slower of the two by far
    assert found["step_roofline_seconds_total"] == pytest.approx(least_s)
    assert found["gen_ai_server_request_duration_seconds_count"] == 1
    assert found["vllm:kv_cache_usage_perc"] == 0


def test_prometheus_own_linter_finds_nothing(server: Server) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: `make observability-tools` installs it")
    text = httpx2.get(f"{server.url}/metrics").content
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True)
    assert (checked.returncode, checked.stderr.decode()) == (0, "")
