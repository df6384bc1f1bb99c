"""Answers that hold to grammars, on the host and on the device, beside answers that are free."""

from __future__ import annotations

import dataclasses
import functools
import json
import re

import pytest
from artifacts import captured_folder
from conftest import EXAMPLE
from serving import run
from stages import apply

from optc.compiler.diagnostics import InputError, TargetError
from optc.passes.kv_cache.paged import PageKVCache
from optc.runtime.generation.generate import generate
from optc.runtime.generation.tokenizer import Tokenizer, eos_token_ids, load_tokenizer
from optc.runtime.sampling import Sampling
from optc.runtime.serving.device_runner import DeviceRunner
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.grammar import MOST_SOURCE, Grammars
from optc.runtime.serving.model_runner import HostRunner
from optc.runtime.serving.paged_engine import PagedEngine
from optc.runtime.serving.request import Generate, Grammar
from optc.runtime.serving.session_engine import SessionEngine
from optc.runtime.sessions.paged import PagedSession
from optc.runtime.sessions.program import open_program

SCHEMA = {
    "x-guidance": {"whitespace_pattern": "[ ]?"},
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 3, "maximum": 9}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GRAMMARS = [
    Grammar(kind="json-schema", source=json.dumps(SCHEMA)),
    Grammar(kind="regex", source="(red|green) [0-9]{3}"),
    Grammar(kind="grammar", source='start: "a" | "b" start "c"'),
]


@functools.cache
def session() -> PagedSession:
    found = open_program(apply(PageKVCache(), captured_folder(EXAMPLE)).program)
    assert isinstance(found, PagedSession)
    return found


@functools.cache
def tokenizer() -> Tokenizer:
    found = load_tokenizer(EXAMPLE)
    assert found is not None
    return found


def grammars() -> Grammars:
    return Grammars(EXAMPLE, session().vocab_size, eos_token_ids(EXAMPLE))


def engine(kind: str) -> PagedEngine | SessionEngine:
    options = EngineOptions(max_running=5, token_budget=64)
    if kind == "session":
        return SessionEngine(session(), options, grammars())
    model = dataclasses.replace(session().model, on_device=kind == "device")
    return PagedEngine(model, options, DeviceRunner if kind == "device" else HostRunner, grammars=grammars())


@pytest.mark.parametrize("kind", ["host", "device", "session"])
def test_answers_hold_to_their_grammars(kind: str) -> None:
    prompt = tokenizer().encode("The old man")
    items = [
        Generate(
            id=str(i),
            prompt=prompt,
            max_new_tokens=60,
            grammar=grammar,
            logprobs=1 if i == 1 else None,
            sampling=Sampling(temperature=1.0, seed=i),
        )
        for i, grammar in enumerate(GRAMMARS)
    ]
    got = run(engine(kind), [*items, Generate(id="free", prompt=prompt, max_new_tokens=8)])
    texts = [tokenizer().decode(got[str(i)].tokens) for i in range(3)]
    found = json.loads(texts[0])
    assert sorted(found) == ["age", "name"]
    assert 3 <= found["age"] <= 9
    assert len(found["name"]) <= 6
    assert re.fullmatch("(red|green) [0-9]{3}", texts[1])
    middle = texts[2].index("a")
    assert texts[2] == "b" * middle + "a" + "c" * middle
    assert [got[str(i)].finish for i in range(3)] == ["stop"] * 3
    assert len([item for answer in got["1"].answers for item in answer.logprobs or []]) == len(got["1"].tokens)
    assert got["free"].tokens == generate(session(), [prompt], max_new_tokens=8).tokens[0]


@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        (Grammar(kind="regex", source="[ab"), "unclosed character class"),
        (Grammar(kind="json-schema", source="{"), "Expecting property name"),
        (Grammar(kind="json-schema", source='{"type": 5}'), "type must be a string"),
        (Grammar(kind="grammar", source="start: foo"), 'unknown name: "foo"'),
        (Grammar(kind="regex", source="a" * (MOST_SOURCE + 1)), "65537 characters; 65536 at most"),
        (Grammar(kind="json-schema", source="[" * 60000), "recursion"),
    ],
)
def test_grammars_that_are_refused(grammar: Grammar, why: str) -> None:
    served = engine("host")
    with pytest.raises(InputError, match="the grammar cannot be compiled") as caught:
        served.submit(Generate(id="a", prompt=[1], max_new_tokens=1, grammar=grammar))
    assert why in str(caught.value.why)
    assert served.idle


def test_what_grammars_need(monkeypatch: pytest.MonkeyPatch) -> None:
    without = PagedEngine(session().model, EngineOptions(), HostRunner)
    item = Generate(id="a", prompt=[1], max_new_tokens=1, grammar=Grammar(kind="json"))
    with pytest.raises(InputError, match="the model has no tokenizer"):
        without.submit(item)
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(TargetError, match="need the package llguidance") as caught:
        engine("host").submit(item)
    assert caught.value.remedy == "pip install 'optc[grammar]', where the server runs"
