"""Scrape configuration, rules and alerts, by Prometheus' own tools and against our vocabulary."""

from __future__ import annotations

import re
from typing import Any

import yaml

from loadtests.dashboards.queries import metrics_in
from service.metrics import SECTIONS, vocabulary
from tests.deploy.tools import PROMETHEUS, ROOT, RULES, promtool


def test_the_configuration_and_the_rules_are_valid() -> None:
    assert "SUCCESS" in promtool("check", "config", PROMETHEUS / "prometheus.yml")
    promtool("check", "rules", *RULES)


def test_rules_and_alerts_do_what_their_tests_say() -> None:
    promtool("test", "rules", *sorted((PROMETHEUS / "tests").glob("*.yml")))


def read_rules() -> list[dict[str, Any]]:
    return [
        rule
        for path in RULES
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
    ]


def known_names() -> set[str]:
    """Every name that a query may use: our metrics, histograms in three, and the rules'."""
    names = {rule["record"] for rule in read_rules() if "record" in rule}
    for section in SECTIONS:
        for one in vocabulary(section):
            suffixes = ("_bucket", "_sum", "_count") if one.kind == "histogram" else ("",)
            names |= {one.full_name + suffix for suffix in suffixes}
    return names


def test_rules_use_metrics_that_there_are() -> None:
    for rule in read_rules():
        assert metrics_in(rule["expr"]) <= known_names(), rule


def test_every_alert_is_on_the_page_and_tested_both_ways() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    tests = yaml.safe_load((PROMETHEUS / "tests" / "alerts.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    for rule in read_rules():
        if (name := rule.get("alert")) is None:
            continue
        assert name in page or name.removesuffix("Slow") in page, name
        fired = {bool(case["exp_alerts"]) for case in cases if case["alertname"] == name}
        assert fired == {True, False}, f"{name}: no test in which it fires, or none in which not"


def test_the_goal_of_first_tokens_is_a_bound_of_the_histogram() -> None:
    from service.buckets import FIRST_TOKEN_SECONDS

    bounds = re.findall(r'le="([^"]+)"', RULES[0].read_text())
    assert bounds
    # As prometheus_client writes a bound: 2.0, never 2.
    assert {str(float(bound)) for bound in bounds} == set(bounds)
    assert {float(bound) for bound in bounds} <= set(FIRST_TOKEN_SECONDS)
