"""Our histogram counts as the library's does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from service.buckets import FIRST_TOKEN_SECONDS, REQUEST_SECONDS, TOKEN_SECONDS, Distribution
from service.metric_families import histogram

DESCRIBED = histogram("some_seconds", "Some.", TOKEN_SECONDS, "phase")


@given(st.lists(st.one_of(st.sampled_from(TOKEN_SECONDS), st.floats(0, 20)), max_size=30))
def test_as_the_library_counts(values: list[float]) -> None:
    ours, registry = Distribution(TOKEN_SECONDS), CollectorRegistry()
    theirs = DESCRIBED.to_histogram(registry).labels("x")
    for value in values:
        ours.observe(value)
        theirs.observe(value)
    (family,) = registry.collect()
    shown = DESCRIBED.show_distributions([(("x",), ours)])
    assert [(s.name, s.labels, s.value) for s in shown.samples] == [
        (s.name, s.labels, s.value) for s in family.samples
    ]


def test_bounds_begin_at_half_a_millisecond_and_goals_are_among_them() -> None:
    for bounds in (TOKEN_SECONDS, FIRST_TOKEN_SECONDS, REQUEST_SECONDS):
        assert bounds[0] == 0.0005
        assert list(bounds) == sorted(set(bounds))
    assert {0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0} <= set(FIRST_TOKEN_SECONDS)
    assert (TOKEN_SECONDS[-1], FIRST_TOKEN_SECONDS[-1], REQUEST_SECONDS[-1]) == (10, 100, 1000)
