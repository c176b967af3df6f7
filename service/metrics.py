"""The whole metric vocabulary, described in one place. docs/metrics.md shows it; a test holds them
together. `metric_recording.py` records what happens to requests in these words.

Laws that hold at every scrape:

    requests: accepted = finished + aborted + failed + in flight
    request_duration_seconds: its count, by outcome, is finished, aborted, failed
    kv_blocks: free + referenced + cached = kv_blocks_capacity
    step_seconds, step_sequences, step_tokens: as many values in each, phase by phase
    prefix cache: hits <= queries

Labels have few values: routes of the application, reasons and states of this code, never what a
client made up. Names follow Prometheus' practice: base units, `_total` for what only grows.
"""

from __future__ import annotations

from typing import Literal

from prometheus_client import disable_created_metrics

from service.buckets import (
    FIRST_TOKEN_SECONDS,
    REQUEST_SECONDS,
    SEQUENCES,
    TOKEN_SECONDS,
    TOKENS,
)
from service.metric_families import Described, counter, gauge, histogram

# Prometheus does not need the time of birth of a counter, and it doubles what is scraped.
disable_created_metrics()  # type: ignore[no-untyped-call]

Outcome = Literal["finished", "aborted", "failed"]
# Why nobody waits for an answer any more: its client went away; its client took nothing of what
# was waiting for too long; its client went away and did not come back within `detach_s`.
AbortReason = Literal["client-gone", "slow-reader", "detach-expired"]
# How an explanation ended: answered; nobody waited any more; the server failed; not within its
# time beside the streams; what was asked for cannot be shown of the text.
ExplainOutcome = Literal["finished", "aborted", "failed", "timeout", "refused"]
FINISH_REASONS = ("stop", "length", "timeout", "cancelled")
# Of refusals, those that say something about the server's load or its door.
COMMON_REJECTIONS = ("queue-full", "unavailable", "never-fits", "invalid-request")
# Routes that admit requests; their series are there from the start, so that a rate of nothing
# is 0 and not missing.
GENERATING_ROUTES = ("/generate", "/v1/completions", "/v1/chat/completions")


class Requests:
    """What became of requests. A request may have several continuations (`n`, or a batch of
    prompts), each a sequence of the engine."""

    ACCEPTED = counter("requests_accepted", "Requests admitted to the engine.", "route")
    FINISHED = counter(
        "requests_finished", "Requests answered to the end, by why they ended.", "route", "reason"
    )
    ABORTED = counter(
        "requests_aborted", "Requests that nobody waited for any more, by why.", "route", "reason"
    )
    FAILED = counter("requests_failed", "Requests that ended with an error.", "route")
    REJECTED = counter(
        "requests_rejected",
        "Requests refused before they were admitted, by why.",
        "route",
        "reason",
    )
    IN_FLIGHT = gauge("requests_in_flight", "Requests admitted and not ended yet.")
    QUEUE_REQUESTS = gauge("queue_requests", "Sequences admitted that wait for their first token.")
    QUEUE_TOKENS = gauge("queue_tokens", "Their prompts and max_tokens together.")
    RESUMED = counter(
        "resumed_requests", "Sequences that went on in another engine after theirs died."
    )
    JOURNAL_ENTRIES = gauge("journal_entries", "Sequences in the journal.")
    DETACHABLE = gauge("detachable_requests", "Requests kept for their detach_s.")
    DETACHABLE_BYTES = gauge("detachable_bytes", "Bytes of their events.")
    SLOW_READERS = counter("slow_readers", "Connections closed because their clients took nothing.")


class Latency:
    """Times as the API process sees them, the same that answers, logs and traces tell. A tail of
    a slow client is in `request_duration`, not in `inter_token_latency`."""

    FIRST_TOKEN = histogram(
        "time_to_first_token_seconds",
        "From a request's arrival to its first token.",
        FIRST_TOKEN_SECONDS,
        "route",
    )
    INTER_TOKEN = histogram(
        "inter_token_latency_seconds",
        "Gaps between two tokens of a sequence, as they come from the engine.",
        TOKEN_SECONDS,
    )
    PER_OUTPUT_TOKEN = histogram(
        "time_per_output_token_seconds",
        "A sequence's time from its first token to its last, over the tokens after the first.",
        TOKEN_SECONDS,
        "route",
    )
    REQUEST = histogram(
        "request_duration_seconds",
        "From a request's arrival to its end, by how it ended.",
        REQUEST_SECONDS,
        "route",
        "outcome",
    )
    QUEUE = histogram(
        "request_queue_seconds",
        "From a sequence's arrival at the engine to the first step it ran in.",
        REQUEST_SECONDS,
    )
    PREFILL = histogram(
        "request_prefill_seconds", "From there to a sequence's first token.", REQUEST_SECONDS
    )
    DECODE = histogram(
        "request_decode_seconds", "From there to a sequence's last token.", REQUEST_SECONDS
    )


class Tokens:
    """Tokens of requests."""

    PROMPT = counter("prompt_tokens", "Tokens of the prompts admitted.")
    CACHED = counter(
        "cached_prompt_tokens", "Of prompts whose requests ended: found in the prefix cache."
    )
    GENERATED = counter("generated_tokens", "Tokens generated for clients, stop strings' included.")


