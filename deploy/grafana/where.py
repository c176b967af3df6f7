"""CPU or GPU: where the time goes, and how near the engine is to what its machine can do."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from deploy.grafana.panels import bars, graph, number, page, quotient, rate
from deploy.grafana.steps import mean

PARTS = "vitrine_engine_part_seconds_total"
STEP_S = "vitrine_step_seconds_sum"


def where() -> Dashboard:
    dashboard = page(
        "vitrine-where",
        "Vitrine: CPU or GPU, where the time goes",
        "The engine's second, taken apart; bandwidth and operations beside the roofline.",
    )
    for add in (_figures, _second, _machine, _requests):
        add(dashboard)
    return dashboard


def _figures(dashboard: Dashboard) -> None:
    own = rate(PARTS).replace("{@}", '{@, part=~"schedule|build|book"}')
    for title, text, unit, expr in (
        (
            "Share of the roofline",
            "Least time that the machine would need for the steps, over the time they took.",
            "percentunit",
            "avg(vitrine:roofline_ratio{@})",
        ),
        (
            "Bytes read",
            "Weights, keys and values that steps had to read, over their time.",
            "binBps",
            "avg(vitrine:read_bytes_per_second{@})",
        ),
        (
            "Operations done",
            "Products and attention that steps had to do, over their time.",
            "flops",
            "avg(vitrine:flops_per_second{@})",
        ),
        (
            "Engine's own share of a step",
            "Scheduling, building the batch, booking: what is neither forward nor sampling.",
            "percentunit",
            f"{own} / {rate(PARTS)}",
        ),
    ):
        dashboard.with_panel(number(title, text, unit, expr, span=6))


def _second(dashboard: Dashboard) -> None:
    parts = rate(PARTS, "part")
    dashboard.with_row(Row("The engine's second"))
    dashboard.with_panel(
        graph(
            "What the engine does",
            "Seconds of each second. On a GPU forward is the launch of kernels, and sample has the "
            "wait for them. Idle: no request, or waiting for one.",
            "percentunit",
            {
                "{{part}}": parts,
                "idle": f"clamp_min(count(vitrine_engine_up{{@}}) - {rate(PARTS)}, 0)",
            },
            span=12,
            stacked=True,
        )
    )
    share = f"{parts} / on() group_left() {rate(PARTS)}"
    dashboard.with_panel(
        bars("Parts of a step", "Shares.", "percentunit", share, "{{part}}", span=6)
    )
    dashboard.with_panel(
        graph(
            "Steps by phase",
            "Seconds of each second spent in steps of each phase.",
            "percentunit",
            {"{{phase}}": rate(STEP_S, "phase")},
            span=6,
            stacked=True,
        )
    )


def _machine(dashboard: Dashboard) -> None:
    roof_bytes = "max(vitrine_roofline_read_bytes_per_second{@})"
    roof_flops = "max(vitrine_roofline_flops_per_second{@})"
    read_bytes, flops = "vitrine_step_read_bytes_total", "vitrine_step_flops_total"
    dashboard.with_row(Row("Against the machine"))
    dashboard.with_panel(
        graph(
            "Memory read",
            "By phase, beside the most that was measured. Decodes of few sequences live here.",
            "binBps",
            {"{{phase}}": quotient(read_bytes, STEP_S, "phase"), "roof": roof_bytes},
        )
    )
    dashboard.with_panel(
        graph(
            "Operations",
            "By phase, beside the most that was measured. Prompts and large batches live here.",
            "flops",
            {"{{phase}}": quotient(flops, STEP_S, "phase"), "roof": roof_flops},
            log=True,
        )
    )
    dashboard.with_panel(
        graph(
            "Share of the roofline by phase",
            "The nearer of the two bounds, by phase. What is missing goes into the engine's own "
            "work, into kernels, or to others on the machine.",
            "percentunit",
            {"{{phase}}": quotient("vitrine_step_roofline_seconds_total", STEP_S, "phase")},
        )
    )
    dashboard.with_panel(
        graph(
            "Operations per byte",
            "Steps below the machine's balance wait for memory, those above for arithmetic.",
            "short",
            {
                "{{phase}}": quotient(flops, read_bytes, "phase"),
                "the machine's balance": f"{roof_flops} / {roof_bytes}",
            },
            log=True,
        )
    )
    dashboard.with_panel(
        graph(
            "Processors",
            "Cores' worth of work of the two processes.",
            "short",
            {"{{process}}": rate("vitrine_process_cpu_seconds_total", "process")},
            stacked=True,
        )
    )
    dashboard.with_panel(
        graph(
            "Machine busy",
            "All cores, or the GPU's kernels.",
            "percentunit",
            {"{{device}}": "avg by (device) (vitrine_device_utilization_ratio{@})"},
            top=1,
        )
    )


def _requests(dashboard: Dashboard) -> None:
    decode_step = mean("vitrine_step_seconds").replace("{@}", '{@, phase="decode"}')
    dashboard.with_row(Row("A request's time"))
    dashboard.with_panel(
        graph(
            "Queue, prefill, decode",
            "Means, stacked: what a sequence's time goes into.",
            "s",
            {
                part: mean(f"vitrine_request_{part}_seconds")
                for part in ("queue", "prefill", "decode")
            },
            stacked=True,
        )
    )
    dashboard.with_panel(
        graph(
            "Step and gap",
            "A decode step's mean, and the mean gap between tokens: what lies between the two are "
            "messages, prompts of others and waiting.",
            "s",
            {"decode step": decode_step, "gap": mean("vitrine_inter_token_latency_seconds")},
        )
    )
    dashboard.with_panel(
        graph(
            "Memory",
            "Of the device, in use and there.",
            "bytes",
            {
                "{{device}} in use": "sum by (device) (vitrine_device_memory_used_bytes{@})",
                "{{device}}": "sum by (device) (vitrine_device_memory_bytes{@})",
            },
        )
    )
