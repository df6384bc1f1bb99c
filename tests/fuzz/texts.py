"""Small files of text that commands read beside models: signatures and keys, chat templates, traces, searches, summaries,
the members of a package, and bodies of requests."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import zipfile
from collections.abc import Iterable
from typing import Any, ClassVar

import msgspec
from fuzz.mutations import blind, mutated, text_of
from fuzz.readers import STEP, Input, JsonReader, Reader


class SearchFile(JsonReader):
    """search.json, where a search that was stopped goes on."""

    name = "search.json"
    trees: ClassVar[list[Any]] = [
        {
            "key": "k",
            "tried": {
                "none": {"name": "none", "outcome": "made", "size": 100, "perplexity": 9.5, "loss": 0.0, "kl": 0.0},
                "rtn-4": {"name": "rtn-4", "outcome": "gate", "why": "KL", "size": 30, "seconds": 1.5},
            },
        }
    ]

    def prepare(self) -> None:
        from optc import searching
        from optc.request import from_python

        class Search(searching._Search):
            def _key(self) -> str:
                return "k"  # it depends on the model, which is sound

        self._text = self.place / "text"
        self._text.write_text("a")
        self._search, self._limits, self._request = Search, searching.Limits(), from_python("onnx-cpu")
        super().prepare()

    def read(self, name: str, data: bytes) -> None:
        from optc.searching import front

        folder = self.write(f"search/{name}", data).parent
        search = self._search(folder, self._request, folder, self._text, self._limits, None, 0)
        front(search.state.tried.values(), self._limits)
        search.remove_all_but(set())
        assert self._text.exists(), "a name in the file led out of the folder"


class Signature(Reader):
    """manifest.sig, and keys in PEM."""

    packages = ("cryptography",)

    def prepare(self) -> None:
        from optc.compiler.artifact import trust

        self._data = b"manifest"
        for old in self.place.glob("key*"):
            old.unlink()
        public = trust.new_keys(self.place / "key")
        self._trusted = {"key": trust.read_public_key(public)}
        self._sound = {"manifest.sig": trust.sign(self._data, self.place / "key")}
        self._sound |= {path.name: path.read_bytes() for path in (public, self.place / "key")}

    def seed_inputs(self) -> Iterable[Input]:
        return list(self._sound.items())

    def make(self, rng: random.Random) -> Input:
        name = rng.choice(sorted(self._sound))
        data = self._sound[name]
        if name == "manifest.sig" and rng.random() < 0.5:
            return name, text_of(mutated(json.loads(data), rng), rng)
        return name, blind(data, rng)

    def read(self, name: str, data: bytes) -> None:
        from optc.compiler.artifact import trust

        path = self.write(f"read/{name}", data)
        if name == "manifest.sig":
            trust.check_signature(path.parent, self._data, self._trusted)
        elif name == "key":
            trust.sign(self._data, path)
        else:
            trust.read_public_key(path)


class ChatFile(Reader):
    """The chat template of a model: its files, and its code on a conversation."""

    cost = 3.0
    _TEMPLATE = (
        "{%- set system = 'You help.' -%}{{ bos_token }}{% for m in messages %}{% if loop.first and m.role != 'system' %}"
        "{{ system }}{% endif %}<|{{ m['role'] }}|>{{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
        "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{% macro turn(x) %}[{{ x }}]{% endmacro %}{{ turn(1) }}"
        "{% set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n * 2 }}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    _PIECES: ClassVar[tuple[str, ...]] = (
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = b %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ 'a'.ljust(10 ** 10) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '{:9999999999}'.format(1) }}",
        "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
        "{{ lipsum(n=1000000000) }}",
        "{% set ns = namespace(t='aaaaaaaaaa') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}{{ ns.t }}",
        "{% set ns = namespace(t='aaaaaaaaaa') %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(90) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ raise_exception('no') }}",
        "{{ strftime_now('%Y' * 1000) }}",
        "{% include 'x' %}",
        "{% import 'os' as os %}",
        "{{ messages | map(attribute='role') | join(',' * 1000000) }}",
        "{{ 'a' | center(10 ** 10) }}",
        "{{ messages | tojson(indent=1000000000) }}",
        "{{ range(99999) | map('string') | join('b' * 1000000) }}",
        "{{ ('b' * 1000000).join(range(99999) | map('string')) }}",
        "{{ {'a': range(99999) | list} | tojson(indent=99999) }}",
        "{{ range(99999) | map('center', 99999) | list }}",
        "{{ ['a' * 1000000] * 1000000 }}",
        "{{ '%s' % [['a' * 1000000] * 1000000] }}",
        "{% generation %}x{% endgeneration %}",
        "{{ namespace(**{'__class__': 1}) }}",
    )
    _MESSAGES: ClassVar[list[dict[str, str]]] = [
        {"role": "user", "content": "héllo <b>"},
        {"role": "assistant", "content": "world"},
        {"role": "user", "content": "again"},
    ]

    def seed_inputs(self) -> Iterable[Input]:
        return [("chat_template.jinja", self._TEMPLATE.encode()), ("tokenizer_config.json", self._config())]

    def _config(self, rng: random.Random | None = None) -> bytes:
        tree = {"chat_template": self._TEMPLATE, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
        return text_of(mutated(tree, rng), rng) if rng else text_of(tree)

    def make(self, rng: random.Random) -> Input:
        chance = rng.random()
        if chance < 0.2:
            return "tokenizer_config.json", self._config(rng)
        if chance < 0.3:
            tree = {"chat_template": [{"name": "default", "template": self._TEMPLATE}, {"name": "rag"}]}
            return "chat_template.json", text_of(mutated(tree, rng), rng)
        template = self._TEMPLATE
        if chance < 0.32:  # what is given up after seconds is not most of the time
            place = rng.choice([0, template.index("{% if tools"), len(template)])
            template = template[:place] + rng.choice(self._PIECES) + template[place:]
            return "chat_template.jinja", template.encode()
        return "chat_template.jinja", blind(template.encode(), rng)

    def read(self, name: str, data: bytes) -> None:
        from optc.runtime.generation.chat_template import load_chat_template

        folder = self.place / "read"
        shutil.rmtree(folder, ignore_errors=True)
        self.write(f"read/{name}", data)
        template = load_chat_template(folder)
        if template is not None:
            template.render(self._MESSAGES, tools=[{"type": "function"}]).encode()


class Trace(JsonReader):
    """A trace of requests for `optc bench --serve`."""

    name = "trace.jsonl"
    trees: ClassVar[list[Any]] = [{"prompt_tokens": 128, "output_tokens": 64, "at": 0.5}]

    def make(self, rng: random.Random) -> Input:
        return self.name, b"\n".join(super(Trace, self).make(rng)[1] for _ in range(rng.randrange(1, 4)))

    def read(self, name: str, data: bytes) -> None:
        from optc.runtime.measuring.load.workload import read_trace

        read_trace(self.write(name, data))


class Summary(JsonReader):
    """train.json, by which a run that was killed behind its end is known."""

    name = "train.json"

    def prepare(self) -> None:
        self.trees = [
            {
                **dict.fromkeys(("steps", "tokens", "parameters", "trainable"), 1),
                "output": "x",
                "run": "r",
                "resumed_from": None,
                "first_loss": 2.5,
                "last_loss": 1.5,
                "seconds": 0.5,
                "config": {"data": {"text": ["x"]}},
                "last": {**STEP, "seconds": 0.1, "tokens_per_s": 80.0},
            }
        ]
        super().prepare()

    def read(self, name: str, data: bytes) -> None:
        from optc.training.loop import _finished

        shutil.rmtree(self.place / "out", ignore_errors=True)
        output = self.write(f"out/{name}", data).parent
        _finished(output, self.place / "out.run")


class PackageArchive(Reader):
    """The list of members of an AOTInductor package, before torch unpacks it."""

    def prepare(self) -> None:
        from optc.runtime.carried.pt2_runner import ArchiveError

        type(self).refusals = (ArchiveError,)
        self._sound = self._packed({f"model/data/aotinductor/model/{name}": b"x" * 40 for name in ("a.so", "b.json")})

    def _packed(self, members: dict[str, bytes]) -> bytes:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
            for name, data in members.items():
                file.writestr(name, data)
        return packed.getvalue()

    def seed_inputs(self) -> Iterable[Input]:
        return [("model.pt2", self._sound)]

    def make(self, rng: random.Random) -> Input:
        if rng.random() < 0.8:
            return "model.pt2", blind(self._sound, rng)
        names = ["../x", "/x", "a/../../x", "C:x", "a\\..\\x", "x\ud800", "a", "a" * 60_000, ""]
        with contextlib.suppress(ValueError, UnicodeError, IndexError):
            return "model.pt2", self._packed({rng.choice(names): bytes(rng.choice((0, 9, 1 << 16))) for _ in range(3)})
        return "model.pt2", b"PK\x05\x06"

    def read(self, name: str, data: bytes) -> None:
        from optc.runtime.carried.pt2_runner import check_archive

        check_archive(self.write(name, data))


class RequestBody(Reader):
    """Bodies of requests to `optc serve`: what comes from a network is read as files are."""

    packages = ("starlette",)
    _BODIES: ClassVar[dict[str, dict[str, Any]]] = {
        "CompletionBody": {"prompt": ["a", "b"], "max_tokens": 4, "stop": ["x"], "logit_bias": {"5": 1.5}, "n": 2},
        "ChatBody": {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {"role": "tool", "content": "b"},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
            "chat_template_kwargs": {"a": 1},
        },
        "EmbeddingBody": {"input": [[1, 2], [3]], "encoding_format": "base64"},
        "TokenizeBody": {"prompt": "a"},
        "DetokenizeBody": {"tokens": [1, 2]},
    }

    def prepare(self) -> None:
        from optc.runtime.serving.http.errors import HttpError

        type(self).refusals = (HttpError,)

    def seed_inputs(self) -> Iterable[Input]:
        return [(name, text_of(tree)) for name, tree in self._BODIES.items()]

    def make(self, rng: random.Random) -> Input:
        name = rng.choice(sorted(self._BODIES))
        tree = {"model": "m", **self._BODIES[name]}
        return name, text_of(mutated(tree, rng), rng) if rng.random() < 0.5 else blind(text_of(tree), rng)

    def read(self, name: str, data: bytes) -> None:
        from optc.runtime.serving.http import bodies

        msgspec.json.encode(bodies.read_json(data, getattr(bodies, name)))


TEXTS = (SearchFile, Signature, ChatFile, Trace, Summary, PackageArchive, RequestBody)
"""Cheap readers, each of one file."""