class Engine:
    """The engine process. Counters go on when it is replaced."""

    UP = gauge("engine_up", "1 while the engine computes or could: idle, busy or draining.")
    STATE = gauge("engine_state", "1 for the state the engine is in.", "state")
    HEARTBEAT_AGE = gauge("engine_heartbeat_age_seconds", "Time since the engine was last heard.")
    RESTARTS = counter(
        "engine_restarts",
        "Engines replaced, by why: it ended, stalled, sent nonsense, could not start.",
        "cause",
    )
    RUNNING = gauge("engine_sequences_running", "Sequences in the batch.")
    WAITING = gauge("engine_sequences_waiting", "Sequences in the engine's queue.")
    STEPS = counter("engine_steps", "Steps of the engine.")
    PREEMPTIONS = counter("engine_preemptions", "Sequences put back to make room.")
    MEMORY_SHORTAGES = counter(
        "engine_memory_shortages",
        "Steps that did not fit the device's memory: run again with half of their tokens.",
    )
    PROMPT_TOKENS = counter("engine_prompt_tokens", "Prompt tokens computed.")
    GENERATED_TOKENS = counter("engine_generated_tokens", "Tokens sampled.")


class Cache:
    """The KV cache."""

    BLOCKS = gauge("kv_blocks", "Blocks of the KV cache, by state.", "state")
    CAPACITY = gauge("kv_blocks_capacity", "Blocks of the KV cache.")
    QUERIED = counter(
        "prefix_cache_queried_tokens",
        "Tokens of sequences that began to run, or began again after a preemption.",
    )
    HIT = counter("prefix_cache_hit_tokens", "Of them, those found in the prefix cache.")


class Steps:
    """Where the engine's time goes. Phases: `decode`, a token of each sequence; `prefill`, prompts
    only; `mixed`, both."""

    SECONDS = histogram("step_seconds", "Duration of a step.", TOKEN_SECONDS, "phase")
    SEQUENCES = histogram("step_sequences", "Sequences in a step.", SEQUENCES, "phase")
    TOKENS = histogram("step_tokens", "Tokens computed in a step.", TOKENS, "phase")
    PARTS = counter(
        "engine_part_seconds",
        "Time of steps by what it went into: schedule, build (tensors of the batch), forward, "
        "sample, book. On a GPU forward is the launch of kernels, sample has the wait for them.",
        "part",
    )
    READ_BYTES = counter(
        "step_read_bytes",
        "Bytes that steps had to read: weights once a step, keys and values in sight.",
        "phase",
    )
    FLOPS = counter(
        "step_flops",
        "Operations that steps had to do: products and attention, two for a multiply-add.",
        "phase",
    )
    ROOFLINE_SECONDS = counter(
        "step_roofline_seconds",
        "Least time in which the machine could have done these steps, by its roofline; there "
        "once that is known.",
        "phase",
    )
    ROOF_BYTES = gauge(
        "roofline_read_bytes_per_second", "Reading of memory at its best; there once it is known."
    )
    ROOF_FLOPS = gauge(
        "roofline_flops_per_second", "Products at their best; there once they are known."
    )


class Devices:
    """The machine. `device` is cpu (the whole machine, from /proc), and the engine's GPU if it has
    one (NVML, with `vitrine[gpu]`)."""

    MEMORY_USED = gauge("device_memory_used_bytes", "Memory in use, by anyone.", "device")
    MEMORY = gauge("device_memory_bytes", "Memory there is.", "device")
    UTILIZATION = gauge(
        "device_utilization_ratio",
        "Share of the time that it was busy lately: of all cores, or of a GPU's kernels.",
        "device",
    )
    POWER = gauge("device_power_watts", "Power drawn (GPU).", "device")
    ENERGY = counter("device_energy_joules", "Energy since the driver was loaded (GPU).", "device")
    PROCESS_CPU = counter(
        "process_cpu_seconds", "Processor time of the api and the engine process.", "process"
    )
    PROCESS_MEMORY = gauge(
        "process_resident_memory_bytes", "Resident memory of the two.", "process"
    )


class Explain:
    """POST /explain; accepted = ended + in flight, by a law of its own."""

    ACCEPTED = counter("explain_accepted", "Explanations admitted.")
    REQUESTS = counter("explain_requests", "Explanations that ended, by how.", "outcome")
    IN_FLIGHT = gauge("explain_in_flight", "Explanations admitted and not ended.")
    COMPUTE = counter("explain_compute_seconds", "Time that the engine computed explanations.")


class Http:
    """HTTP itself. A route is its template; what matches none is `none`, as is the status of a
    request whose client went away before it had an answer."""

    REQUESTS = counter(
        "http_requests", "Requests whose response ended.", "route", "method", "status"
    )
    IN_FLIGHT = gauge("http_requests_in_flight", "Requests whose response has not ended.")
    CONNECTIONS = gauge("http_connections", "Open connections.")
    TASKS = gauge("asyncio_tasks", "Tasks in the API.")


class Build:
    """What runs."""

    BUILD = gauge("build_info", "1; the versions are in the labels.", "version", "python")
    MODEL = gauge(
        "model_info",
        "1; there once the model is loaded.",
        "model",
        "family",
        "dtype",
        "device",
        "device_name",
        "attention_backend",
    )
    WEIGHT_BYTES = gauge("model_weight_bytes", "Bytes held for the model's weights.")
    CACHE_BYTES = gauge("model_kv_cache_bytes", "Bytes of the KV cache.")


SECTIONS: tuple[type, ...] = (
    Requests,
    Latency,
    Tokens,
    Engine,
    Cache,
    Steps,
    Explain,
    Devices,
    Http,
    Build,
)


def vocabulary(section: type) -> list[Described]:
    """The metrics of a section, in order."""
    return [value for value in vars(section).values() if isinstance(value, Described)]
