"""Inside the engine: steps, batches, the cache, lives."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from deploy.grafana.panels import RATE, graph, page, quotient, rate, spread, states


def by_phase(share: float, metric: str) -> str:
    """A quantile of a histogram, phase by phase."""
    return f"histogram_quantile({share}, sum by (le, phase) (rate({metric}_bucket{{@}}{RATE})))"


def mean(metric: str, *labels: str) -> str:
    """The mean of a histogram's values."""
    return quotient(f"{metric}_sum", f"{metric}_count", *labels)


def engine() -> Dashboard:
    dashboard = page(
        "vitrine-engine", "Vitrine: engine", "Steps, batches, the cache, and engines' lives."
    )
    for add in (_steps, _a_sequence_s_life, _kv_cache, _guests, _lives):
        add(dashboard)
    return dashboard


def _steps(dashboard: Dashboard) -> None:
    dashboard.with_row(Row("Steps"))
    dashboard.with_panel(
        graph(
            "Steps",
            "By phase: decode, prompts only, both.",
            "ops",
            {"{{phase}}": rate("vitrine_step_seconds_count", "phase")},
            stacked=True,
        )
    )
    dashboard.with_panel(
        graph(
            "Duration of a step",
            "Median and p99, by phase. A running stream waits for every step.",
            "s",
            {
                "{{phase}} p50": by_phase(0.5, "vitrine_step_seconds"),
                "{{phase}} p99": by_phase(0.99, "vitrine_step_seconds"),
            },
            log=True,
        )
    )
    dashboard.with_panel(
        spread(
            "Gaps between tokens",
            "All of them.",
            "s",
            "vitrine_inter_token_latency_seconds",
            span=8,
        )
    )
    dashboard.with_panel(
        graph(
            "Batch",
            "Sequences in a step, mean by phase.",
            "short",
            {"{{phase}}": mean("vitrine_step_sequences", "phase")},
        )
    )
    dashboard.with_panel(
        graph(
            "Tokens in a step",
            "Mean and p99 by phase; --max-batched-tokens bounds them, beside streams "
            "--max-step-ratio.",
            "short",
            {
                "{{phase}}": mean("vitrine_step_tokens", "phase"),
                "{{phase}} p99": by_phase(0.99, "vitrine_step_tokens"),
            },
            log=True,
        )
    )
    dashboard.with_panel(
        graph(
            "Tokens computed",
            "Of prompts, and sampled.",
            "short",
            {
                "prompt": rate("vitrine_engine_prompt_tokens_total"),
                "sampled": rate("vitrine_engine_generated_tokens_total"),
            },
        )
    )


def _a_sequence_s_life(dashboard: Dashboard) -> None:
    dashboard.with_row(Row("A sequence's life"))
    dashboard.with_panel(
        graph(
            "Queue, prefill, decode: p95",
            "From its arrival at the engine; a resumed one waits twice.",
            "s",
            {
                part: f"histogram_quantile(0.95, sum by (le) "
                f"(rate(vitrine_request_{part}_seconds_bucket{{@}}{RATE})))"
                for part in ("queue", "prefill", "decode")
            },
            log=True,
            exemplars=True,
        )
    )
    dashboard.with_panel(
        graph(
            "Put back to make room",
            "Preemptions: computed again later. The KV cache is too small for the batch, or a step "
            "found no memory on the device.",
            "ops",
            {
                "preemptions": rate("vitrine_engine_preemptions_total"),
                "steps without memory": rate("vitrine_engine_memory_shortages_total"),
            },
        )
    )
    dashboard.with_panel(
        graph(
            "Sequences",
            "In the batch and in the engine's queue.",
            "short",
            {
                "running": "sum(vitrine_engine_sequences_running{@})",
                "waiting": "sum(vitrine_engine_sequences_waiting{@})",
            },
            stacked=True,
        )
    )


def _kv_cache(dashboard: Dashboard) -> None:
    dashboard.with_row(Row("KV cache"))
    dashboard.with_panel(
        graph(
            "In use",
            "Share of the blocks that are referenced; the alert is at 95 %.",
            "percentunit",
            {"{{instance}}": "vitrine:kv_usage_ratio{@}"},
            top=1,
        )
    )
    dashboard.with_panel(
        graph(
            "Prefix cache",
            "Tokens of sequences that began to run, and those of them that were found.",
            "short",
            {
                "looked for": rate("vitrine_prefix_cache_queried_tokens_total"),
                "found": rate("vitrine_prefix_cache_hit_tokens_total"),
            },
        )
    )
    dashboard.with_panel(
        graph(
            "Prefix cache: found",
            "Share over 5 minutes.",
            "percentunit",
            {"{{instance}}": "vitrine:prefix_cache_hit_ratio{@}"},
            top=1,
        )
    )


def _guests(dashboard: Dashboard) -> None:
    dashboard.with_row(Row("Explanations"))
    dashboard.with_panel(
        graph(
            "Explanations",
            "Admitted, and ended by how.",
            "ops",
            {
                "admitted": rate("vitrine_explain_accepted_total"),
                "{{outcome}}": rate("vitrine_explain_requests_total", "outcome"),
            },
        )
    )
    dashboard.with_panel(
        graph(
            "Explanations in flight",
            "Admitted and not ended; --max-explain-queue bounds them.",
            "short",
            {"{{instance}}": "vitrine_explain_in_flight{@}"},
        )
    )
    dashboard.with_panel(
        graph(
            "Time for explanations",
            "Share of the engine's time; beside streams it stays under 5 %.",
            "percentunit",
            {"{{instance}}": rate("vitrine_explain_compute_seconds_total", "instance")},
        )
    )


def _lives(dashboard: Dashboard) -> None:
    dashboard.with_row(Row("Lives"))
    dashboard.with_panel(
        states(
            "State",
            "Of the engine.",
            "vitrine_engine_state{@} == 1",
            "{{instance}} {{state}}",
            span=8,
        )
    )
    dashboard.with_panel(
        graph(
            "Last heard",
            "Beats come twice a second; at --stall-s the engine is replaced.",
            "s",
            {"{{instance}}": "vitrine_engine_heartbeat_age_seconds{@}"},
        )
    )
    dashboard.with_panel(
        graph(
            "Replaced and resumed",
            "In 15 minutes: engines by why they were replaced, sequences that went on.",
            "short",
            {
                "{{cause}}": "sum by (cause) (increase(vitrine_engine_restarts_total{@}[15m]))",
                "sequences resumed": "sum(increase(vitrine_resumed_requests_total{@}[15m]))",
            },
        )
    )
    dashboard.with_panel(
        graph(
            "Memory of the processes",
            "Resident.",
            "bytes",
            {"{{process}}": "sum by (process) (vitrine_process_resident_memory_bytes{@})"},
            stacked=True,
        )
    )
    dashboard.with_panel(
        graph(
            "Tasks in the API",
            "Of asyncio; they go down when requests end.",
            "short",
            {"{{instance}}": "vitrine_asyncio_tasks{@}"},
        )
    )
    dashboard.with_panel(
        graph(
            "Model and cache",
            "Bytes held for weights and for the KV cache.",
            "bytes",
            {
                "weights": "sum(vitrine_model_weight_bytes{@})",
                "KV cache": "sum(vitrine_model_kv_cache_bytes{@})",
            },
            stacked=True,
        )
    )
