"""`make audit`: a vulnerability fails it, and a service that gives no answer is said loudly."""

from __future__ import annotations

from typing import Any

import pytest

from deploy import audit

SOUND = {"name": "starlette", "version": "1.0", "vulns": []}
HOLED = {"name": "a", "version": "1.0", "vulns": [{"id": "CVE-1", "fix_versions": ["1.1"]}]}
SKIPPED = {"name": "own", "skip_reason": "not on the index"}


def answers(*results: list[dict[str, Any]]) -> Any:
    left = list(results)
    return lambda *flags: left.pop(0)


def test_a_known_vulnerability_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "pip_audit", answers([SOUND], [SOUND, HOLED, SKIPPED]))
    assert audit.main() == 1
    said = capsys.readouterr().out
    assert "a 1.0: CVE-1, fixed in 1.1" in said
    assert "not audited: own: not on the index" in said
    assert "2 packages audited, 1 with known vulnerabilities" in said


def test_none_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "pip_audit", answers([SOUND], [SOUND]))
    assert audit.main() == 0


def test_an_index_without_advisories_is_not_an_audit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "pip_audit", answers([SKIPPED]))
    assert audit.main() == 0
    assert "*** NOT AUDITED" in capsys.readouterr().out


def test_no_network_is_not_an_audit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert audit.main() == 0
    assert "*** NOT AUDITED" in capsys.readouterr().out
