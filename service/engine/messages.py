"""What crosses the boundary between the API process and the engine process; nothing else does.

msgspec structs as MessagePack, length-bounded and schema-checked on arrival; never pickle.
At most one `StepOutput` goes up per engine step, whatever the batch.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from model.sampling_params import SamplingParams
from service.engine.explain_messages import EndExplain, Explain, Explained, ExplainPart, Sight

MAX_MESSAGE_BYTES = 64 * 2**20


class EngineConfig(msgspec.Struct, frozen=True, tag=True):
    """The first message down: everything the engine process needs to start."""

    model_dir: str
    device: str = "auto"
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_batched_tokens: int = 1024
    max_step_ratio: float = 2.0
    max_events_s: float = 640.0
    kv_cache_bytes: int | None = None
    block_size: int = 32
    threads: int | None = None
    deterministic: bool = True
    gpu_memory_utilization: float = 0.9
    overlap: bool = True
    tensor_parallel_size: int = 1  # devices that have a part of the model each
    # (minimum, multiple) that an earlier engine of this server measured: not measured again.
    row_padding: tuple[int, int] | None = None
    # Whether to measure what the machine can do, as soon as there is nothing else to do.
    measure_roofline: bool = False


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Run one sequence. `output_token_ids` holds what it already produced, for a sequence
    that goes on after its engine died."""

    id: int
    prompt_token_ids: list[int]
    sampling: SamplingParams
    priority: int = 0
    output_token_ids: list[int] = []
    # (layer, head) to tell of beside the mean of all; None: nothing is told of what tokens see.
    explain: list[tuple[int, int]] | None = None


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Forget a sequence; no output with its id is sent any more, and none is answered."""

    id: int


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """End the process now."""


ToEngine = EngineConfig | Submit | Abort | Shutdown | Explain | EndExplain


class ModelInfo(msgspec.Struct, frozen=True):
    """What the loaded model is; /info shows it."""

    family: str
    num_parameters: int
    dtype: str
    device: str
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    context_length: int
    eos_token_ids: list[int]
    block_size: int
    num_blocks: int
    kv_cache_bytes: int
    weight_bytes: int
    load_s: float
    torch_version: str
    threads: int
    deterministic: bool
    attention_backend: str
    row_padding: tuple[int, int] | None = None  # see EngineConfig; None: none holds
    device_name: str = ""  # of a GPU
    device_uuid: str | None = None  # of a GPU, as its driver knows it
    can_watch: bool = True  # tells what tokens look at: `explain` of /generate
    can_explain: bool = True  # POST /explain
    tensor_parallel_size: int = 1


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine can take requests."""

    info: ModelInfo


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot start, and why, in words for the operator."""

    reason: str


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of a chosen token and of the likeliest alternatives, the model's own."""

    token_id: int
    logprob: float
    rank: int  # 1 is the likeliest
    top: list[tuple[int, float]]


# "cancelled" never comes from the engine: the client ends sequences so when the server shuts down.
EngineFinish = Literal["stop", "length", "error", "cancelled"]


class SequenceOutput(msgspec.Struct, frozen=True, array_like=True):
    """What one sequence got since its last output."""

    id: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: EngineFinish | None = None
    stop_token_id: int | None = None
    error: str | None = None
    is_grammar_error: bool = False  # the error is the request's own, and told to the client
    cached_prompt_tokens: int = 0
    queue_s: float = 0.0  # from arrival to the first step it ran in
    prefill_s: float = 0.0  # from there to its first token
    explained: list[Sight] | None = None  # parallel to token_ids


class EngineStats(msgspec.Struct, frozen=True, array_like=True):
    """Gauges and counters of the engine, as of this message."""

    num_running: int = 0
    num_waiting: int = 0
    free_blocks: int = 0
    referenced_blocks: int = 0
    cached_blocks: int = 0
    total_blocks: int = 0
    preemptions: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    # Tokens of sequences looked for in the prefix cache when they began to run, and those found.
    cache_queries: int = 0
    cache_hits: int = 0
    memory_shortages: int = 0  # steps that did not fit the device's memory and were made smaller


class StepRecord(msgspec.Struct, frozen=True, array_like=True):
    """What a step computed and where its time went; times are seconds (profile.py)."""

    num_sequences: int
    num_decodes: int  # of the sequences, those with one token
    num_tokens: int
    step_s: float
    schedule_s: float = 0.0
    build_s: float = 0.0
    forward_s: float = 0.0
    sample_s: float = 0.0
    num_bytes: float = 0.0  # that it had to read
    flops: float = 0.0  # that it had to do


class StepOutput(msgspec.Struct, frozen=True, tag=True):
    """The tokens of one step, or of some (outbox.py), and the heartbeat; empty when the engine is
    idle."""

    outputs: list[SequenceOutput]
    stats: EngineStats
    steps: list[StepRecord] = []  # that computed something since the last message
    cpu: int | None = None  # that the engine's main thread was on; None: nobody says


class Progress(msgspec.Struct, frozen=True, tag=True):
    """The heartbeat between the layers of a long step, and between the parts of loading: sent
    by the thread that does the work, so that it stops when the work does."""

    step_tokens: int = 0  # computed by the step that runs; 0 while loading
    running_s: float = 0.0  # since the step began


class Measured(msgspec.Struct, frozen=True, tag=True):
    """What the engine's device can do at best, with the engine's threads and in its dtype."""

    read_bytes_per_s: float
    flops_per_s: float


class Fatal(msgspec.Struct, frozen=True, tag=True):
    """Last words: the engine ends because of this exception."""

    kind: str  # the exception's class
    message: str


FromEngine = (
    Ready | StartFailed | StepOutput | Progress | Measured | Fatal | ExplainPart | Explained
)


class MessageTooLargeError(ValueError):
    """A message over MAX_MESSAGE_BYTES; the other side would drop the connection."""


def encode(message: ToEngine | FromEngine) -> bytes:
    """The message's bytes. Raises `MessageTooLargeError`."""
    data = encoder.encode(message)
    if len(data) > MAX_MESSAGE_BYTES:
        raise MessageTooLargeError(
            f"a {type(message).__name__} message of {len(data):,} bytes was to be sent; "
            f"the limit is {MAX_MESSAGE_BYTES:,}"
        )
    return data


encoder = msgspec.msgpack.Encoder()
to_engine_decoder = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder = msgspec.msgpack.Decoder(FromEngine)
