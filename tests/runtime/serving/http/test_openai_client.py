"""What clients see: the real openai package and curl against a server whose answers are known beforehand."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from serving_fake_engine import ECHO, FAIL, next_token
from serving_server import Server, example_tokenizer, refusal, running, text_artifact

from optc.runtime.serving.settings import ServeOptions

TOKENS = example_tokenizer()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(text_artifact(), ServeOptions(workers=2)) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def answer(prompt: list[int], count: int) -> list[int]:
    return [next_token(prompt, index) for index in range(count)]


PROMPT = TOKENS.encode("The old man")
CHAT = TOKENS.encode("user: Hello\nassistant:", special=False)


def test_a_completion(client: OpenAI) -> None:
    found = client.completions.create(model="model", prompt="The old man", max_tokens=6)
    assert found.choices[0].text == TOKENS.decode(answer(PROMPT, 6))
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (4, 6, 10)
    default = client.completions.create(model="model", prompt=PROMPT)
    assert default.usage is not None
    assert default.usage.completion_tokens == 16


def test_prompts_and_choices_have_an_order(client: OpenAI) -> None:
    prompts = [TOKENS.encode("One"), TOKENS.encode("Two and three")]
    found = client.completions.create(model="model", prompt=prompts, n=2, max_tokens=4)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    texts = [TOKENS.decode(answer(prompt, 4)) for prompt in prompts]
    assert [choice.text for choice in found.choices] == [texts[0], texts[0], texts[1], texts[1]]
    assert found.usage is not None
    assert found.usage.prompt_tokens == sum(map(len, prompts))


def test_a_stream_is_the_whole_answer(client: OpenAI) -> None:
    events = list(
        client.completions.create(
            model="model",
            prompt="The old man",
            max_tokens=40,
            stream=True,
            n=2,
            stream_options={"include_usage": True},
        )
    )
    for index in (0, 1):
        pieces = [choice.text for event in events for choice in event.choices if choice.index == index]
        assert "".join(pieces) == TOKENS.decode(answer(PROMPT, 40))
    ends = [choice.finish_reason for event in events for choice in event.choices if choice.finish_reason]
    assert ends == ["length", "length"]
    assert events[-1].choices == []
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == 80


def test_usage_of_every_event(server: Server) -> None:
    body = {"prompt": "x", "max_tokens": 9, "stream": True, "stop": None, "ignore_eos": True}
    options = {"include_usage": True, "continuous_usage_stats": True}
    text = server.post("/v1/completions", {**body, "stream_options": options})[1]
    counts = [json.loads(row[6:])["usage"]["completion_tokens"] for row in text.split("\n\n")[:-2]]
    assert counts == sorted(counts)
    assert counts[-1] == 9


def test_stop_strings_stop_ids_and_bias(client: OpenAI, server: Server) -> None:
    whole = TOKENS.decode(answer(PROMPT, 40))
    stop = whole[30:37]
    for stream in (False, True):
        body = {"model": "model", "prompt": "The old man", "max_tokens": 40, "stop": ["@@@", stop]}
        if stream:
            events = client.completions.create(**body, stream=True)
            rows = [choice for event in events for choice in event.choices]
            text, reason = "".join(row.text for row in rows), rows[-1].finish_reason
        else:
            found = client.completions.create(**body).choices[0]
            text, reason = found.text, found.finish_reason
        assert (text, reason) == (whole[: whole.index(stop)], "stop")
    third = answer(PROMPT, 3)[2]
    found = client.completions.create(
        model="model", prompt="The old man", extra_body={"stop_token_ids": [third], "min_p": 0.1, "top_k": 5}
    )
    assert found.choices[0].text == TOKENS.decode(answer(PROMPT, 2))
    assert found.usage is not None
    assert (found.choices[0].finish_reason, found.usage.completion_tokens) == ("stop", 3)
    assert server.settled("optc_requests_running", 0) == 0  # those whose text stopped were cancelled
    client.completions.create(model="model", prompt="x", max_tokens=1, logit_bias={"5": -100})


def test_logprobs(client: OpenAI) -> None:
    first = answer(PROMPT, 1)[0]
    found = client.completions.create(model="model", prompt="The old man", max_tokens=2, logprobs=2)
    rows = found.choices[0].logprobs
    assert rows is not None
    assert rows.tokens is not None
    assert rows.tokens == [TOKENS.token_text(token) for token in answer(PROMPT, 2)]
    assert rows.token_logprobs == [-0.5, -0.5]
    assert rows.text_offset == [0, len(rows.tokens[0])]
    assert rows.top_logprobs is not None
    assert rows.top_logprobs[0] == {TOKENS.token_text(first): -0.5, TOKENS.token_text(first + 1): -1.5}
    chat = client.chat.completions.create(
        model="model", messages=[{"role": "user", "content": "Hello"}], max_tokens=2, logprobs=True, top_logprobs=1
    )
    assert chat.choices[0].logprobs is not None
    assert chat.choices[0].logprobs.content is not None
    row = chat.choices[0].logprobs.content[0]
    text = TOKENS.token_text(answer(CHAT, 1)[0])
    assert (row.token, row.logprob, row.bytes) == (text, -0.5, list(text.encode()))
    assert [item.token for item in row.top_logprobs] == [text]


def test_a_chat(client: OpenAI) -> None:
    body = {"model": "model", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 7}
    found = client.chat.completions.create(**body)  # type: ignore[call-overload]
    assert found.choices[0].message.content == TOKENS.decode(answer(CHAT, 7))
    events = list(client.chat.completions.create(**body, stream=True))  # type: ignore[call-overload]
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events) == TOKENS.decode(answer(CHAT, 7))
    assert events[-1].choices[0].finish_reason == "length"
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    same = client.chat.completions.create(**{**body, "messages": [{"role": "user", "content": parts}]})  # type: ignore[call-overload]
    assert same.choices[0].message.content == found.choices[0].message.content
    rest = client.chat.completions.create(**{**body, "max_tokens": None})  # type: ignore[call-overload]
    assert rest.usage.total_tokens == 2048  # to the end of the context


def test_calls_of_tools(client: OpenAI) -> None:
    """The engine says again what it was told, a call among it; a template's own example is none."""
    tool = {"type": "function", "function": {"name": "less", "parameters": {"type": "object"}}}
    call = '<tool_call>{"name": "less", "arguments": {"a": 1}}</tool_call>'
    rendered = f"user: Do {call} it\nassistant:"
    body = {"model": "model", "tools": [tool], "extra_body": {"priority": ECHO}}
    body["messages"] = [{"role": "user", "content": f"Do {call} it"}]
    head = 'Tools: [{"type": "function", "function": {"name": "less", "parameters": {"type": "object"}}}] '
    length = len(TOKENS.encode(f"{head}say <tool_call>{{}}</tool_call>\n{rendered}", special=False))
    body["max_tokens"] = length
    found = client.chat.completions.create(**body).choices[0]  # type: ignore[call-overload]
    assert (found.message.tool_calls[0].function.name, found.message.tool_calls[0].function.arguments) == (
        "less",
        '{"a": 1}',
    )
    assert len(found.message.tool_calls) == 1
    said = f"{head}say <tool_call>{{}}</tool_call>\nuser: Do  it\nassistant:"
    assert found.message.content == said
    events = list(client.chat.completions.create(**body, stream=True))  # type: ignore[call-overload]
    assert "".join(event.choices[0].delta.content or "" for event in events) == said
    calls = [item for event in events for item in event.choices[0].delta.tool_calls or []]
    assert [(item.index, item.function.name, item.function.arguments) for item in calls] == [(0, "less", '{"a": 1}')]
    turn = [
        *body["messages"],
        {"role": "assistant", "content": None, "tool_calls": [calls[0].model_dump(exclude={"index"})]},
        {"role": "tool", "tool_call_id": calls[0].id, "content": "true"},
    ]
    assert client.chat.completions.create(model="model", messages=turn, max_tokens=3).usage is not None  # type: ignore[arg-type]


