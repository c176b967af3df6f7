"""The dashboards: as built, as Grafana's types have them, on metrics that there are. Whether a
panel shows something is for `python -m loadtests.dashboards`, which the last test runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.build import files
from loadtests.dashboards.queries import interpolated, metrics_in, read_queries, read_variables
from service.metrics import SECTIONS, vocabulary
from tests.deploy.test_prometheus import known_names
from tests.deploy.tools import GRAFANA, ROOT, RULES, need, promtool

FILES = sorted((GRAFANA / "dashboards").glob("*.json"))
COLUMNS = 24


def test_the_files_are_what_the_code_builds() -> None:
    built = files()
    assert {path.name for path in FILES} == set(built)
    for path in FILES:
        assert path.read_text() == built[path.name], "run: python -m deploy.grafana.build"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_grafana_s_own_types_know_every_field(path: Path) -> None:
    """What they do not know is lost on the way through them."""
    register_default_plugins()
    written = json.loads(path.read_text())
    read = Dashboard.from_json(written)
    assert json.loads(JSONEncoder().encode(read)) == written


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_panels_say_what_they_show_and_do_not_overlap(path: Path) -> None:
    taken: dict[tuple[int, int], str] = {}
    titles: list[str] = []
    for panel in json.loads(path.read_text())["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= COLUMNS
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                other = taken.setdefault((x, y), panel["title"])
                assert other == panel["title"], f"{panel['title']} lies over {other}"
        if panel["type"] != "row":
            titles.append(panel["title"])
            assert panel["description"], panel["title"]
            assert panel["targets"], panel["title"]
            assert panel["datasource"]["uid"] == "${datasource}"
    assert len(titles) == len(set(titles)), "two panels of one name"


def test_queries_use_metrics_that_there_are_of_the_servers_chosen() -> None:
    for query in read_queries():
        used = metrics_in(query.expr)
        assert used, query
        assert used <= known_names(), query
        # Each of them of the servers that were chosen at the top of the page.
        assert query.expr.count('instance=~"$instance"') >= len(used), query


def test_all_that_people_must_see_is_on_a_dashboard() -> None:
    """Every metric is on a panel, or in a rule that is, or is here with a reason."""
    shown = {name for query in read_queries() for name in metrics_in(query.expr)}
    rules = [
        rule
        for path in RULES
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
    ]
    shown |= {name for rule in rules for name in metrics_in(rule["expr"])}
    elsewhere = {
        "vitrine_build_info",  # fills the choice of servers
        "vitrine_model_info",  # for joins
        "vitrine_engine_steps_total",  # step_seconds_count has them by phase
        "vitrine_detachable_bytes",
    }
    for section in SECTIONS:
        for one in vocabulary(section):
            names = {one.full_name + suffix for suffix in ("", "_bucket", "_sum", "_count")}
            assert bool(names & shown) != (one.full_name in elsewhere), one.full_name


def test_provisioning_points_where_the_files_go() -> None:
    (source,) = yaml.safe_load(
        (GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text()
    )["datasources"]
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
    scrape = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == scrape["global"]["scrape_interval"]
    (provider,) = yaml.safe_load(
        (GRAFANA / "provisioning" / "dashboards" / "vitrine.yml").read_text()
    )["providers"]
    assert provider["options"]["path"] in (ROOT / "docs" / "metrics.md").read_text()


# What the GPU's queries give for 350 W, 40 of 80 bytes and 70 tokens a second. There is no GPU
# where this is tested: Prometheus is given the series that a server with one would have.
GPU_SERIES = {
    'vitrine_device_power_watts{job="v", instance="a", device="cuda:0"}': "350x40",
    'vitrine_device_energy_joules_total{job="v", instance="a", device="cuda:0"}': "0+1750x40",
    'vitrine_device_memory_used_bytes{job="v", instance="a", device="cuda:0"}': "40x40",
    'vitrine_device_memory_bytes{job="v", instance="a", device="cuda:0"}': "80x40",
    'vitrine_device_memory_bytes{job="v", instance="a", device="cpu"}': "1000x40",
    'vitrine_device_utilization_ratio{job="v", instance="a", device="cuda:0"}': "0.75x40",
    'vitrine_device_utilization_ratio{job="v", instance="a", device="cpu"}': "0.1x40",
    'vitrine_generated_tokens_total{job="v", instance="a"}': "0+350x40",
    'vitrine:roofline_ratio{job="v", instance="a"}': "0.5x40",
}
GPU_VALUES = {
    ("Power now", ""): 350,
    ("Energy of a token", ""): 5,
    ("Memory in use", ""): 0.5,
    ("Power", "{{instance}} {{device}}"): 350,
    ("Busy", "{{instance}} {{device}}"): 0.75,
    ("Busy", "share of the roofline"): 0.5,
    ("Energy of a thousand tokens", "joules"): 5000,
}


def test_what_the_gpu_s_queries_would_show(tmp_path: Path) -> None:
    queries = [query for query in read_queries() if query.dashboard == "vitrine-gpu"]
    found = {(query.panel, query.legend.removeprefix("__auto")): query for query in queries}
    assert set(found) == set(GPU_VALUES)
    cases: list[dict[str, Any]] = [
        {
            "expr": f"max({interpolated(found[key].expr, 5)})",
            "eval_time": "2m",
            "exp_samples": [{"labels": "{}", "value": value}],
        }
        for key, value in GPU_VALUES.items()
    ]
    series = [{"series": name, "values": values} for name, values in GPU_SERIES.items()]
    test = {"interval": "5s", "input_series": series, "promql_expr_test": cases}
    (tmp_path / "gpu.yml").write_text(yaml.safe_dump({"rule_files": [], "tests": [test]}))
    promtool("test", "rules", tmp_path / "gpu.yml")


def test_variables_are_filled_from_prometheus() -> None:
    assert {label for label, _ in read_variables()} == {"job", "instance"}


@pytest.mark.slow
def test_no_panel_is_empty_and_no_alert_blind() -> None:
    need("prometheus")
    command = [sys.executable, "-m", "loadtests.dashboards", "--seconds", "30", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "0 empty, 0 errors" in done.stdout
