"""The server as an operator puts it in front of strangers: keys, TLS, where it listens."""

from __future__ import annotations

import logging
import ssl
import stat
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import psutil
import pytest
import trustme

from service.api.keys import api_key_hash
from service.commands.door import (
    api_limits,
    check_tls,
    read_api_keys,
    read_origins,
    warn_if_open,
)
from service.engine_process import EngineProcess
from service.settings import Settings, SettingsError, read_settings
from tests.servers import Server, running_server


def settings(*flags: str) -> Settings:
    return read_settings(Settings, list(flags))


def test_it_listens_on_this_machine_only_unless_told() -> None:
    assert settings().host == "127.0.0.1"


@pytest.mark.parametrize(
    ("host", "has_keys", "has_tls", "words"),
    [
        ("127.0.0.1", False, False, ""),
        ("::1", False, False, ""),
        ("localhost", False, False, ""),
        ("0.0.0.0", False, True, "without API keys"),
        ("::", False, False, "without API keys"),
        ("10.0.0.1", True, False, "without TLS"),
        ("example.org", True, True, ""),
    ],
)
def test_an_open_door_is_warned_of(
    caplog: pytest.LogCaptureFixture, host: str, has_keys: bool, has_tls: bool, words: str
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_if_open(host, has_keys=has_keys, has_tls=has_tls)
    assert (words in caplog.text) if words else not caplog.text


def test_keys_of_a_file_and_of_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\nalice:one\n")
    keys = read_api_keys(path, "bob:two, three")
    assert [key.name for key in keys] == ["alice", "bob", "key-4"]
    assert keys[2].digest == api_key_hash("three")
    assert read_api_keys(None) == ()


@pytest.mark.parametrize(
    ("content", "from_environment", "words"),
    [
        (None, None, "No such file"),
        (b"", None, "holds no key"),
        (b"# none\n", None, "holds no key"),
        (b"\xff", None, "utf-8"),
        (b"alice:one", "alice:two", "'alice' stands on several"),
        (b"alice:one", "b b:two", "VITRINE_API_KEYS: line 1: the name"),
    ],
)
def test_keys_that_are_none_stop_the_server(
    tmp_path: Path, content: bytes | None, from_environment: str | None, words: str
) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=words):
        read_api_keys(path, from_environment)


def test_limits_of_keys_need_keys() -> None:
    for flag in ("--max-requests-per-key", "--max-tokens-per-minute-per-key"):
        with pytest.raises(SettingsError, match="need --api-key-file"):
            api_limits(settings(flag, "5"))
        assert api_limits(settings(flag, "5", "--api-keys", "a:one")).api_keys


@pytest.mark.parametrize("wrong", ["example.org", "https://a.example/", "HTTPS://A", "null"])
def test_an_origin_that_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(SettingsError, match="an origin is"):
        read_origins(f"https://a.example,{wrong}")
    assert read_origins(" https://a.example, http://b:81") == ("https://a.example", "http://b:81")


def test_a_drawn_key_opens_the_server_and_another_does_not(tmp_path: Path) -> None:
    drawn = subprocess.run(
        [sys.executable, "-m", "service", "keys", "alice", "bob"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    key = drawn[0].removeprefix("key:").strip()
    lines = [line.removeprefix("line:").strip() for line in drawn[1::2]]
    path = tmp_path / "keys"
    path.write_text("\n".join(lines))
    with running_server(tmp_path, "--api-key-file", str(path), "--threads", "1") as server:
        for presented, status in ((key, 200), (key[:-1], 401), (lines[0].rpartition(":")[2], 401)):
            headers = {"authorization": f"Bearer {presented}"}
            assert httpx2.get(f"{server.url}/info", headers=headers).status_code == status
        assert httpx2.get(f"{server.url}/info").status_code == 401


def test_a_name_that_is_no_word_has_no_key() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "service", "keys", "a b"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "the name must be" in done.stderr


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


def wait_for_https(server: Server, context: ssl.SSLContext) -> httpx2.Response:
    deadline = time.monotonic() + 60
    while True:
        try:
            return httpx2.get(
                server.url.replace("http:", "https:") + "/health/live", verify=context, timeout=5
            )
        except httpx2.TransportError:
            assert server.process.poll() is None, server.log.read_text()
            assert time.monotonic() < deadline, server.log.read_text()
            time.sleep(0.05)


def test_tls_and_certificates_of_clients(tmp_path: Path, authority: trustme.CA) -> None:
    own = authority.issue_cert("127.0.0.1")
    cert, key, ca = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "ca.pem"
    own.cert_chain_pems[0].write_to_path(cert)
    own.private_key_pem.write_to_path(key)
    authority.cert_pem.write_to_path(ca)
    known, stranger = ssl.create_default_context(cafile=ca), ssl.create_default_context(cafile=ca)
    authority.issue_cert("client").configure_cert(known)
    flags = ("--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(ca))
    with running_server(tmp_path, *flags, "--threads", "1", ready=False) as server:
        assert wait_for_https(server, known).json() == {"status": "live"}
        url = server.url.replace("http:", "https:") + "/health/live"
        with pytest.raises(httpx2.TransportError):
            httpx2.get(url, verify=stranger)
        with pytest.raises(httpx2.TransportError):
            httpx2.get(server.url + "/health/live")
        with pytest.raises(httpx2.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx2.get(url)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tls-key", "key.pem"], "need --tls-cert"),
        (["--tls-client-ca", "ca.pem"], "need --tls-cert"),
    ],
)
def test_tls_settings_that_mean_nothing_are_refused(flags: list[str], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        check_tls(settings(*flags))


def test_certificates_that_are_none_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("no certificate")
    done = subprocess.run(
        [sys.executable, "-m", "service", "serve", "--port", "0", "--tls-cert", "cert.pem"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path.cwd()), "PATH": ""},
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "vitrine serve: --tls-cert" in done.stderr.splitlines()[-1]


def test_nobody_else_can_open_the_socket_between_the_processes(tmp_path: Path) -> None:
    """It has no name: it is one of a pair that the engine inherited."""
    with running_server(tmp_path, "--threads", "1") as server:
        command = server.engine.cmdline()
        folder = Path(command[-1])
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert {one.name for one in folder.iterdir()} == {"step"}
        for process in (server.engine, psutil.Process(server.process.pid)):
            unix = process.net_connections(kind="unix")
            assert unix, "no socket between them"
            assert {one.laddr for one in unix} == {""}
        assert server.stop() == 0
        assert not folder.exists()


def test_the_engine_process_knows_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRINE_API_KEYS", "alice:one")
    monkeypatch.setenv("VITRINE_LOG_LEVEL", "warning")
    engine = EngineProcess.spawn()
    try:
        # Amid exec the system shows none for a moment.
        while not (environment := psutil.Process(engine.process.pid).environ()):
            time.sleep(0.01)
    finally:
        engine.end(0.0)
    assert environment["VITRINE_LOG_LEVEL"] == "warning"
    assert "VITRINE_API_KEYS" not in environment
