"""Panels as our dashboards have them, on the builders of Grafana's own SDK: what they know of types
and units is Grafana's, so that a field that it would not understand cannot be written."""

from __future__ import annotations

from collections.abc import Mapping

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    timeseries,
)
from grafana_foundation_sdk.models.common import (
    GraphGradientMode,
    LegendDisplayMode,
    LegendPlacement,
    ScaleDistribution,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
# In every query: the servers chosen at the top of the page.
CHOSEN = 'job=~"$job", instance=~"$instance"'
RATE = "[$__rate_interval]"
HEIGHT = 8  # in Grafana's rows


def rate(metric: str, *labels: str) -> str:
    """A counter's growth per second, of all servers chosen together, by these labels."""
    by = f" by ({', '.join(labels)}) " if labels else ""
    return f"sum{by}(rate({metric}{{@}}{RATE}))"


def quotient(over: str, under: str, *labels: str) -> str:
    """What one counter grew by for each unit that another did."""
    return f"{rate(over, *labels)} / {rate(under, *labels)}"


def query(expr: str, legend: str = "", *, exemplar: bool = False) -> prometheus.Dataquery:
    """A query over the time that is shown. In `expr`, `@` stands for the servers chosen."""
    return (
        prometheus.Dataquery()
        .datasource(SOURCE)
        .expr(" ".join(expr.split()).replace("@", CHOSEN))
        .legend_format(legend or "__auto")
        .range()
        .exemplar(exemplar)
    )


def graph(
    title: str,
    text: str,
    unit: str,
    queries: Mapping[str, str],
    *,
    span: int = 8,
    stacked: bool = False,
    log: bool = False,
    top: float | None = None,
    exemplars: bool = False,
) -> timeseries.Panel:
    """Lines over time, by legend; `stacked` ones add up to something."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(text)
        .datasource(SOURCE)
        .unit(unit)
        .span(span)
        .height(HEIGHT)
        .min(0)
        .line_width(1)
        .fill_opacity(60 if stacked else 10)
        .gradient_mode(GraphGradientMode.NONE)
        .show_points(VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    )
    if stacked:
        panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    if log:
        panel.scale_distribution(
            common.ScaleDistributionConfig().type(ScaleDistribution.LOG).log(10)
        )
    if top is not None:
        panel.max(top)
    for number, (legend, expr) in enumerate(queries.items()):
        panel.with_target(query(expr, legend, exemplar=exemplars).ref_id(chr(ord("A") + number)))
    return panel


def number(title: str, text: str, unit: str, expr: str, *, span: int = 4) -> stat.Panel:
    """One figure, as it is now, with its past behind it."""
    return (
        stat.Panel()
        .title(title)
        .description(text)
        .datasource(SOURCE)
        .unit(unit)
        .span(span)
        .height(4)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .with_target(query(expr).ref_id("A"))
    )


def bars(title: str, text: str, unit: str, expr: str, legend: str, *, span: int) -> bargauge.Panel:
    """The latest values beside each other."""
    return (
        bargauge.Panel()
        .title(title)
        .description(text)
        .datasource(SOURCE)
        .unit(unit)
        .span(span)
        .height(HEIGHT)
        .min(0)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .with_target(query(expr, legend).ref_id("A"))
    )


def states(title: str, text: str, expr: str, legend: str, *, span: int) -> statetimeline.Panel:
    """Which of several states was when."""
    return (
        statetimeline.Panel()
        .title(title)
        .description(text)
        .datasource(SOURCE)
        .span(span)
        .height(HEIGHT)
        .show_value(VisibilityMode.NEVER)
        .with_target(query(expr, legend).ref_id("A"))
    )


def spread(title: str, text: str, unit: str, metric: str, *, span: int = 12) -> heatmap.Panel:
    """All buckets of a histogram over time."""
    expr = f"sum by (le) (increase({metric}_bucket{{@}}[$__rate_interval]))"
    return (
        heatmap.Panel()
        .title(title)
        .description(text)
        .datasource(SOURCE)
        .span(span)
        .height(HEIGHT)
        .calculate(False)
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges"))
        .with_target(query(expr, "{{le}}").format(PromQueryFormat.HEATMAP).ref_id("A"))
    )


def page(uid: str, title: str, text: str) -> dashboard.Dashboard:
    """An empty dashboard with the choice of servers."""
    return (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(text)
        .tags(["vitrine"])
        .refresh("10s")
        .time("now-30m", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .readonly()
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
        .with_variable(_choice("job", "label_values(vitrine_build_info, job)"))
        .with_variable(
            _choice("instance", 'label_values(vitrine_build_info{job=~"$job"}, instance)')
        )
        .link(
            dashboard.DashboardLink("Vitrine")
            .type(DashboardLinkType.DASHBOARDS)
            .tags(["vitrine"])
            .as_dropdown(True)
            .keep_time(True)
            .include_vars(True)
        )
    )


def _choice(name: str, values: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(name.capitalize())
        .datasource(SOURCE)
        .query(values)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(selected=True, text=["All"], value=["$__all"]))
    )