def test_models_and_tokens(client: OpenAI, server: Server) -> None:
    found = client.models.list().data
    assert [item.id for item in found] == ["model"]
    assert found[0].model_extra is not None
    assert found[0].model_extra["serves"] == "continuous"
    assert client.models.retrieve("model").id == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    status, tokens = server.post("/tokenize", {"prompt": "The old man"})
    assert (status, tokens) == (200, {"tokens": PROMPT, "count": 4, "max_model_len": 2048})
    assert server.post("/tokenize", {"messages": [{"role": "user", "content": "Hello"}]})[1]["tokens"] == CHAT
    assert server.post("/detokenize", {"tokens": PROMPT}) == (200, {"prompt": "The old man"})
    refusal(server.post("/detokenize", {"tokens": [8192]}), 400)


def test_refusals_are_the_clients_exceptions(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="model", prompt="x", echo=True)
    assert caught.value.param == "echo"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError) as none:
        client.embeddings.create(model="model", input="x")
    assert none.value.code == "no_embeddings"
    with pytest.raises(openai.InternalServerError) as failed:
        client.completions.create(model="model", prompt=[5, FAIL])
    assert failed.value.code == "engine_error"


CASES = {
    "reasoning_effort": ("/v1/chat/completions", {"reasoning_effort": "low"}, "unknown_parameter"),
    "messages": ("/v1/chat/completions", {"messages": []}, "invalid_parameter"),
    "messages[0].content[0]": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        None,
    ),
    "tool_choice": ("/v1/chat/completions", {"tool_choice": "required"}, "invalid_parameter"),
    "parallel_tool_calls": ("/v1/chat/completions", {"parallel_tool_calls": False}, "unsupported_parameter"),
    "temperature": ("/v1/completions", {"temperature": 3}, "invalid_parameter"),
    "max_tokens": ("/v1/completions", {"max_tokens": "5"}, "invalid_parameter"),
    "n": ("/v1/completions", {"n": 129}, None),
    "suffix": ("/v1/completions", {"suffix": "end"}, "unsupported_parameter"),
    "best_of": ("/v1/completions", {"best_of": 4}, "unsupported_parameter"),
    "logit_bias": ("/v1/completions", {"logit_bias": {"five": 1}}, "invalid_parameter"),
    "stream_options": ("/v1/completions", {"stream_options": {"include_usage": True}}, None),
    "prompt": ("/v1/completions", {"prompt": ["a", 5]}, None),
}


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_is_refused_by_name(server: Server, name: str) -> None:
    path, change, code = CASES[name]
    good = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    error = refusal(server.post(path, {**good, **change}), 400)
    assert name.split("[")[0] in error["message"] or error["param"] == name
    assert code is None or error["code"] == code


