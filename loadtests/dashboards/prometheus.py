"""A real Prometheus with our configuration, and what is asked of it over its HTTP API."""

from __future__ import annotations

import math
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import yaml

CONFIG = Path(__file__).parents[2] / "deploy" / "prometheus" / "prometheus.yml"
START_LIMIT_S = 30.0
MISSING = "prometheus is not installed: `make observability-tools` installs Debian's"


class PrometheusError(Exception):
    """It is not there, did not start, or refused a query; the message says which."""


@dataclass(frozen=True, slots=True)
class Series:
    """What a query gave: series, and numbers in them that are some."""

    num_series: int
    num_points: int


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A running one."""

    url: str

    def get(self, path: str, parameters: Mapping[str, Any]) -> Any:
        """The `data` of an answer. Raises `PrometheusError` with Prometheus' own words."""
        answer = httpx2.get(f"{self.url}/api/v1/{path}", params=dict(parameters), timeout=30)
        body = answer.json()
        if body["status"] != "success":
            raise PrometheusError(f"{body['errorType']}: {body['error']}")
        return body["data"]

    def over(self, expr: str, start_s: float, end_s: float, step_s: float) -> Series:
        """A query over a time (Unix seconds). NaN, as of a quotient of nothing, is no number."""
        found = self.get(
            "query_range", {"query": expr, "start": start_s, "end": end_s, "step": step_s}
        )["result"]
        points = [
            [value for _, value in series["values"] if math.isfinite(float(value))]
            for series in found
        ]
        return Series(sum(map(bool, points)), sum(map(len, points)))

    def has(self, metric: str) -> bool:
        """Whether there ever was a series of this name."""
        return bool(self.get("series", {"match[]": metric}))

    def rules(self) -> list[dict[str, Any]]:
        """All rules, with their health, as Prometheus tells."""
        groups = self.get("rules", {})["groups"]
        return [rule for group in groups for rule in group["rules"]]


@contextmanager
def running_prometheus(target: str) -> Iterator[Prometheus]:
    """One that scrapes `target` (host:port) with our configuration and rules, until the end.
    Raises `PrometheusError`."""
    binary = shutil.which("prometheus")
    if binary is None:
        raise PrometheusError(MISSING)
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="prometheus-") as name:
        folder = Path(name)
        (folder / "prometheus.yml").write_text(config_for(target))
        log = folder / "log"
        command = [
            binary,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--enable-feature=exemplar-storage",
        ]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=dict(os.environ))
        try:
            prometheus = Prometheus(f"http://127.0.0.1:{port}")
            _wait_ready(process, prometheus, log)
            yield prometheus
        finally:
            process.terminate()
            process.wait(20)


def config_for(target: str) -> str:
    """deploy/prometheus/prometheus.yml, with another target and absolute paths."""
    config = yaml.safe_load(CONFIG.read_text())
    config["rule_files"] = [str(CONFIG.parent / name) for name in config["rule_files"]]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [target]}]
    return yaml.safe_dump(config)


def scrape_interval_s() -> float:
    """As configured, in seconds."""
    return float(yaml.safe_load(CONFIG.read_text())["global"]["scrape_interval"].removesuffix("s"))


def _wait_ready(process: subprocess.Popen[bytes], prometheus: Prometheus, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if httpx2.get(f"{prometheus.url}/-/ready", timeout=5).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.1)
    raise PrometheusError(f"it did not start:\n{log.read_text()[-2000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
