"""The readers of optc, each as a function of one file's bytes: what is fuzzed, and what the kept inputs are replayed on.

An input is (name, bytes): the file of that name in the reader's folder holds these bytes, the others are sound. A reader
may succeed or raise an `OptcError` (a carried script its own error); anything else is a fault.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import msgspec
from fuzz.mutations import blind, mutated, places, text_of
from fuzz.seeds import Seeds, split_safetensors

Input = tuple[str, bytes]


class ForkError(Exception):
    """What a fork of a reader ended with.

    Args:
        kind: as `kind_of` names it. detail: the text of the error.
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class Reader:
    """One reader.

    Args:
        seeds: sound files. place: a folder of the reader's own.

    Attributes:
        cost: inputs of it cost about so many of the cheapest: its share of a campaign's inputs.
        refusals: exceptions that are its documented answer, beside OptcError.
        packages: what must be installed for it, beside optc's own needs.
    """

    cost: ClassVar[float] = 1.0
    packages: ClassVar[tuple[str, ...]] = ()
    refusals: ClassVar[tuple[type[BaseException], ...]] = ()

    def __init__(self, seeds: Seeds, place: Path) -> None:
        self.seeds, self.place = seeds, place
        place.mkdir(parents=True, exist_ok=True)
        self.prepare()

    def prepare(self) -> None:
        """Make what the inputs are mutations of."""

    def seed_inputs(self) -> Iterable[Input]:
        """Sound inputs, for coverage-guided fuzzing to begin with."""
        return ()

    def make(self, rng: random.Random) -> Input:
        """The next input."""
        raise NotImplementedError

    def read(self, name: str, data: bytes) -> None:
        """Read it."""
        raise NotImplementedError

    def read_guarded(self, name: str, data: bytes) -> None:
        """The same; its documented refusals are no failure."""
        from optc.compiler.diagnostics import OptcError

        with contextlib.suppress(OptcError, *self.refusals):
            self.read(name, data)

    def write(self, name: str, data: bytes) -> Path:
        """Put an input into the folder."""
        path = self.place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path


class JsonReader(Reader):
    """A reader of one JSON file with sound trees."""

    name = "input.json"
    trees: list[Any]

    def seed_inputs(self) -> Iterable[Input]:
        return [(self.name, text_of(tree)) for tree in self.trees]

    def prepare(self) -> None:
        self._texts = [text_of(tree) for tree in self.trees]

    def make(self, rng: random.Random) -> Input:
        index = rng.randrange(len(self.trees))
        if rng.random() < 0.3:
            return self.name, text_of(mutated(self.trees[index], rng), rng)
        return self.name, blind(self._texts[index], rng)


# -- cheap: one parser ------------------------------------------------------------------------------


def build_safetensors(header: Any, data: bytes, rng: random.Random | None = None) -> bytes:
    """A safetensors file; now and then its length is wrong."""
    text = header if isinstance(header, bytes) else text_of(header, rng)
    size = len(text)
    if rng and rng.random() < 0.05:
        size = rng.choice([0, 1, abs(size - 1), size + 1, 2**63, 2**64 - 1, 100_000_001, size * 2])
    return struct.pack("<Q", size) + text + data