def test_null_is_the_same_as_nothing(server: Server) -> None:
    body = {"prompt": "The old man", "max_tokens": 6, "stop": None, "logprobs": None, "seed": None, "n": None}
    assert server.post("/v1/completions", body)[1]["choices"][0]["text"] == TOKENS.decode(answer(PROMPT, 6))


def test_what_does_not_fit_the_model(server: Server) -> None:
    long = [300] * 2049
    assert refusal(server.post("/v1/completions", {"prompt": long}), 400)["code"] == "context_length_exceeded"
    error = refusal(server.post("/v1/completions", {"prompt": [300] * 2000, "max_tokens": 49}), 400)
    assert error["message"] == "a prompt of 2000 tokens and 49 new tokens does not fit the context of 2048"
    refusal(server.post("/v1/completions", {"prompt": []}), 400)
    refusal(server.post("/v1/completions", {"prompt": [[]]}), 400)
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    body = {"messages": [{"role": "user", "content": "x"}], "response_format": schema}
    assert "no grammars" in refusal(server.post("/v1/chat/completions", body), 400)["message"]  # the engine's own words


def test_the_paths_of_a_server(server: Server) -> None:
    refusal(server.request("GET", "/v1/nothing")[:2], 404)
    refusal(server.request("GET", "/../../etc/passwd")[:2], 404)
    refusal(server.request("GET", "/%2e%2e/%2e%2e/etc/passwd")[:2], 404)
    status, body, headers = server.request("GET", "/v1/completions")
    refusal((status, body), 405)
    assert headers["allow"] == "POST"
    assert server.request("GET", "/health")[:2] == (200, {"status": "ok"})
    status, page, headers = server.request("GET", "/")
    assert (status, headers["x-content-type-options"]) == (200, "nosniff")
    assert "<textarea" in page
    assert "script-src 'sha256-" in headers["content-security-policy"]


def test_metrics_parse_and_count(server: Server) -> None:
    before = {status: server.metric(f'optc_requests_total{{status="{status}"}}') for status in (200, 404)}
    tokens = server.metric("optc_generated_tokens_total")
    server.post("/v1/completions", {"prompt": "x", "max_tokens": 9})
    server.request("GET", "/nothing")
    assert server.settled("optc_generated_tokens_total", tokens + 9) == tokens + 9
    assert server.metric('optc_requests_total{status="404"}') == before[404] + 1
    assert server.metric('optc_requests_total{status="200"}') > before[200]
    families = {item.name: item for item in text_string_to_metric_families(server.request("GET", "/metrics")[1])}
    first = {row.labels.get("le"): row.value for row in families["optc_time_to_first_token_seconds"].samples}
    assert first["+Inf"] >= 1
    assert list(first.values())[:14] == sorted(list(first.values())[:14])
    assert {item.type for item in families.values()} == {"gauge", "counter", "histogram"}
    assert server.settled("optc_kv_blocks_used", 0) == 0


def test_curl(server: Server) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    body = json.dumps({"prompt": "The old man", "max_tokens": 6, "stream": True})
    kind = "content-type: application/json"
    found = subprocess.run(
        ["curl", "-sN", f"{server.url}/v1/completions", "-H", kind, "-d", body],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    events = [line.removeprefix("data: ") for line in found.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(item)["choices"][0]["text"] for item in events[:-1]) == TOKENS.decode(answer(PROMPT, 6))


def test_workers_share_one_engine(server: Server) -> None:
    seen = set()
    for _ in range(40):  # each connection goes to whichever worker takes it
        seen.add(server.post("/v1/completions", {"prompt": "x", "max_tokens": 1})[0])
    assert seen == {200}
