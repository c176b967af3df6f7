"""The report's arithmetic, its records and its steps."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import psutil
import pytest

from loadtests.report import computed
from loadtests.report.hardware import H100, Running, running_costs
from loadtests.report.lanes import has_gpu, lanes_of
from loadtests.report.records import RecordError, Roof, Run, read_run, recorded_runs, write_run
from loadtests.report.steps import Doing, Step
from model.families.published import PUBLISHED
from service.commands import CommandError
from service.commands.report import check
from tests.loadtests.report_runs import CPU, make_run

GPT2 = computed.needs_of(PUBLISHED["gpt2"], "bfloat16")
ROOF = Roof(read_bytes_per_s=100e9, flops_per_s=1e12)


def test_one_stream_of_gpt2_by_hand() -> None:
    """12 layers of 7,077,888 weights in products, a head of 50,257 x 768 tied to the embedding,
    124,439,808 parameters in all but for 1,024 positions, and 12 x 2 x 768 numbers a token."""
    context = 512
    weights = 2 * (124_439_808 - 1024 * 768)
    cache = context * 12 * 2 * 768 * 2
    products = 2 * (12 * 7_077_888 + 50_257 * 768)
    attention = 4 * context * 12 * 768
    assert GPT2.decode([context]) == (weights + cache, products + attention)
    assert computed.decode_step_s(GPT2, ROOF, 1, context) == pytest.approx(
        (weights + cache) / 100e9
    )
    assert computed.decode_intensity(GPT2, 1, context) == pytest.approx(
        (products + attention) / (weights + cache)
    )


def test_batching_divides_the_weights_and_nothing_else() -> None:
    alone, together = GPT2.decode([512])[0], GPT2.decode([512] * 64)[0]
    assert together - GPT2.weight_bytes == 64 * (alone - GPT2.weight_bytes)
    assert computed.decode_intensity(GPT2, 64, 512) < 64
    assert computed.decode_intensity(GPT2, 256, 512) < computed.decode_intensity(GPT2, 256, 64)


def test_a_roof_bends_at_its_ridge() -> None:
    assert computed.ridge(ROOF) == pytest.approx(10)
    assert ROOF.least_s(100e9, 1) == pytest.approx(1)
    assert ROOF.least_s(1, 2e12) == pytest.approx(2)
    # A prompt of 512 tokens is arithmetic on any device here.
    num_bytes, flops = computed.prefill(GPT2, 512)
    assert computed.prefill_intensity(GPT2, 512) == pytest.approx(flops / num_bytes)
    assert flops / num_bytes > computed.ridge(H100.roof)


def test_serving_is_slower_than_decoding_and_more_users_never_hurt() -> None:
    speeds = [computed.served_tokens_per_s(GPT2, ROOF, users, 128, 128) for users in (1, 8, 64)]
    assert speeds == sorted(speeds)
    assert speeds[0] < computed.decode_tokens_per_s(GPT2, ROOF, 1, 128)


def test_what_fits_a_device() -> None:
    needs = computed.needs_of(PUBLISHED["qwen3-8b"], "bfloat16")
    assert computed.sequences_that_fit(needs, 1e9, 512) == 0
    # 36 layers x 2 x 8 heads x 128 x 2 bytes
    assert needs.kv_bytes_per_token == 147_456
    assert computed.sequences_that_fit(needs, needs.weight_bytes + 10 * 512 * 147_456, 512) == 10


def test_money_and_energy() -> None:
    # A million tokens at 1,000 a second are 1,000 seconds.
    assert computed.cost_per_million(3.6, 1000) == pytest.approx(1.0)
    assert computed.energy_per_million_kwh(360, 1000) == pytest.approx(0.1)
    assert running_costs("H100 SXM", None, {}).watts == 700
    assert running_costs(CPU.name, CPU, {}).dollars_per_hour == pytest.approx(0.1)
    own = {"H100 SXM": Running(1.0, 2.0)}
    assert running_costs("H100 SXM", None, own) == own["H100 SXM"]


def test_a_run_comes_back_as_it_was_written(tmp_path: Path) -> None:
    run = make_run("gpt2", with_limits=True)
    write_run(run, tmp_path / "box" / "report-x.json")
    again = read_run(tmp_path / "box" / "report-x.json")
    assert again == msgspec.structs.replace(run, is_recorded=True)


def test_recorded_runs_stand_in_for_absent_devices_only(tmp_path: Path) -> None:
    write_run(make_run("gpt2"), tmp_path / "a" / "report-cpu.json")
    write_run(make_run("gpt2", on_gpu=True), tmp_path / "b" / "report-gpu.json")
    (tmp_path / "b" / "peers-x.json").write_text("another kind of result")
    found = recorded_runs([make_run("stories")], tmp_path)
    assert [(run.device, run.is_recorded) for run in found] == [("cuda", True)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('"schema":1|"schema":2', "schema 2, this report reads 1"),
        ('"roof":{|"roof":{"read":1,"no":{', "read_bytes_per_s"),
        ("}|", "report-x.json"),
    ],
)
def test_a_broken_record_is_refused_by_name(tmp_path: Path, change: str, message: str) -> None:
    path = tmp_path / "report-x.json"
    text = msgspec.json.encode(make_run("stories")).decode()
    old, new = change.split("|")
    assert old in text
    broken = text.replace(old, new, 1) if new else text[:-1]
    path.write_text(broken.replace('"no":{"read_bytes_per_s"', '"no":{"x"'))
    with pytest.raises(RecordError, match=re.escape("report-x.json")) as caught:
        read_run(path)
    assert message in str(caught.value)


def test_lanes_say_where_their_numbers_come_from() -> None:
    cpu_only = lanes_of([make_run("stories"), make_run("gpt2")], {})
    assert [lane.is_measured for lane in cpu_only] == [True, False, False]
    assert all("computed" in lane.label for lane in cpu_only[1:])
    assert set(cpu_only[0].runs) == {"stories", "gpt2"}
    assert not has_gpu(cpu_only)
    recorded = msgspec.structs.replace(make_run("gpt2", on_gpu=True), is_recorded=True)
    both = lanes_of([make_run("gpt2"), recorded], {})
    assert "recorded 2026-11-21" in both[1].label
    # What was measured is not computed beside it.
    assert [lane.name for lane in both[2:]] == ["H200 SXM"]
    assert has_gpu(both)


def test_an_interrupted_step_goes_on_where_it_was(tmp_path: Path) -> None:
    made: list[str] = []

    def part(name: str, value: int) -> int:
        made.append(name)
        if name == "second" and len(made) == 2:
            raise KeyboardInterrupt
        return value

    def make(doing: Doing) -> int:
        one = doing.part("first", int, lambda: part("first", 1))
        return one + doing.part("second", int, lambda: part("second", 2))

    def step(key: dict[str, object]) -> Step[int]:
        return Step("thing", key, int, make, 10.0, num_parts=2)

    def quiet(_: str) -> None:
        """Nobody watches."""

    with pytest.raises(KeyboardInterrupt):
        step({"a": 1}).result(tmp_path, quiet, {})
    assert step({"a": 1}).left_s(tmp_path) == 5.0
    assert step({"a": 2}).left_s(tmp_path) == 10.0
    assert step({"a": 1}).result(tmp_path, quiet, {}) == 3
    assert step({"a": 1}).left_s(tmp_path) == 0.0
    assert made == ["first", "second", "second"]
    assert step({"a": 1}).result(tmp_path, quiet, {}) == 3
    assert len(made) == 3
    # Other settings are another measurement.
    assert step({"a": 2}).result(tmp_path, quiet, {}) == 3
    assert made[3:] == ["first", "second"]


@pytest.mark.slow
def test_a_report_that_was_stopped_repeats_nothing(tmp_path: Path) -> None:
    """Stopped in the middle of the sweep over HTTP: the bench, the parts of the sweep that were
    done and all else are there as they were, and the same command makes the page."""
    command = [sys.executable, "-m", "tests.loadtests.tiny_report", "--out", str(tmp_path)]
    command += ["--model", "stories", "--device", "cpu", "--threads", "1"]
    first_part = tmp_path / "steps" / "cpu-stories-bfloat16-served-users-1.json"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as report:
        deadline = time.monotonic() + 200
        while not first_part.exists() and time.monotonic() < deadline:
            assert report.poll() is None
            time.sleep(0.05)
        server = [one for one in psutil.Process(report.pid).children() if "serve" in one.cmdline()]
        report.send_signal(signal.SIGTERM)  # taken as Ctrl-C is
        _, said = report.communicate(timeout=90)
    assert report.returncode == 130, said
    assert "the same command goes on" in said
    assert "of 4 steps to do, about" in said
    assert server, "it was stopped while a server ran"
    assert not any(one.is_running() for one in server)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "steps").glob("*.json")}
    assert "cpu-stories-bfloat16-bench" in {path.stem for path in kept}
    assert not (tmp_path / "report.html").exists()

    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "1 of 4 steps to do" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert "cpu-stories-bfloat16-bench\n" not in again.stderr, "it is not measured twice"
    assert (tmp_path / "report.html").exists()
    assert len(list((tmp_path / "steps").glob("*-served*.json"))) == 5


def test_the_command_says_when_it_is_in_no_checkout(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="made from a checkout"):
        check(tmp_path)
    check(Path(__file__).parents[2])


def test_the_command_reaches_the_report(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "service", "report"]
    shown = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "--draw-only" in shown.stdout
    empty = subprocess.run(
        [*command, "--draw-only", "--out", str(tmp_path / "none"), "--price", "x=1:0"],
        capture_output=True,
        text=True,
    )
    assert empty.returncode == 2
    assert "two numbers above 0" in empty.stderr


def test_the_page_is_drawn_from_what_was_kept(tmp_path: Path) -> None:
    for run in (make_run("stories", with_limits=True), make_run("gpt2")):
        write_run(run, tmp_path / f"report-cpu-{run.model}.json")
    done = subprocess.run(
        [sys.executable, "-m", "service", "report", "--draw-only", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.html").read_text()
    keys = set(re.findall(r'<section id="(\w+)"><h2>\d', page))
    assert keys == {path.stem for path in tmp_path.glob("*.png")}
    assert {"throughput", "latency", "roofline", "where", "size", "cost", "limits"} <= keys
    assert not re.search(r'(?:src|href)="https?:', page)
    assert not re.search(r"%[A-Z]+%", page)


@pytest.mark.parametrize("model", ["stories", "gpt2"])
def test_the_model_of_the_fixture_is_one_the_report_measures(model: str) -> None:
    run: Run = make_run(model)
    assert computed.parameters_of(run.config) > 1e6
