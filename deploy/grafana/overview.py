"""Is it well? Rate, errors, duration, saturation."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from deploy.grafana.panels import RATE, graph, number, page, rate, spread


def quantiles(metric: str, *shares: float) -> dict[str, str]:
    """Quantiles of a histogram, by their names in a legend."""
    return {
        f"p{100 * share:g}": f"histogram_quantile({share}, "
        f"sum by (le) (rate({metric}_bucket{{@}}{RATE})))"
        for share in shares
    }


def overview() -> Dashboard:
    dashboard = page(
        "vitrine-overview", "Vitrine: overview", "Rate, errors, duration and saturation."
    )
    for add in (_figures, _rate, _errors, _duration, _saturation):
        add(dashboard)
    return dashboard


def _figures(dashboard: Dashboard) -> None:
    dashboard.with_panel(
        number("Engines up", "Of those chosen.", "short", "sum(vitrine_engine_up{@})")
    )
    dashboard.with_panel(
        number(
            "Requests/s",
            "Admitted.",
            "reqps",
            rate("vitrine_requests_accepted_total"),
        )
    )
    dashboard.with_panel(
        number(
            "Tokens/s",
            "Generated for clients.",
            "short",
            rate("vitrine_generated_tokens_total"),
        )
    )
    dashboard.with_panel(
        number(
            "First token, p95",
            "From a request's arrival.",
            "s",
            quantiles("vitrine_time_to_first_token_seconds", 0.95)["p95"],
        )
    )
    dashboard.with_panel(
        number(
            "Between tokens, p95",
            "Gaps between two tokens of a sequence.",
            "s",
            quantiles("vitrine_inter_token_latency_seconds", 0.95)["p95"],
        )
    )
    dashboard.with_panel(
        number(
            "Errors",
            "Of the requests that ended in the last 5 minutes.",
            "percentunit",
            "max(vitrine:error_ratio:rate5m{@})",
        )
    )


def _rate(dashboard: Dashboard) -> None:
    dashboard.with_row(Row("Rate"))
    dashboard.with_panel(
        graph(
            "Requests admitted",
            "By route.",
            "reqps",
            {"{{route}}": rate("vitrine_requests_accepted_total", "route")},
            stacked=True,
        )
    )
    dashboard.with_panel(
        graph(
            "Requests ended",
            "Finished, by why they ended; aborted: nobody waited any more; failed: an error.",
            "reqps",
            {
                "{{reason}}": rate("vitrine_requests_finished_total", "reason"),
                "aborted: {{reason}}": (rate("vitrine_requests_aborted_total", "reason")),
                "failed": rate("vitrine_requests_failed_total"),
            },
            stacked=True,
        )
    )
    dashboard.with_panel(
        graph(
            "Tokens",
            "Of prompts admitted, those of them found in the prefix cache, and generated.",
            "short",
            {
                "prompt": rate("vitrine_prompt_tokens_total"),
                "cached": rate("vitrine_cached_prompt_tokens_total"),
                "generated": rate("vitrine_generated_tokens_total"),
            },
        )
    )


def _errors(dashboard: Dashboard) -> None:
    dashboard.with_row(Row("Errors"))
    dashboard.with_panel(
        graph(
            "Failed",
            "Share of the requests that ended in 5 minutes; the alert is at 1 %.",
            "percentunit",
            {"{{instance}}": "vitrine:error_ratio:rate5m{@}"},
        )
    )
    dashboard.with_panel(
        graph(
            "Refused",
            "Before they were admitted, by why.",
            "reqps",
            {"{{reason}}": rate("vitrine_requests_rejected_total", "reason")},
            stacked=True,
        )
    )
    dashboard.with_panel(
        graph(
            "HTTP",
            "Responses by status; `none`: the client went away before.",
            "reqps",
            {"{{status}}": rate("vitrine_http_requests_total", "status")},
            stacked=True,
        )
    )


def _duration(dashboard: Dashboard) -> None:
    dashboard.with_row(Row("Duration"))
    dashboard.with_panel(
        graph(
            "To the first token",
            "From a request's arrival. Dots are single requests: their ids.",
            "s",
            quantiles("vitrine_time_to_first_token_seconds", 0.5, 0.95, 0.99),
            exemplars=True,
        )
    )
    dashboard.with_panel(
        graph(
            "Between tokens",
            "Gaps between two tokens of a sequence, as they come from the engine.",
            "s",
            quantiles("vitrine_inter_token_latency_seconds", 0.5, 0.95, 0.99),
        )
    )
    dashboard.with_panel(
        graph(
            "End to end",
            "Requests that finished.",
            "s",
            {
                name: expr.replace("{@}", '{@, outcome="finished"}')
                for name, expr in quantiles(
                    "vitrine_request_duration_seconds", 0.5, 0.95, 0.99
                ).items()
            },
            exemplars=True,
        )
    )
    dashboard.with_panel(
        spread(
            "First tokens",
            "How many requests waited how long.",
            "s",
            "vitrine_time_to_first_token_seconds",
            span=8,
        )
    )
    dashboard.with_panel(
        graph(
            "Time per output token",
            "A sequence's mean, after its first token.",
            "s",
            quantiles("vitrine_time_per_output_token_seconds", 0.5, 0.95, 0.99),
            exemplars=True,
        )
    )
    dashboard.with_panel(
        graph(
            "First tokens later than 2 s",
            "The goal is 1 % in 30 days; alerts at 14.4 % (1 h, 5 m) and 6 % (6 h, 30 m).",
            "percentunit",
            {
                window: f"max(vitrine:ttft_late_ratio:rate{window}{{@}})"
                for window in ("5m", "30m", "1h", "6h")
            },
        )
    )


def _saturation(dashboard: Dashboard) -> None:
    dashboard.with_row(Row("Saturation"))
    dashboard.with_panel(
        graph(
            "Sequences",
            "In the batch, in the engine's queue, and without their first token.",
            "short",
            {
                "running": "sum(vitrine_engine_sequences_running{@})",
                "in the engine's queue": "sum(vitrine_engine_sequences_waiting{@})",
                "without a token": "sum(vitrine_queue_requests{@})",
                "requests in flight": "sum(vitrine_requests_in_flight{@})",
            },
        )
    )
    dashboard.with_panel(
        graph(
            "Tokens that wait",
            "Prompts and max_tokens of what has no token yet; --max-queue-tokens bounds them.",
            "short",
            {"waiting": "sum(vitrine_queue_tokens{@})"},
        )
    )
    dashboard.with_panel(
        graph(
            "KV cache",
            "By state: referenced are in use, cached are kept for prompts that begin alike.",
            "short",
            {"{{state}}": "sum by (state) (vitrine_kv_blocks{@})"},
            stacked=True,
        )
    )
    dashboard.with_panel(
        graph(
            "Engine busy",
            "Share of the time that it spent in steps.",
            "percentunit",
            {"{{instance}}": "vitrine:engine_busy_ratio{@}"},
            top=1,
        )
    )
    dashboard.with_panel(
        graph(
            "Machine busy",
            "All cores, or the GPU.",
            "percentunit",
            {"{{instance}} {{device}}": "vitrine_device_utilization_ratio{@}"},
            top=1,
        )
    )
    dashboard.with_panel(
        graph(
            "Connections",
            "Open ones, and requests whose response has not ended.",
            "short",
            {
                "connections": "sum(vitrine_http_connections{@})",
                "requests": "sum(vitrine_http_requests_in_flight{@})",
            },
        )
    )
    dashboard.with_panel(
        graph(
            "Requests that ended",
            "By how; their number is the errors' denominator.",
            "reqps",
            {"{{outcome}}": rate("vitrine_request_duration_seconds_count", "outcome")},
            stacked=True,
        )
    )
    dashboard.with_panel(
        graph(
            "Kept for clients",
            "Streams that can be resumed, and what is in the journal.",
            "short",
            {
                "detachable": "sum(vitrine_detachable_requests{@})",
                "journal": "sum(vitrine_journal_entries{@})",
                "slow readers cut off": "sum(vitrine_slow_readers_total{@})",
            },
        )
    )
    dashboard.with_panel(
        graph(
            "Refused for a full queue",
            "Share of what came in 5 minutes; the alert is at 5 %.",
            "percentunit",
            {"{{instance}}": "vitrine:queue_full_ratio:rate5m{@}"},
        )
    )
