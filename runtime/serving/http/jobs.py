"""From a body to what the engine is asked: prompts, choices, limits."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field

from optc.compiler.diagnostics import UsageError
from optc.runtime.serving.http.bodies import ChatBody, CompletionBody, GenerateBody, StreamOptions
from optc.runtime.serving.http.errors import HttpError
from optc.runtime.serving.http.state import ServerState
from optc.runtime.serving.request import Generate, Task
from optc.runtime.serving.seeds import choice_seed
from optc.runtime.serving.tool_calls import calls_are_read

_DEFAULT_NEW_TOKENS = 16  # of completions, as OpenAI's


@dataclass(frozen=True, kw_only=True)
class Job:
    """One HTTP request.

    Attributes:
        requests: one for each choice: those of the first prompt, then those of the second.
        hidden: tokens that end an answer and are not part of its text.
        logprobs: alternatives told for each token; None where nothing is told.
        tools: calls of tools are looked for in the text.
    """

    state: ServerState
    id: str
    chat: bool
    requests: list[Generate]
    prompt_tokens: int
    stops: list[str]
    hidden: frozenset[int]
    logprobs: int | None
    stream: bool
    usage: StreamOptions
    tools: bool = False
    arrived: float = field(default_factory=time.perf_counter)
    created: int = field(default_factory=lambda: int(time.time()))


async def completion_job(state: ServerState, body: CompletionBody) -> Job:
    """Of /v1/completions.

    Raises:
        HttpError: 400, what does not fit the model; 404, another model; 503, no engine.
    """
    check_model(state, body.model, "generate")
    prompts = await _prompts(state, body)
    return _job(state, body, prompts, body.max_tokens or _DEFAULT_NEW_TOKENS, body.logprobs)


async def chat_job(state: ServerState, body: ChatBody) -> Job:
    """Of /v1/chat/completions.

    Raises:
        HttpError: as `completion_job`; and 400 where the model has no template, or none that takes tools.
    """
    check_model(state, body.model, "generate")
    tools = body.tools if body.tool_choice == "auto" else []
    template = state.text.template
    if tools and template is not None and not calls_are_read(template):
        why = (
            "its calls have a form that this server does not read"
            if template.takes_tools
            else "it does not mention tools"
        )
        raise HttpError(
            400, f"the model's chat template cannot be used with tools: {why}", param="tools", code="no_tools"
        )
    described = [_described(item.function) for item in tools] or None
    reserved = {"messages", "tools", "add_generation_prompt"} & set(body.chat_template_kwargs)
    if reserved:
        raise HttpError(400, f"'{reserved.pop()}' cannot be set there", param="chat_template_kwargs")
    messages = [message.plain() for message in body.messages]
    prompt = await state.chat_prompt(messages, tools=described, **body.chat_template_kwargs)
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        raise HttpError(400, "'max_tokens' and 'max_completion_tokens' differ", param="max_completion_tokens")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    limit = body.max_completion_tokens or body.max_tokens
    return _job(state, body, [prompt], limit, logprobs, tools=bool(tools))


def _described(function: object) -> dict[str, object]:
    names = ("name", "description", "parameters")
    described = {name: value for name in names if (value := getattr(function, name)) is not None}
    return {"type": "function", "function": described}


_OTHER_TASK = {
    "generate": ("the model gives embeddings and generates no text; use /v1/embeddings", "no_generation"),
    "embed": ("the model generates text and gives no embeddings; compile one with --pooling", "no_embeddings"),
}
"""What is said, with its code, where a model is asked to do what it does not."""


def check_model(state: ServerState, name: str | None, task: Task) -> None:
    """Hold a request to the model that is there.

    Raises:
        HttpError: 404, another model, or one that does something else; 503, no engine.
    """
    info = state.info
    if name is not None and name != state.config.name:
        known = state.config.name
        message = f"the model {name!r:.100} is not here; this server has {known!r}"
        raise HttpError(404, message, param="model", code="model_not_found")
    if info.task != task:
        message, code = _OTHER_TASK[task]
        raise HttpError(404, message, code=code)


async def _prompts(state: ServerState, body: CompletionBody) -> list[list[int]]:
    given = body.prompt
    if isinstance(given, str):
        return [await state.encode(given, special=True)]
    if not given:
        raise HttpError(400, "'prompt' is empty", param="prompt")
    kinds = {type(item) for item in given}
    if len(kinds) > 1:
        raise HttpError(400, "'prompt' mixes texts and tokens", param="prompt")
    if kinds == {int}:
        return [given]  # type: ignore[list-item]
    if kinds == {list}:
        return given  # type: ignore[return-value]
    _check_choices(state, len(given) * body.n)
    return [await state.encode(str(text), special=True) for text in given]


def _check_choices(state: ServerState, count: int) -> None:
    most = state.options.max_choices
    if count > most:
        raise HttpError(400, f"{count} answers are asked for (prompts times n); at most {most} may be", param="n")


def _job(
    state: ServerState,
    body: GenerateBody,
    prompts: list[list[int]],
    limit: int | None,
    logprobs: int | None,
    *,
    tools: bool = False,
) -> Job:
    _check_choices(state, len(prompts) * body.n)
    stop_ids = list(dict.fromkeys([*body.stop_token_ids, *(() if body.ignore_eos else state.text.stop_ids)]))
    seed = secrets.randbits(63) if body.seed is None else body.seed & ((1 << 63) - 1)
    requests = []
    try:
        samplings = [body.sampling(choice_seed(seed, choice)) for choice in range(body.n)]
    except UsageError as error:
        raise HttpError(400, error.what, code="invalid_parameter") from error
    for prompt in prompts:
        room = _room(state, prompt, limit)
        for sampling in samplings:
            requests.append(
                Generate(
                    id=state.client.new_id(),
                    prompt=prompt,
                    max_new_tokens=room,
                    sampling=sampling,
                    stop_ids=stop_ids,
                    logprobs=logprobs,
                    logit_bias=body.logit_bias,
                    priority=body.priority,
                    grammar=body.response_format.grammar() if body.response_format else None,
                )
            )
    chat = isinstance(body, ChatBody)
    return Job(
        state=state,
        id=("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
        chat=chat,
        requests=requests,
        prompt_tokens=sum(map(len, prompts)),
        stops=body.stops,
        hidden=frozenset(stop_ids),
        logprobs=logprobs,
        stream=body.stream,
        usage=body.stream_options or StreamOptions(),
        tools=tools,
    )


def _room(state: ServerState, prompt: list[int], limit: int | None) -> int:
    """New tokens of a prompt: what was asked for, else what the context leaves."""
    context, most = state.info.context_length, state.options.max_prompt_tokens
    if not prompt:
        raise HttpError(400, "'prompt' is empty", param="prompt")
    if most is not None and len(prompt) > most:
        raise too_long(len(prompt), most)
    if len(prompt) >= context or (limit or 0) > context - len(prompt):
        asked = f" and {limit} new tokens" if limit else ""
        raise HttpError(
            400,
            f"a prompt of {len(prompt)} tokens{asked} does not fit the context of {context}",
            code="context_length_exceeded",
        )
    return limit or context - len(prompt)


def too_long(tokens: int, most: int) -> HttpError:
    """A prompt has more tokens than may be."""
    return HttpError(400, f"the prompt has {tokens} tokens; at most {most} may be", code="context_length_exceeded")
