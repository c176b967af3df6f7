"""`vitrine bench` through its command, on a model of a few thousand parameters."""

from __future__ import annotations

import json
import re
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from model.families.published import PUBLISHED
from service.bench import measure
from service.bench.workload import make_arrivals
from service.commands import CommandError, bench
from service.engine import roofline
from service.engine.roofline import Effort, measure_roofline
from service.settings import SettingsError

TINY: dict[str, object] = {
    "model_type": "llama",
    "vocab_size": 211,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
PERCENTILES = ("p50", "p90", "p99")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PUBLISHED, "tiny", TINY)
    small = Effort(2**20, 1, 128, 0.1, 1)
    monkeypatch.setattr(roofline, "GEMM_MIN_SIZE", 64)
    monkeypatch.setattr(roofline, "measure_roofline", partial(measure_roofline, effort=small))
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")


def run(folder: Path, *flags: str) -> dict[str, Any]:
    """The JSON of a benchmark of the tiny shape."""
    path = folder / "bench.json"
    short = ("--shape", "tiny", "--block-size", "4", "--warmup", "0", "--repeat", "1")
    assert bench.run([*short, *flags, "--json", str(path)]) == 0
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def test_the_json_is_complete_and_adds_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--batch", "1,3", "--prompt-len", "20", "--output-len", "7")
    report = run(tmp_path, *flags, "--repeat", "2", "--warmup", "1")
    assert report["machine"]["cpu"]
    assert report["machine"]["cores"] >= 1
    assert report["model"]["dtype"] == "float32"
    assert report["peak_memory_bytes"] > 0
    assert report["settings"]["shape"] == "tiny"
    roof = report["roofline"]
    assert roof["read_bytes_per_s"] > 0
    assert roof["flops_per_s"] > 0

    one, three = report["measurements"]
    for measurement, batch in ((one, 1), (three, 3)):
        assert measurement["workload"]["batch"] == batch
        assert len(measurement["repeats"]) == 2
        for result in (measurement["median"], *measurement["repeats"]):
            assert None not in (v for k, v in result.items() if k != "foreign_cores")
            assert result["generated_tokens"] == batch * 7
            assert result["prompt_tokens"] == batch * 20
            assert result["cached_prompt_tokens"] == result["preemptions"] == 0
            # 26 tokens are computed: the last one drawn is not.
            assert result["peak_blocks"] == batch * 7
            for name in ("ttft", "itl", "tpot", "e2el"):
                values = [result[f"{name}_{p}_s"] for p in PERCENTILES]
                assert all(0 < low <= high for low, high in pairwise(values))
                assert 0 < result[f"{name}_mean_s"] <= values[-1]
        for result in measurement["repeats"]:
            # All came at once and stayed together: every decode step had all of them.
            assert result["decode_batch"] == batch
            rate = result["decode_tokens_per_s"]
            assert rate * result["decode_roof_s"] / batch == pytest.approx(
                result["decode_roof_share"]
            )

    shown = capsys.readouterr().out
    assert "decode, tokens/s" in shown
    assert "tiny: llama" in shown


def test_a_shared_prefix_is_found_in_the_cache(tmp_path: Path) -> None:
    flags = ("--batch", "3", "--prompt-len", "24", "--output-len", "2")
    report = run(tmp_path, *flags, "--shared-prefix", "0.5")
    assert report["measurements"][0]["median"]["cached_prompt_tokens"] == 3 * 12
    # All in common: the last token is computed, and with it its block.
    report = run(tmp_path, *flags, "--shared-prefix", "1")
    assert report["measurements"][0]["median"]["cached_prompt_tokens"] == 3 * 20


def test_repeats_find_nothing_of_each_other(tmp_path: Path) -> None:
    flags = ("--batch", "2,2", "--prompt-len", "16", "--output-len", "2", "--repeat", "2")
    for measurement in run(tmp_path, *flags)["measurements"]:
        assert [r["cached_prompt_tokens"] for r in measurement["repeats"]] == [0, 0]


def test_requests_come_at_a_rate(tmp_path: Path) -> None:
    flags = ("--batch", "2", "--prompt-len", "4", "--output-len", "3")
    report = run(tmp_path, *flags, "--rate", "50", "--num-requests", "6")
    (measurement,) = report["measurements"]
    assert measurement["median"]["generated_tokens"] == 6 * 3
    # The expected span of five gaps is 0.1 s; the seed's own is asked for.
    workload = bench.BenchSettings.model_validate(report["settings"]).workload(2)
    last = make_arrivals(workload, 211, 0)[-1]
    assert last.arrives_s > 0
    assert measurement["median"]["elapsed_s"] > last.arrives_s


def test_more_requests_than_the_batch_take_turns(tmp_path: Path) -> None:
    flags = ("--batch", "2", "--prompt-len", "4", "--output-len", "5", "--num-requests", "6")
    (measurement,) = run(tmp_path, *flags)["measurements"]
    assert measurement["median"]["generated_tokens"] == 6 * 5
    assert measurement["median"]["decode_batch"] == 2


