"""What clients may ask: bodies as typed structs with bounds. What is not a field here is refused by its name."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from optc.runtime.bounds import CountOrZero, MinP, RepetitionPenalty, TopP
from optc.runtime.sampling import Sampling
from optc.runtime.serving.http.errors import HttpError
from optc.runtime.serving.request import MOST_LOGPROBS, Grammar

Id = Annotated[int, Meta(ge=0, le=1 << 31)]
Text = Annotated[str, Meta(max_length=1 << 26)]
Stop = Annotated[str, Meta(min_length=1, max_length=1024)]
Stops = Stop | Annotated[list[Stop], Meta(max_length=16)]
MaxTokens = Annotated[int, Meta(ge=1, le=1 << 31)]
TopLogprobs = Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)]
BodyT = TypeVar("BodyT", bound="Body")


class Body(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A body of a request; null is the same as leaving a field out."""


class StreamOptions(Body, frozen=True, kw_only=True):
    """Of a stream.

    Attributes:
        include_usage: a last event has the usage.
        continuous_usage_stats: and so have all others, as far as they go (vLLM's, which measuring clients ask for).
    """

    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(Body, frozen=True, kw_only=True, rename={"schema_": "schema"}):
    """A schema that the answer must keep to."""

    name: str = ""
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = {}


_ANY_OBJECT = '{"type":"object"}'
"""What json_object means: a list or a number is JSON too, and not what clients expect."""


class ResponseFormat(Body, frozen=True, kw_only=True):
    """What the text of an answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def grammar(self) -> Grammar | None:
        """The same for the engine."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return Grammar(kind="json-schema", source=_ANY_OBJECT)
        if self.json_schema is None:
            raise HttpError(400, "response_format json_schema needs a json_schema", param="response_format")
        try:
            return Grammar(kind="json-schema", source=msgspec.json.encode(self.json_schema.schema_).decode())
        except RecursionError as error:
            raise _too_deep() from error


class GenerateBody(Body, frozen=True, kw_only=True):
    """What completions and chats have in common. Defaults are OpenAI's; the last group is ours (and vLLM's).

    Fields that change nothing here are taken as they come: user and the like, metadata, service_tier.
    """

    model: str | None = None
    n: Annotated[int, Meta(ge=1, le=1 << 20)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_p: TopP = 1.0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stop: Stops = []
    logit_bias: Annotated[dict[Id, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=4096)] = {}
    user: str = ""
    safety_identifier: str = ""
    prompt_cache_key: str = ""
    metadata: dict[str, str] = {}
    store: bool = False
    service_tier: Literal["auto", "default"] = "auto"
    response_format: ResponseFormat | None = None  # OpenAI has it for chats only

    top_k: CountOrZero = 0
    min_p: MinP = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    stop_token_ids: Annotated[list[Id], Meta(max_length=256)] = []
    ignore_eos: bool = False
    priority: Annotated[int, Meta(ge=-(1 << 31), le=1 << 31)] = 0

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def sampling(self, seed: int) -> Sampling:
        """How tokens are chosen. At temperature 0 the likeliest is taken, which no cut removes."""
        cuts = (
            {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p} if self.temperature else dict[str, float]()
        )
        return Sampling(
            temperature=self.temperature,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=seed,
            **cuts,  # type: ignore[arg-type]
        )


class CompletionBody(GenerateBody, frozen=True, kw_only=True):
    """Of /v1/completions."""

    prompt: Text | list[Text | Id | list[Id]]
    max_tokens: MaxTokens | None = None
    logprobs: TopLogprobs | None = None
    suffix: str = ""
    echo: bool = False
    best_of: int | None = None


class Function(Body, frozen=True, kw_only=True):
    """A function that the model may call, or a call of one."""

    name: Annotated[str, Meta(min_length=1, max_length=128)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    arguments: str | None = None


class Tool(Body, frozen=True, kw_only=True):
    """A tool, or a call of one."""

    type: Literal["function"] = "function"
    function: Function
    id: str | None = None
    index: int | None = None


class Part(Body, frozen=True, kw_only=True):
    """A part of a message; text is the only kind that a decoder of text takes."""

    type: Literal["text"]
    text: str


class Message(Body, frozen=True, kw_only=True):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[Part] | None = None
    name: str | None = None
    tool_calls: list[Tool] | None = None
    tool_call_id: str | None = None
    refusal: None = None

    def plain(self) -> dict[str, Any]:
        """As templates expect it: without what is absent, texts joined, arguments of calls as objects."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        found: dict[str, Any] = {"role": self.role, "content": content}
        found |= {key: value for key in ("name", "tool_call_id") if (value := getattr(self, key)) is not None}
        if self.tool_calls is not None:
            found["tool_calls"] = [_call(item) for item in self.tool_calls]
        return found


def _call(tool: Tool) -> dict[str, Any]:
    arguments: Any = tool.function.arguments or "{}"
    try:
        arguments = msgspec.json.decode(arguments)
    except msgspec.DecodeError as error:
        raise HttpError(400, "arguments of a tool call are not JSON", param="messages") from error
    return {"type": "function", "id": tool.id, "function": {"name": tool.function.name, "arguments": arguments}}


class ChatBody(GenerateBody, frozen=True, kw_only=True):
    """Of /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)]
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool = False
    top_logprobs: TopLogprobs | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] = []
    tool_choice: Literal["auto", "none"] = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = {}


