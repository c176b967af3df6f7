"""What only a GPU tells (NVML): power and energy, and what a token costs of them."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from deploy.grafana.panels import graph, number, page, quotient

# Joules for a token.
ENERGY = quotient("vitrine_device_energy_joules_total", "vitrine_generated_tokens_total")


def gpu() -> Dashboard:
    used, there = (
        f'sum({name}{{@, device!="cpu"}})'
        for name in ("vitrine_device_memory_used_bytes", "vitrine_device_memory_bytes")
    )
    return (
        page(
            "vitrine-gpu",
            "Vitrine: GPU",
            "Needs a server with a GPU and vitrine[gpu]; empty for all others.",
        )
        .with_panel(
            number(
                "Power now", "Of all GPUs.", "watt", "sum(vitrine_device_power_watts{@})", span=8
            )
        )
        .with_panel(number("Energy of a token", "Generated ones.", "joule", ENERGY, span=8))
        .with_panel(number("Memory in use", "Share.", "percentunit", f"{used} / {there}", span=8))
        .with_panel(
            graph(
                "Power",
                "Of each GPU.",
                "watt",
                {"{{instance}} {{device}}": "vitrine_device_power_watts{@}"},
            )
        )
        .with_panel(
            graph(
                "Busy",
                "Share of the time in which a kernel ran; how full it was is the share of the "
                "roofline.",
                "percentunit",
                {
                    "{{instance}} {{device}}": 'vitrine_device_utilization_ratio{@, device!="cpu"}',
                    "share of the roofline": "avg(vitrine:roofline_ratio{@})",
                },
                top=1,
            )
        )
        .with_panel(
            graph(
                "Energy of a thousand tokens",
                "Generated ones; prompts are paid with them.",
                "joule",
                {"joules": f"1000 * {ENERGY}"},
            )
        )
    )
