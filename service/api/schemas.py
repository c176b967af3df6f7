"""What a client may send: every field bounded, nothing coerced, nothing unknown let through.

Bounds that depend on the loaded model (vocabulary, context) are checked in admission.py.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from service.api.errors import TAG_MARK
from service.api.request_body import RequestBody
from service.api.response_format import ResponseFormat
from service.client import MAX_CONTINUATIONS

MAX_SEED = 2**63 - 1
MAX_TOKEN_ID = 2**31 - 1
DEFAULT_MAX_TOKENS = 128
MAX_REGEX_CHARS = 8_192
MAX_GRAMMAR_CHARS = 32_768
_TEXT, _LIST = f"{TAG_MARK}text", f"{TAG_MARK}list"


def _text_or_list(value: Any) -> str | None:
    if isinstance(value, str):
        return _TEXT
    return _LIST if isinstance(value, list) else None


def _either(what: str) -> Discriminator:
    """Choose the branch by the JSON type alone, so that an error speaks of one branch only."""
    return Discriminator(
        _text_or_list,
        custom_error_type="text_or_list",
        custom_error_message=f"Input should be {what}",
    )


Index = Annotated[int, Field(ge=0, le=2**31 - 1)]
# JSON has no tuples.
Pair = Annotated[list[Index], Field(min_length=2, max_length=2, fail_fast=True)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
StopText = Annotated[str, Field(min_length=1, max_length=128)]
# fail_fast everywhere: a body of 4 MiB has room for a million errors, which take seconds to tell.
Prompt = Annotated[
    Annotated[Annotated[str, Field(min_length=1)], Tag(_TEXT)]
    | Annotated[Annotated[list[TokenId], Field(min_length=1, fail_fast=True)], Tag(_LIST)],
    _either("a string or a list of token ids"),
]
Stop = Annotated[
    Annotated[StopText, Tag(_TEXT)]
    | Annotated[Annotated[list[StopText], Field(max_length=16, fail_fast=True)], Tag(_LIST)],
    _either("a string or a list of strings"),
]
# JSON has only strings as keys. One spelling for each id, or two keys would mean one token.
BiasKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
MAX_BIASES = 300


def _not_too_many(value: Any) -> Any:
    """Refuse a long object by its length, before its members are looked at."""
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise PydanticCustomError(
            "too_many", "Object should have at most {limit} members", {"limit": MAX_BIASES}
        )
    return value


Biases = Annotated[
    dict[BiasKey, Bias], Field(max_length=MAX_BIASES), BeforeValidator(_not_too_many)
]


class SamplingFields(RequestBody):
    """How tokens are chosen and when to end: what every route that generates takes."""

    min_tokens: int = Field(
        0, ge=0, description="End-of-text and stops are held off until so many tokens."
    )
    temperature: float = Field(1.0, ge=0, le=2, description="0 is greedy.")
    top_k: int = Field(0, ge=0, description="Sample from the k likeliest tokens; 0 is off.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Sample from the likeliest tokens that make up this mass."
    )
    min_p: float = Field(
        0.0, ge=0, lt=1, description="Leave out tokens below this share of the likeliest."
    )
    repetition_penalty: float = Field(1.0, gt=0, le=2, description="Over prompt and output.")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="Over the output.")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="Over the output, per use.")
    logit_bias: Biases = Field(
        {}, description="Token id -> what is added to its logit, -100 .. 100."
    )
    seed: int | None = Field(
        None,
        ge=0,
        le=MAX_SEED,
        description="The same seed draws the same tokens. Null: the server draws one and says it.",
    )
    n: int = Field(
        1,
        ge=1,
        le=MAX_CONTINUATIONS,
        description="Independent continuations; number i uses seed + i.",
    )
    stop: Stop = Field(
        default_factory=list,
        description="Up to 16 strings that end a continuation; they are not part of its text.",
    )
    stop_token_ids: list[TokenId] = Field(
        [], max_length=64, fail_fast=True, description="Tokens that end a continuation."
    )
    ignore_eos: bool = Field(False, description="Go on past the model's end of text.")
    regex: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_REGEX_CHARS,
        description="A regular expression (Rust's syntax) that the whole text fits. At most one of "
        "regex, grammar and response_format; none of them with min_tokens or ignore_eos.",
    )
    grammar: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_GRAMMAR_CHARS,
        description="A Lark grammar, as llguidance reads it, that the whole text fits.",
    )
    response_format: ResponseFormat | None = Field(
        None, description="OpenAI's: text, json_object, or json_schema with a schema."
    )
    priority: int = Field(
        0, ge=-10, le=10, description="Lower runs earlier; first come, first served within one."
    )
    timeout_s: float = Field(
        default_factory=float,  # not null and not a number: `has` tells whether it was sent
        gt=0,
        description="After so many seconds the request ends with what it has. At most, and when "
        "absent, the server's limit.",
    )

    def has(self, field: str) -> bool:
        """Whether the client sent the field."""
        return field in self.model_fields_set

    @property
    def stops(self) -> list[str]:
        """The stop strings, as a list in any case."""
        return [self.stop] if isinstance(self.stop, str) else self.stop


class GenerateRequest(SamplingFields):
    """Continue a prompt."""

    prompt: Prompt = Field(description="What to continue: a text, or token ids.")
    stream: bool = Field(True, description="Server-sent events, or one JSON answer when false.")
    max_tokens: int = Field(
        DEFAULT_MAX_TOKENS,
        ge=1,
        description="Tokens to generate at most; with the prompt they must fit the context. When "
        f"absent, {DEFAULT_MAX_TOKENS} or what still fits.",
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        le=20,
        description="Give each token's log-probability, and that many alternatives.",
    )
    explain: bool = Field(
        False,
        description="Tell for each token what the query that chose it looked at, and the "
        "likeliest alternatives. Takes n x max_tokens up to the server's limit.",
    )
    explain_heads: list[Pair] = Field(
        [],
        max_length=8,
        fail_fast=True,
        description="[layer, head] pairs to tell of beside the mean of all. Needs explain.",
    )
    echo: bool = Field(False, description="Begin the text with the prompt.")
    detach_s: float = Field(
        0.0,
        ge=0,
        le=300,
        description="So long a stream lives on while no client reads it, to be resumed with GET "
        "/generate/{id}; also after its end. 0: a client that goes away cancels it.",
    )


class TokenizeRequest(RequestBody):
    """Turn a text into token ids."""

    text: str = Field(description="The text to tokenize.")
    add_special_tokens: bool = Field(
        True, description="Add what the tokenizer puts around a prompt, such as BOS."
    )


class DetokenizeRequest(RequestBody):
    """Turn token ids into the text that /generate would send for them."""

    token_ids: list[TokenId] = Field(fail_fast=True, description="The ids, in order.")
    skip_special_tokens: bool = Field(
        True, description="Leave out marks such as BOS and end of text."
    )