class EmbeddingBody(Body, frozen=True, kw_only=True):
    """Of /v1/embeddings.

    Attributes:
        prompt_name: ours: of the model's prompts, the one that is put before each text.
    """

    input: Text | list[Text | Id | list[Id]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Meta(ge=1, le=1 << 31)] | None = None
    user: str = ""
    prompt_name: Annotated[str, Meta(max_length=256)] | None = None


class TokenizeBody(Body, frozen=True, kw_only=True):
    """Of /tokenize: text, or messages through the chat template."""

    model: str | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool = True


class DetokenizeBody(Body, frozen=True, kw_only=True):
    """Of /detokenize."""

    model: str | None = None
    tokens: list[Id]


_ONLY = {
    "echo": (False, "prompts have no log-probabilities here, and their text is the client's own"),
    "suffix": ("", "models here continue a text; they do not fill one in"),
    "store": (False, "nothing is stored"),
    "parallel_tool_calls": (True, "how many tools are called is the model's choice"),
}
"""Fields of OpenAI's that are taken with one value only, and why."""


def _refuse_what_cannot_be(body: Body) -> None:
    for name, (value, why) in _ONLY.items():
        if getattr(body, name, value) != value:
            raise HttpError(400, f"'{name}' can only be {value!r}: {why}", param=name, code="unsupported_parameter")
    if isinstance(body, CompletionBody) and body.best_of not in (None, body.n):
        raise HttpError(400, "'best_of' can only equal 'n'", param="best_of", code="unsupported_parameter")
    if isinstance(body, GenerateBody) and body.stream_options is not None and not body.stream:
        raise HttpError(400, "'stream_options' has no effect without 'stream'", param="stream_options")
    if isinstance(body, ChatBody) and body.top_logprobs is not None and not body.logprobs:
        raise HttpError(400, "'top_logprobs' has no effect without 'logprobs'", param="top_logprobs")


_PATH = re.compile(r" - at `\$\.?([^`]*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*?)`")
_SHOWN = 100  # characters of a name that a client made up


def read_json(data: bytes, kind: type[BodyT]) -> BodyT:
    """A body, read and checked.

    Raises:
        HttpError: 400 for what is not JSON or not UTF-8, for fields that are unknown, of a wrong type or out of bounds;
            names the field.
    """
    try:
        found = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HttpError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    except RecursionError as error:
        raise _too_deep() from error
    if not isinstance(found, dict):
        raise HttpError(400, "the body is not a JSON object", code="invalid_json")
    try:
        body = msgspec.convert(_without_nulls(found), kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise _refused(str(error)) from error
    except RecursionError as error:
        raise _too_deep() from error
    _refuse_what_cannot_be(body)
    return body


def _too_deep() -> HttpError:
    return HttpError(400, "the body is nested too deeply", code="invalid_json")


def _refused(text: str) -> HttpError:
    path = _PATH.search(text)
    place = path[1] if path else ""
    unknown = _UNKNOWN.search(text)
    if unknown:
        name = (f"{place}.{unknown[1]}" if place else unknown[1])[:_SHOWN]
        return HttpError(400, f"this server does not take '{name}'", param=name, code="unknown_parameter")
    missing = re.search(r"missing required field `(.*?)`", text)
    if missing:
        name = f"{place}.{missing[1]}" if place else missing[1]
        return HttpError(400, f"'{name}' is missing", param=name, code="missing_parameter")
    message = f"'{place}' is not taken as it is: {_PATH.sub('', text)}" if place else text
    return HttpError(400, message, param=place.split("[")[0] or None, code="invalid_parameter")


def _without_nulls(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if value is not None}
