"""What OpenAI's routes take: its fields by its names, and Vitrine's own sampling fields.

As everywhere, nothing is accepted and ignored: a field of OpenAI's that has no meaning here is
refused by name. As with OpenAI, null stands for a field's default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NoReturn, cast

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from service.api.errors import TAG_MARK, invalid_field
from service.api.request_body import RequestBody
from service.api.schemas import GenerateRequest, Prompt, SamplingFields, TokenId

COMPLETION_MAX_TOKENS = 16  # OpenAI's default
MAX_PROMPTS = 128
MAX_MESSAGES = 2048
_TEXT, _TEXTS, _IDS, _ID_LISTS = (
    f"{TAG_MARK}{name}" for name in ("text", "texts", "ids", "id_lists")
)
_PARTS = f"{TAG_MARK}parts"


def _refuse(_: Any) -> NoReturn:
    raise PydanticCustomError("unsupported", "this field is not supported")


Unsupported = Annotated[
    None, BeforeValidator(_refuse), Field(description="Not supported: refused unless null.")
]
Label = Annotated[
    str,
    Field(
        max_length=512,
        description="A label by which OpenAI tells a client's users apart; it has no effect on "
        "an answer, here or there.",
    ),
]


def _prompt_kind(value: Any) -> str | None:
    """Choose the branch by the JSON types alone, so that an error speaks of one branch only."""
    if isinstance(value, str):
        return _TEXT
    if not isinstance(value, list):
        return None
    first = value[0] if value else None
    if isinstance(first, list):
        return _ID_LISTS
    return _TEXTS if isinstance(first, str) else _IDS


Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Prompts = Annotated[
    Annotated[Text, Tag(_TEXT)]
    | Annotated[Ids, Tag(_IDS)]
    | Annotated[list[Text], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag(_TEXTS)]
    | Annotated[list[Ids], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag(_ID_LISTS)],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompts",
        custom_error_message="Input should be a string, a list of strings, a list of token ids, "
        "or a list of such lists",
    ),
]


class OpenAIObject(RequestBody):
    """An object in which null stands for a default."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        known = cls.model_fields  # an unknown field is refused, whatever it holds
        return {name: it for name, it in value.items() if it is not None or name not in known}


class StreamOptions(OpenAIObject):
    """What a stream carries beyond its text."""

    include_usage: bool = Field(
        False, description="End with a chunk that has no choices and the usage of the request."
    )
    include_obfuscation: Literal[False] = Field(
        False, description="Chunks are never padded with random characters."
    )


class OpenAIRequest(SamplingFields, OpenAIObject):
    """What both routes take."""

    model: str = Field(
        min_length=1, max_length=512, description="The name of the served model; see /v1/models."
    )
    stream: bool = Field(False, description="Server-sent events that end with `[DONE]`.")
    stream_options: StreamOptions | None = Field(None, description="Only with `stream: true`.")
    user: Label = ""

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        """Raise `ProblemError` for fields that do not go together."""
        if self.stream_options is not None and not self.stream:
            raise invalid_field("stream_options", "only allowed with stream: true")

    def _to_generate(
        self, prompt: Prompt, max_tokens: int, has_max_tokens: bool, **own: Any
    ) -> GenerateRequest:
        """The same wish in the words of /generate. Its fields are validated already: the shared
        ones are the same."""
        shared = SamplingFields.model_fields.keys()
        sent = (self.model_fields_set & shared) | ({"max_tokens"} if has_max_tokens else set())
        return GenerateRequest.model_construct(
            _fields_set=sent,
            prompt=prompt,
            max_tokens=max_tokens,
            **{name: getattr(self, name) for name in shared},
            **own,
        )