def test_users_of_a_closed_loop(tmp_path: Path) -> None:
    flags = ("--concurrency", "1,2", "--prompt-len", "4", "--output-len", "5")
    one, two = run(tmp_path, *flags, "--think-s", "0.01")["measurements"]
    assert one["median"]["generated_tokens"] == 8 * 5
    assert two["median"]["generated_tokens"] == 16 * 5
    # One user: 8 answers with 8 pauses, each in a steady state of some of them.
    assert one["median"]["decode_batch"] == 1
    assert one["median"]["output_tokens_per_s"] < 5 / 0.005
    assert two["median"]["ttft_mean_s"] < two["median"]["e2el_mean_s"]


def test_more_users_than_seats_wait_for_their_turn(tmp_path: Path) -> None:
    flags = ("--concurrency", "4", "--max-num-seqs", "2", "--prompt-len", "4", "--output-len", "5")
    (measurement,) = run(tmp_path, *flags)["measurements"]
    assert measurement["median"]["generated_tokens"] == 4 * 8 * 5
    assert measurement["median"]["decode_batch"] <= 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--concurrency", "2", "--batch", "2"), "no --batch and no --rate"),
        (("--concurrency", "2", "--rate", "2"), "no --batch and no --rate"),
        (("--think-s", "1"), "give --concurrency too"),
        (("--concurrency", "2,4", "--num-requests", "15"), "4 users need at least 16"),
    ],
)
def test_settings_of_users_that_contradict(flags: tuple[str, ...], words: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(words)):
        bench.run(list(flags))


def test_a_small_cache_preempts_and_loses_nothing(tmp_path: Path) -> None:
    # A block holds 4 tokens of 2 layers: 1,024 bytes. Twelve of them, and three requests
    # that need seven each.
    gigabytes = str(12 * 1024 / 2**30)
    flags = ("--batch", "3", "--prompt-len", "12", "--output-len", "16")
    (measurement,) = run(tmp_path, *flags, "--kv-cache-gb", gigabytes)["measurements"]
    assert measurement["median"]["preemptions"] > 0
    assert measurement["median"]["generated_tokens"] == 3 * 16
    assert measurement["median"]["peak_blocks"] <= 12


def test_outputs_of_one_token_have_no_gaps(tmp_path: Path) -> None:
    report = run(tmp_path, "--batch", "2", "--prompt-len", "5", "--output-len", "1")
    result = report["measurements"][0]["median"]
    assert result["generated_tokens"] == 2
    assert result["itl_p50_s"] is result["decode_tokens_per_s"] is None
    assert result["prefill_tokens_per_s"] > 0


def test_random_weights_have_as_long_a_context_as_is_needed(tmp_path: Path) -> None:
    report = run(tmp_path, "--batch", "1", "--prompt-len", "60", "--output-len", "9")
    assert report["model"]["context_length"] == 69


def test_another_dtype_moves_other_bytes(tmp_path: Path) -> None:
    flags = ("--batch", "1", "--prompt-len", "4", "--output-len", "3", "--temperature", "1")
    report = run(tmp_path, *flags, "--dtype", "bfloat16", "--no-deterministic")
    assert report["model"]["dtype"] == "bfloat16"
    assert report["model"]["deterministic"] is False


def test_an_interrupt_shows_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, done = measure.run_workload, []

    def interrupted(*arguments: Any) -> measure.Run:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(whole(*arguments))
        return done[-1]

    monkeypatch.setattr(measure, "run_workload", interrupted)
    path = tmp_path / "bench.json"
    flags = ("--batch", "1,2,3", "--prompt-len", "4", "--output-len", "3", "--repeat", "2")
    status = bench.run(["--shape", "tiny", *flags, "--warmup", "0", "--json", str(path)])
    assert status == 130
    measurements = json.loads(path.read_text())["measurements"]
    assert [len(measurement["repeats"]) for measurement in measurements] == [2, 1]
    assert "decode, tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shape", "tiny", "--model", "x"], "--shape has random weights and --model"),
        (["--shape", "tiny", "--revision", "main"], "--revision is of a hub id"),
        (["--shape", "gpt5"], r"--shape 'gpt5' is none of gpt2, "),
        (["--batch", "1,0"], r"--batch '0': .*greater than or equal to 1"),
        (["--batch", "few"], r"--batch 'few': .*integer"),
        (["--batch", "65"], "--batch 65 is above --max-num-seqs 64"),
        (["--shared-prefix", "1.5"], r"--shared-prefix '1.5': .*less than or equal to 1"),
        (["--rate", "0"], r"--rate '0': .*greater than 0"),
        (["--json", "no/such/place.json"], "there is no such directory"),
    ],
)
def test_wrong_flags_are_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        bench.run(flags)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_the_context_is_said_with_the_numbers() -> None:
    with pytest.raises(CommandError, match=r"60 and --output-len 9 make 69 tokens; .* holds 32"):
        bench.run(
            ["--shape", "tiny", "--max-model-len", "32", "--prompt-len", "60", "--output-len", "9"]
        )
