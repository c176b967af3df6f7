"""How Locust is compared with the server's histograms and with `vitrine bench`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loadtests.load.agreement import Compared, _verdicts, beside_bench, beside_server, histograms
from loadtests.load.run import Plan, Ran
from loadtests.load.samples import Sample
from tests.servers import Server

MS = 10**6
SCRAPE = """# TYPE vitrine_time_to_first_token_seconds histogram
vitrine_time_to_first_token_seconds_bucket{route="/generate",le="0.1"} 2
vitrine_time_to_first_token_seconds_sum{route="/generate"} 0.5
vitrine_time_to_first_token_seconds_count{route="/generate"} 2
vitrine_time_to_first_token_seconds_sum{route="/v1/completions"} 0.25
vitrine_time_to_first_token_seconds_count{route="/v1/completions"} 1
"""


def sample(due_ms: int) -> Sample:
    """Sent 1 ms late, first token 9 ms after that, then an event of two tokens 6 ms later."""
    return Sample(
        "/generate",
        due_ns=due_ms * MS,
        sent_ns=(due_ms + 1) * MS,
        first_ns=(due_ms + 10) * MS,
        end_ns=(due_ms + 20) * MS,
        stamps_ns=[(due_ms + 10) * MS, (due_ms + 16) * MS],
        counts=[1, 2],
        num_tokens=3,
    )


def test_a_histogram_is_summed_over_its_labels() -> None:
    assert histograms(SCRAPE) == {"vitrine_time_to_first_token_seconds": (0.75, 3.0)}


def test_a_wait_counts_from_sending_and_tokens_of_one_event_share_their_pause() -> None:
    names = ("time_to_first_token", "inter_token_latency", "time_per_output_token")
    before = {f"vitrine_{name}_seconds": (1.0, 10.0) for name in (*names, "request_duration")}
    # Two requests: 9 ms to the first token, then four tokens 3 ms apart, 19 ms in all.
    added = (0.018, 2), (0.012, 4), (0.006, 2), (0.038, 2)
    after = {
        name: (1.0 + seconds, 10.0 + count)
        for name, (seconds, count) in zip(before, added, strict=True)
    }
    found = {one.what: one for one in beside_server(before, after, [sample(0), sample(50)])}
    assert found["time to first token, mean"].locust == pytest.approx(9.0)
    assert found["time to first token, mean"].other == pytest.approx(9.0)
    assert found["inter token latency, count"] == Compared("inter token latency, count", 4, 4.0)
    assert found["inter token latency, mean"].difference == pytest.approx(0)
    # A request lasts from when it was due, which is what its user waits: 20 of 19 ms.
    assert found["request duration, mean"].difference == pytest.approx(20 / 19 - 1)


def test_the_steady_state_is_compared_with_the_bench() -> None:
    ran = Ran(Plan(1), [sample(due_ms) for due_ms in range(0, 1000, 10)], 0.1)
    alone = {"output_tokens_per_s": 300.0, "ttft_mean_s": 0.009, "itl_p50_s": 0.003}
    found = {one.what: one for one in beside_bench(ran, alone | {"itl_p99_s": 0.006})}
    assert found["tokens/s"].difference == pytest.approx(0, abs=0.02)
    assert found["time to first token, mean"].difference == pytest.approx(0)
    assert found["inter token latency, p50"].difference == pytest.approx(0)
    assert found["inter token latency, p99"].difference == pytest.approx(-0.5)


def test_a_verdict_is_the_median_of_the_rounds_differences() -> None:
    rounds = [[Compared("x", locust, other)] for locust, other in ((11, 10), (30, 20), (6, 6))]
    (verdict,) = _verdicts("bench", rounds, 0.1)
    assert verdict.difference == pytest.approx(0.1)
    assert not _verdicts("bench", rounds, 0.099)[0].is_kept


@pytest.mark.slow
def test_the_whole_of_it_beside_a_running_server(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "agreement.json"
    command = [sys.executable, "-m", "loadtests.load.agreement", "--url", server.url]
    command += ["--rounds", "1", "--seconds", "3", "--users", "2", "--prompt-len", "16"]
    # What a crowded machine does to a mean of few is not what is tested.
    command += ["--output-len", "16", "--within", "0.9", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = {one["what"]: one for one in json.loads(out.read_text())["verdicts"]}
    for what in ("time to first token, count", "inter token latency, count"):
        assert verdicts[what]["locust"] == verdicts[what]["other"] > 0
    missed = subprocess.run([*command, "--within", "0"], capture_output=True, text=True)
    assert missed.returncode == 1
    assert "missed" in missed.stdout
