"""`make audit`: known vulnerabilities in what is installed here, by pip-audit.

Exit status 1 when there is one. Where the advisory service cannot be reached (no network, or an
index that has no advisories) it says loudly that nothing was audited, and 0: a build without a
network must not fail for that, and must not look audited either.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

PROBE = "starlette"  # something that is always installed, asked for first


class UnreachableError(Exception):
    """The advisory service gave no answer."""


def pip_audit(*flags: str) -> list[dict[str, Any]]:
    """The packages that pip-audit looked at, each with `vulns` or a `skip_reason`."""
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    try:
        found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (json.JSONDecodeError, KeyError):
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise UnreachableError(lines[-1][:300]) from None
    return found


def probe() -> None:
    """Ask for one package. Raises `UnreachableError`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "requirements.txt"
        path.write_text(f"{PROBE}=={version(PROBE)}\n")
        (package,) = pip_audit("--requirement", str(path), "--no-deps", "--disable-pip")
    if "skip_reason" in package:
        raise UnreachableError(package["skip_reason"])


def main() -> int:
    """Audit, and say what was found."""
    try:
        probe()
        packages = pip_audit("--local", "--skip-editable")
    except UnreachableError as error:
        print(f"\n*** NOT AUDITED: no advisories could be had here ({error}) ***\n")
        return 0
    for package in packages:
        if "skip_reason" in package:
            print(f"not audited: {package['name']}: {package['skip_reason']}")
        for one in package.get("vulns", ()):
            fixed = ", ".join(one["fix_versions"]) or "no version yet"
            print(f"{package['name']} {package['version']}: {one['id']}, fixed in {fixed}")
    num_vulnerable = sum(bool(package.get("vulns")) for package in packages)
    num_audited = sum("skip_reason" not in package for package in packages)
    print(f"{num_audited} packages audited, {num_vulnerable} with known vulnerabilities")
    return 1 if num_vulnerable else 0


if __name__ == "__main__":
    sys.exit(main())