def mutated_safetensors(header: Any, data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with a mutated header, a wrong end, or flipped bytes."""
    chance = rng.random()
    if chance < 0.7:
        return build_safetensors(mutated(header, rng), data, rng)
    if chance < 0.75:
        return build_safetensors(header, data[: rng.randrange(len(data) + 1)])
    if chance < 0.8:
        return build_safetensors(header, data + b"x" * rng.randrange(1, 99))
    whole = build_safetensors(header, data)
    return blind(whole, rng, end=len(whole) - len(data) if rng.random() < 0.9 else None)


class Header(Reader):
    """The header of a safetensors file."""

    _SMALL: ClassVar[dict[str, Any]] = {
        "__metadata__": {"format": "pt"},
        "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]},
    }

    def seed_inputs(self) -> Iterable[Input]:
        return [("model.safetensors", build_safetensors(self._SMALL, bytes(26)))]

    def make(self, rng: random.Random) -> Input:
        if rng.random() < 0.3:
            return "model.safetensors", mutated_safetensors(self._SMALL, bytes(26), rng)
        return "model.safetensors", blind(build_safetensors(self._SMALL, bytes(26)), rng)

    def read(self, name: str, data: bytes) -> None:
        from optc.compiler.formats.safetensors_header import read_header

        read_header(self.write(name, data))


class ManifestFile(JsonReader):
    """manifest.json, sealed again after it was changed."""

    name = "manifest.json"

    def prepare(self) -> None:
        from artifacts import make_manifest

        self.trees = [msgspec.to_builtins(make_manifest())]
        super().prepare()

    def read(self, name: str, data: bytes) -> None:
        from optc.compiler.artifact.manifest import decode

        decode(sealed(data), name)


def sealed(data: bytes) -> bytes:
    """The bytes of a manifest with the hash of themselves; unchanged where they are no object."""
    try:
        tree = json.loads(data)
        tree.pop("self_sha256", None)
        text = json.dumps(tree).encode()[:-1] + b',\n  "self_sha256": ""\n}\n'
    except (ValueError, AttributeError, RecursionError, TypeError):
        return data
    digest = hashlib.sha256(text).hexdigest().encode()
    return text.replace(b'"self_sha256": ""\n}\n', b'"self_sha256": "' + digest + b'"\n}\n')


class ConfigFile(JsonReader):
    """config.json and other JSON of a model folder."""

    name = "config.json"
    trees: ClassVar[list[Any]] = [
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "quantization_config": {}}
    ]

    def read(self, name: str, data: bytes) -> None:
        from optc.compiler.diagnostics import InputError
        from optc.compiler.model_folder.config_file import parts_beside, read_config
        from optc.compiler.model_folder.sentence import modules_behind

        with contextlib.suppress(InputError):
            modules_behind(self.write("modules/modules.json", data).parent)
        parts_beside(read_config(self.write(name, data).parent, trust_remote_code=None))


class ShapeText(Reader):
    """Sizes of a saved program as text."""

    _TEXTS: ClassVar[tuple[bytes, ...]] = (
        b"Mul(Integer(2), Symbol('s70', positive=True, integer=True))",
        b"Add(FloorDiv(Symbol('s1', integer=True), Integer(3)), Integer(-1))",
        b"Max(Integer(1), Pow(Symbol('u0', integer=True), Integer(2)))",
    )

    def prepare(self) -> None:
        from optc.compiler.ir.saved.strict_decoding import RefusedError

        type(self).refusals = (ValueError, RefusedError)

    def seed_inputs(self) -> Iterable[Input]:
        return [("shape", text) for text in self._TEXTS]

    def make(self, rng: random.Random) -> Input:
        return "shape", blind(rng.choice(self._TEXTS), rng)

    def read(self, name: str, data: bytes) -> None:
        from optc.compiler.ir.saved.shape_expressions import parse_shape_expression

        parse_shape_expression(data.decode("utf-8", "replace"))


class Recipe(Reader):
    """A recipe of a compile, to the request and the steps of the target."""

    cost = 6.0
    _TREE: ClassVar[dict[str, Any]] = {
        "target": "onnx-cpu",
        "quant": "rtn",
        "bits": 4,
        "group-size": 32,
        "symmetric": True,
        "ignore": ["*.x"],
        "passes": ["fuse-rotary", {"quantize-rtn": {"bits": 4}}],
        "pass-option": ["quantize-rtn.bits=8"],
        "dtype": "fp32",
        "kv-cache": "static",
        "calibration-samples": 4,
        "seed": 0,
        "max-kl": 0.1,
        "work-dir": "w",
        "max-relative-error": 0.5,
    }
    _TAILS: ClassVar[tuple[bytes, ...]] = (
        b"\n? !!python/object/apply:os.system ['touch CANARY']\n",
        b"\nx: &a [*a]\n",
        b"\nseed: !!python/name:os.system\n",
        b"\nignore: " + b"[" * 3000 + b"]" * 3000,
        b"\nseed: 1e999\n",
        b"\nseed: 0x" + b"f" * 5000 + b"\n",
        b"\na: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
        b"d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\nignore: [*d,*d,*d,*d,*d,*d]\n",
        b"\nseed: 2001-01-01\n",
        b"\nbits: 4_0\n",
        b"\n" + b"9" * 5000 + b": 1\n",
    )

    def seed_inputs(self) -> Iterable[Input]:
        import yaml

        return [("recipe.yaml", yaml.safe_dump(self._TREE).encode())]

    def make(self, rng: random.Random) -> Input:
        import yaml

        kept = {key: value for key, value in self._TREE.items() if key == "target" or rng.random() < 0.4}
        try:
            text = yaml.safe_dump(mutated(kept, rng)).encode("utf-8", "surrogatepass")
        except (yaml.YAMLError, RecursionError, ValueError):
            text = text_of(kept, rng)
        chance = rng.random()
        return "recipe.yaml", blind(text, rng) if chance < 0.3 else text + rng.choice(self._TAILS) * (chance < 0.35)

    def read(self, name: str, data: bytes) -> None:
        from optc.cli.request_flags import merge_recipe, request_of, require
        from optc.resolving import recipe_steps, resolve

        merged = merge_recipe({"recipe": self.write(name, data)})
        target = require(merged, "target", "--target onnx-cpu")
        recipe_steps(resolve(request_of(merged, target)), "decoder")


class TrainRecipe(Reader):
    """A recipe of a training run, and settings of its keys."""

    cost = 4.0
    _SETTINGS: ClassVar[tuple[str, ...]] = (
        "optimizer.lr=!!python/object/apply:os.system ['x']",
        "a.b.c=1",
        "optimizer=1",
        "optimizer.lr=" + "[" * 2000,
        "seed=" + "9" * 5000,
        "data.text=/dev/zero",
        "=1",
        "optimizer.lr.x=3",
        "\ud800=1",
    )

    def prepare(self) -> None:
        from optc.training.recipe import RECIPES, load_config

        configs = [msgspec.to_builtins(load_config(name)) for name in ("finetune", "qat")]
        self._trees = [*configs, *({"recipe": name, "max_steps": 3} for name in RECIPES)]

    def seed_inputs(self) -> Iterable[Input]:
        return [("recipe.yaml", text_of(tree)) for tree in self._trees]

    def make(self, rng: random.Random) -> Input:
        tree = rng.choice(self._trees)
        return "recipe.yaml", text_of(mutated(tree, rng)) if rng.random() < 0.7 else blind(text_of(tree), rng)

    def read(self, name: str, data: bytes) -> None:
        from optc.training.recipe import load_config
        from optc.training.setup import check_config
        from optc.training.world import World

        path = self.write(name, data)
        chosen = hashlib.sha256(data).digest()[0] % 40
        setting = self._SETTINGS[chosen : chosen + 1]
        check_config(load_config(str(path), settings=setting), World())


class Calibration(Reader):
    """Text, token ids and conversations for calibration and training, in every form of a file."""

    cost = 2.0
    packages = ("pyarrow",)
    _ROWS: ClassVar[list[Any]] = [
        {"text": "hello world " * 9},
        {"tokens": [1, 2, 3] * 20},
        {"input_ids": [5] * 40, "attention_mask": [1] * 40, "labels": [-100] * 20 + [5] * 20},
        {"prompt": "hello", "completion": "world"},
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]},
    ]
    _CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"

    def prepare(self) -> None:
        import io

        import pyarrow as pa
        import pyarrow.parquet as pq

        def packed(table: Any) -> bytes:
            buffer = io.BytesIO()
            pq.write_table(table, buffer)
            return buffer.getvalue()

        self._tables = [
            packed(pa.table({"text": ["hello world"] * 50})),
            packed(pa.table({"tokens": [[1, 2, 3] * 9] * 50})),
            packed(pa.table({"text": [None, "x", "y"], "tokens": [[1.5], [None], None]})),
        ]

    def seed_inputs(self) -> Iterable[Input]:
        return [("text.jsonl", b"\n".join(map(text_of, self._ROWS)))]

    def make(self, rng: random.Random) -> Input:
        kind = rng.randrange(10)
        if kind < 4:
            return "text.jsonl", b"\n".join(text_of(mutated(rng.choice(self._ROWS), rng), rng) for _ in range(3))
        if kind < 5:
            return "text.json", text_of(mutated([[1, 2, 3] * 20, [4] * 30], rng), rng)
        if kind < 8:
            return "text.jsonl", blind(b'{"text":"abc"}\n{"tokens":[1,2,3]}\n' * 3, rng)
        if kind < 9:
            return "text.parquet", blind(rng.choice(self._tables), rng)
        return "text.txt", blind("héllo wörld".encode() * 20, rng)

    def read(self, name: str, data: bytes) -> None:
        from optc.compiler.calibration.documents import read_documents
        from optc.compiler.calibration.sequences import cut_sequences
        from optc.compiler.diagnostics import InputError
        from optc.runtime.generation.chat_template import ChatTemplate
        from optc.training.examples import read_examples

        path = self.write(name, data)
        with contextlib.suppress(InputError):
            list(read_examples(path, _Letters(), ChatTemplate(self._CHAT, {}, "chat")))  # type: ignore[arg-type]
        documents = read_documents(path, _Letters())
        cut_sequences(documents, samples=4, length=16, vocab_size=128, seed=0, source="x")


class _Letters:
    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return [ord(letter) % 128 for letter in text[:1000]]


STEP: dict[str, Any] = {
    "step": 1,
    "epoch": 0,
    "loss": 0.5,
    "cross_entropy": 0.5,
    "lr": 1e-3,
    "grad_norm": 1.0,
    "tokens": 8,
}
"""A step of a training run as its log has it, less its times."""


class RunFiles(Reader):
    """What a training run keeps beside tensors: log, summary, states of all layouts."""

    def prepare(self) -> None:
        from optc.training.checkpoint import RunState
        from optc.training.data import Position

        state = RunState(step=1, position=Position(), model="m", corpus="c", config={"data": {"text": ["x"]}}, run="r")
        plain = msgspec.to_builtins(state)
        self._trees = {
            "log.jsonl": {**STEP, "seconds": 0.1, "tokens_per_s": 80.0},
            "checkpoint.json": plain,
            "state.json": {"groups": [], "extra": plain},
            "deepspeed.json": {"ranks": 1, "stage": 2, "groups": [{"lr": 0.1}], "extra": plain},
        }

    def seed_inputs(self) -> Iterable[Input]:
        return [(name, text_of(tree)) for name, tree in self._trees.items()]

    def make(self, rng: random.Random) -> Input:
        name = rng.choice(sorted(self._trees))
        tree = self._trees[name]
        return name, text_of(mutated(tree, rng), rng) if rng.random() < 0.4 else blind(text_of(tree), rng)

    def read(self, name: str, data: bytes) -> None:
        from optc.training.metrics import read_log
        from optc.training.saving import read_state

        folder = self.place / Path(name).stem
        path = self.write(f"{folder.name}/{name}", data + b"\n" * (name == "log.jsonl"))
        if name == "log.jsonl":
            read_log(path)
        else:
            read_state(folder)


class CarriedFiles(Reader):
    """What the scripts that travel with artifacts read: manifest.json and engine.json."""

    cost = 2.0
    _ENGINE: ClassVar[dict[str, Any]] = {
        "format": 1,
        "vocab_size": 128,
        "cache": {"layers": 1, "capacity": 64, "update": "in_place", "dtype": "float16", "heads": 1, "head_dim": 8},
        "runtime": "tensorrt_rtx",
        "plan": "model.plan",
        "plan_sha256": "a" * 64,
        "runtime_version": "1.0",
        "compute_capabilities": ["8.0"],
        "eos_token_ids": [2],
        "profiles": [{"batch": [1, 1, 1], "tokens": [1, 8, 16]}],
    }

    def prepare(self) -> None:
        from artifacts import make_manifest

        from optc.runtime.carried import pt2_runner, run_trt

        type(self).refusals = (pt2_runner.PackageError, pt2_runner.ArchiveError, run_trt.RunnerError)
        self._manifest = msgspec.to_builtins(make_manifest(engine="aotinductor", files=()))

    def seed_inputs(self) -> Iterable[Input]:
        return [("manifest.json", text_of(self._manifest)), ("engine.json", text_of(self._ENGINE))]

    def make(self, rng: random.Random) -> Input:
        name, tree = rng.choice([("manifest.json", self._manifest), ("engine.json", self._ENGINE)])
        return name, text_of(mutated(tree, rng), rng) if rng.random() < 0.4 else blind(text_of(tree), rng)

    def read(self, name: str, data: bytes) -> None:
        from optc.runtime.carried import check_device, pt2_runner, run_trt

        self.write("manifest.json", text_of(self._manifest))
        self.write("engine.json", text_of(self._ENGINE))
        self.write(name, data)
        if name == "engine.json":
            run_trt.read_description(str(self.place))
            return
        with contextlib.suppress(ValueError):  # its answer to what it cannot read
            check_device.text_of(check_device.report(str(self.place)))
        pt2_runner.open_folder(self.place)


class GenaiConfig(JsonReader):
    """genai_config.json, which onnxruntime-genai would follow."""

    name = "genai_config.json"
    packages = ("onnx", "onnx_ir")

    def prepare(self) -> None:
        from optc.compiler.ir.contract import AttentionFacts, Contract, Input, Output
        from optc.exporters.onnx.genai import genai_config

        facts = AttentionFacts(num_heads=4, num_kv_heads=2, head_dim=8, value_dim=8, scale=0.5, causal=True)
        contract = Contract(
            kind="decoder",
            inputs=(Input(name="input_ids", role="input_ids", dtype="int64", dims=("batch", "seq")),),
            outputs=(Output(name="logits", role="logits"),),
            layers=(facts,),
        )
        self.trees = [msgspec.to_builtins(genai_config(contract, "model.onnx"))]
        super().prepare()

    def read(self, name: str, data: bytes) -> None:
        from optc.compiler.artifact.genai_config import check_genai_config

        self.write(name, data)
        check_genai_config(self.place, "model.onnx")


CHEAP = (
    Header,
    ManifestFile,
    ConfigFile,
    ShapeText,
    Recipe,
    TrainRecipe,
    Calibration,
    RunFiles,
    CarriedFiles,
    GenaiConfig,
)


def by_name(classes: Iterable[type[Reader]]) -> dict[str, type[Reader]]:
    """Readers by the name of their class."""
    return {cls.__name__: cls for cls in classes}


__all__ = ["CHEAP", "Input", "Reader", "by_name", "mutated_safetensors", "places", "sealed", "split_safetensors"]