class CompletionRequest(OpenAIRequest):
    """Continue one or several prompts."""

    prompt: Prompts = Field(
        description=f"What to continue: a text, token ids, or up to {MAX_PROMPTS} of either; each "
        "is answered as if it had been sent alone, and choices are counted on through all."
    )
    max_tokens: int = Field(
        COMPLETION_MAX_TOKENS, ge=1, description="Tokens to generate at most, for each choice."
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        le=5,
        description="Give each token's log-probability, and that many alternatives.",
    )
    echo: bool = Field(
        False,
        description="Begin the text with the prompt. Not together with logprobs: those of the "
        "prompt are not computed.",
    )
    best_of: int | None = Field(
        None, ge=1, description="Only what `n` is: every continuation is returned."
    )
    suffix: Unsupported = None

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts, as a list in any case."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return cast("list[Prompt]", self.prompt)

    def check(self) -> None:
        """Raise `ProblemError` for fields that do not go together."""
        super().check()
        if not self.prompt:
            raise invalid_field("prompt", "an empty list")
        if self.best_of not in (None, self.n):
            raise invalid_field(
                "best_of", f"{self.best_of} is not supported; only what n is, which is {self.n}"
            )
        if self.echo and self.logprobs is not None:
            raise invalid_field(
                "echo",
                "not supported together with logprobs: log-probabilities of the prompt are not "
                "computed",
            )

    def to_generate(self, prompt: Prompt) -> GenerateRequest:
        """The wish for one of the prompts."""
        has_max_tokens = self.has("max_tokens")
        return self._to_generate(
            prompt, self.max_tokens, has_max_tokens, logprobs=self.logprobs, echo=self.echo
        )


class TextPart(OpenAIObject):
    """A part of a message."""

    type: Literal["text"] = Field(description="Only texts are supported.")
    text: str


def _content_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return _TEXT
    return _PARTS if isinstance(value, list) else None


Content = Annotated[
    Annotated[str, Tag(_TEXT)]
    | Annotated[
        list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True), Tag(_PARTS)
    ],
    Discriminator(
        _content_kind,
        custom_error_type="content",
        custom_error_message="Input should be a string or a list of text parts",
    ),
]


class Message(OpenAIObject):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="A developer's message is given to the template as a system message."
    )
    content: Content = Field(description="A text, or parts, which are joined by line feeds.")
    name: str | None = Field(
        None, min_length=1, max_length=64, description="Given to the template, which may use it."
    )
    refusal: Unsupported = None
    tool_calls: Unsupported = None
    tool_call_id: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None

    def for_template(self) -> dict[str, str]:
        """As chat templates read it."""
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        named = {} if self.name is None else {"name": self.name}
        return {"role": role, "content": content, **named}


class ChatRequest(OpenAIRequest):
    """Answer a conversation."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_completion_tokens: int | None = Field(
        None, ge=1, description="Tokens to generate at most; when absent, what fits the context."
    )
    max_tokens: int | None = Field(
        None, ge=1, description="The older name of max_completion_tokens."
    )
    logprobs: bool = Field(False, description="Give each token's log-probability.")
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="And that many alternatives; only with `logprobs: true`."
    )
    store: Literal[False] = Field(False, description="Answers are never stored.")
    safety_identifier: Label = ""
    audio: Unsupported = None
    function_call: Unsupported = None
    functions: Unsupported = None
    metadata: Unsupported = None
    modalities: Unsupported = None
    moderation: Unsupported = None
    parallel_tool_calls: Unsupported = None
    prediction: Unsupported = None
    prompt_cache_key: Unsupported = None
    prompt_cache_options: Unsupported = None
    prompt_cache_retention: Unsupported = None
    reasoning_effort: Unsupported = None
    service_tier: Unsupported = None
    tool_choice: Unsupported = None
    tools: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None

    @property
    def max_tokens_field(self) -> str:
        """The name by which the client bounds the answer's length."""
        return "max_tokens" if self.max_tokens is not None else "max_completion_tokens"

    def check(self) -> None:
        """Raise `ProblemError` for fields that do not go together."""
        super().check()
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise invalid_field(
                "max_tokens", "not together with max_completion_tokens, which is its newer name"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid_field("top_logprobs", "only allowed with logprobs: true")

    def to_generate(self, prompt_ids: list[int], context_length: int) -> GenerateRequest:
        """The wish for the conversation as a prompt. Without a bound of the client's, it is the
        context length, or what still fits."""
        wanted = self.max_tokens if self.max_tokens is not None else self.max_completion_tokens
        return self._to_generate(
            prompt_ids,
            context_length if wanted is None else wanted,
            wanted is not None,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            echo=False,
        )
