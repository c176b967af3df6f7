"""Flags and environment variables: the same names, the same bounds, nothing ignored."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.commands.http_server import served_name
from service.engine.messages import Measured
from service.metric_aliases import AliasError, parse_aliases
from service.settings import (
    Settings,
    SettingsError,
    engine_config,
    given_roofline,
    read_settings,
)


def test_a_flag_beats_the_environment_and_that_beats_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert read_settings(Settings, []).port == 8000
    monkeypatch.setenv("VITRINE_PORT", "9001")
    assert read_settings(Settings, []).port == 9001
    assert read_settings(Settings, ["--port", "9002"]).port == 9002


def test_every_setting_is_an_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRINE_MAX_NUM_SEQS", "3")
    monkeypatch.setenv("VITRINE_DETERMINISTIC", "false")
    monkeypatch.setenv("VITRINE_KV_CACHE_GB", "0.5")
    settings = read_settings(Settings, [])
    config = engine_config(settings, Path("m"))
    assert (config.max_num_seqs, config.deterministic) == (3, False)
    assert config.kv_cache_bytes == 2**29


def test_a_misspelt_variable_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRINE_MODLE", "x")
    with pytest.raises(SettingsError, match="VITRINE_MODLE is not a setting"):
        read_settings(Settings, [])


def test_a_wrong_value_is_refused_with_the_flag_the_value_and_the_limit() -> None:
    with pytest.raises(SettingsError, match=r"--port '70000': .* less than or equal to 65535"):
        read_settings(Settings, ["--port", "70000"])


def test_a_roofline_is_measured_or_given_and_nothing_else() -> None:
    assert given_roofline("idle") is None
    assert given_roofline("off") is None
    assert given_roofline("40e9,5e11") == Measured(40e9, 5e11)
    for wrong in ("", "on", "40e9", "1,2,3", "0,1", "-1,1", "inf,1", "nan,1"):
        with pytest.raises(SettingsError, match=r"--roofline"):
            given_roofline(wrong)


def test_only_the_server_asks_its_engine_to_measure() -> None:
    settings = read_settings(Settings, [])
    assert not engine_config(settings, Path("m")).measure_roofline


def test_other_names_of_metrics_are_known_ones() -> None:
    assert parse_aliases("") == ()
    assert parse_aliases("otel, gateway") == ("otel", "gateway")
    with pytest.raises(AliasError, match="'vllm' is none of otel, gateway"):
        parse_aliases("vllm")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read_settings(Settings, []).port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], "stories"),
        (["--model", "org/name"], "org/name"),
        (["--model", "a" * 300], "a" * 300),
        (["--model", "."], Path.cwd().name),
        (["--model", str(Path.cwd()) + "/"], Path.cwd().name),
        (["--model", ".", "--served-model-name", "my/own"], "my/own"),
    ],
)
def test_what_clients_call_the_model(arguments: list[str], name: str) -> None:
    assert served_name(read_settings(Settings, arguments)) == name
