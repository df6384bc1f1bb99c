"""Readers that cost more: whole folders through transformers, tokenizers, torch and ONNX Runtime, and commands."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import random
import shutil
import traceback
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import click
from fuzz.child import kind_of
from fuzz.mutations import blind, mutated, places, text_of
from fuzz.readers import ForkError, Input, Reader, build_safetensors, mutated_safetensors, sealed
from fuzz.seeds import Seeds, split_safetensors


def mutated_file(name: str, data: bytes, rng: random.Random) -> bytes:
    """Another content of a file, by what its name says that it holds."""
    if name.endswith(".safetensors"):
        return mutated_safetensors(*split_safetensors(data), rng)
    if name.endswith(".json") and rng.random() < 0.8:
        return text_of(mutated(json.loads(data), rng), rng)
    return blind(data, rng)


class FolderReader(Reader):
    """A reader of a folder, one file of which is replaced."""

    def copy_of(self, source: Path, name: str = ".") -> None:
        """Put sound files into place, and remember them."""
        place = self.place / name
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(source, place)
        self.sound = {
            str(path.relative_to(self.place)): path.read_bytes() for path in self.place.rglob("*") if path.is_file()
        }

    def replace(self, name: str, data: bytes) -> None:
        """The folder with this file, and else sound."""
        previous = getattr(self, "_replaced", None)
        if previous is not None:
            self.write(previous, self.sound[previous])
        self._replaced = name
        self.write(name, data)


class Folder(FolderReader):
    """A model folder: config, index and weights against each other, to the module tree of transformers."""

    cost = 300.0

    def prepare(self) -> None:
        from families import FAMILIES

        self.copy_of(self.seeds.model())
        self._configs = [json.loads(self.sound["config.json"])]
        for cls, config, sizes in FAMILIES.values():
            tree = json.loads(config(**sizes).to_json_string(use_diff=False))
            self._configs.append({**tree, "architectures": [cls.__name__]})
        self._header, self._data = split_safetensors(self.sound["model.safetensors"])

    def make(self, rng: random.Random) -> Input:
        if rng.random() < 0.2:
            return "model.safetensors", mutated_safetensors(self._header, self._data, rng)
        tree = self._configs[0] if rng.random() < 0.5 else rng.choice(self._configs)
        return "config.json", text_of(mutated(tree, rng), rng)

    def read(self, name: str, data: bytes) -> None:
        from optc.compiler.capture.loading import meta_model
        from optc.compiler.model_folder.checkpoint import check_folder

        self.replace(name, data)
        meta_model(check_folder(self.place))


class TokenizerFile(FolderReader):
    """tokenizer.json and the files that name the ends of a text."""

    cost = 12.0

    def prepare(self) -> None:
        self.copy_of(self.seeds.model())
        self._tree = json.loads(self.sound["tokenizer.json"])
        kept = [path for path in places(self._tree) if not (len(path) > 2 and path[-2] in ("vocab", "merges"))]
        self._places = kept + [path for path in places(self._tree) if path not in kept][:3]

    def make(self, rng: random.Random) -> Input:
        if rng.random() < 0.1:
            return "generation_config.json", text_of(mutated({"eos_token_id": [1, 2], "bos_token_id": 1}, rng), rng)
        if rng.random() < 0.2:
            return "tokenizer.json", blind(self.sound["tokenizer.json"], rng, end=3000)
        return "tokenizer.json", text_of(mutated(self._tree, rng, self._places), rng)

    def read(self, name: str, data: bytes) -> None:
        from optc.runtime.generation.tokenizer import TextStream, eos_token_ids, load_tokenizer

        self.replace(name, data)
        eos_token_ids(self.place, ())
        tokenizer = load_tokenizer(self.place)
        if tokenizer is None:
            return
        ids = tokenizer.encode("Hello \u00e9 \U0001f600 world" * 3)
        tokenizer.decode([*ids, 0, 1, 2, 3, 127])
        stream = TextStream(tokenizer)
        for token in ids[:20]:
            stream.push(token)
        stream.finish()


class Quantized(FolderReader):
    """Folders in the layouts of quantized checkpoints."""

    cost = 100.0
    _SIZES: ClassVar[dict[str, int]] = {
        "F32": 4,
        "I32": 4,
        "F16": 2,
        "BF16": 2,
        "I8": 1,
        "U8": 1,
        "I64": 8,
        "F8_E4M3": 1,
    }
    _RTN = ("--quant", "rtn", "--group-size", "32")
    _LAYOUTS: ClassVar[dict[str, tuple[str, ...]]] = {
        "compressed-tensors": ("--target", "vllm", "--layout", "compressed-tensors", *_RTN),
        "awq": ("--target", "vllm", "--layout", "awq", *_RTN),
        "gptq": ("--target", "vllm", "--layout", "gptq", *_RTN),
        "modelopt": ("--target", "trtllm", "--quant", "fp8"),
        "fp8-blocks": ("--target", "vllm", "--quant", "fp8-block", "--layout", "fp8"),
        "nvfp4": ("--target", "vllm", "--quant", "nvfp4"),
        "mxfp4": ("--target", "vllm", "--quant", "mxfp4"),
        "experts-of-four": ("--target", "vllm", "--layout", "compressed-tensors", *_RTN),
        "bitsandbytes": (),
    }
    """Layout -> arguments of the compile; without any, optc reads it and does not write it."""
    _MODELS: ClassVar[dict[str, Callable[[Seeds], Path]]] = {
        "fp8-blocks": Seeds.wide_model,
        "experts-of-four": Seeds.experts,
        "bitsandbytes": Seeds.bitsandbytes,
    }

    def prepare(self) -> None:
        for name, arguments in self._LAYOUTS.items():
            made = self._MODELS.get(name, Seeds.model)
            self.copy_of(self.seeds.compiled(name, *arguments, model=made) if arguments else made(self.seeds), name)

    def make(self, rng: random.Random) -> Input:
        layout = rng.choice(sorted(self._LAYOUTS))
        config, weights = f"{layout}/config.json", f"{layout}/model.safetensors"
        own = f"{layout}/hf_quant_config.json"
        if rng.random() < 0.5:
            name = own if own in self.sound and rng.random() < 0.7 else config
            tree = json.loads(self.sound[name])
            inside = [path for path in places(tree) if path[0] in ("quantization_config", "quantization")]
            return name, text_of(mutated(tree, rng, inside or None), rng)
        header, data = split_safetensors(self.sound[weights])
        if rng.random() < 0.2:
            noise = bytearray(data)
            place = rng.randrange(len(noise))
            noise[place : place + 256] = rng.randbytes(min(256, len(noise) - place))
            return weights, build_safetensors(header, bytes(noise))
        return weights, build_safetensors(self._other_tensors(header, rng), data)

    def _other_tensors(self, header: dict[str, Any], rng: random.Random) -> dict[str, Any]:
        """A sound header whose tensors have other names, types or shapes."""
        tree = copy.deepcopy(header)
        name = rng.choice([key for key in tree if key != "__metadata__"])
        entry, kind = tree[name], rng.randrange(5)
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        if kind == 0:
            fits = [dtype for dtype, width in self._SIZES.items() if size % width == 0]
            entry["dtype"] = rng.choice(fits)
            entry["shape"] = [size // self._SIZES[entry["dtype"]]]
        elif kind == 1:
            entry["shape"] = entry["shape"][::-1]
        elif kind == 2:
            count = size // self._SIZES.get(entry["dtype"], 1)
            entry["shape"] = rng.choice([[count], [1, count], [count, 1], [1] * 20 + [count]])
        elif kind == 3:
            module = name.rpartition(".")[0]
            names = [name + "x", name.replace("weight", "qweight"), f"{module}.g_idx", f"{module}.qweight", ".qweight"]
            tree[rng.choice(names)] = tree.pop(name)
        else:
            tree.pop(name)
        return tree

    def read(self, name: str, data: bytes) -> None:
        import torch

        from optc.compiler.model_folder.checkpoint import check_folder, check_values
        from optc.compiler.model_folder.quantized import quantized_folder

        self.replace(name, data)
        info = check_folder(self.place / name.partition("/")[0])
        check_values(info)
        folder = quantized_folder(info)
        if folder is not None:
            for tensor in folder.state(torch.float32).values():
                tensor.reshape(-1)[:4].clone()
            folder.stored_bytes()


class Stage(FolderReader):
    """A stage of a work folder that somebody else may write."""

    cost = 150.0

    def prepare(self) -> None:
        stages = self.seeds.stages()
        for number, path in enumerate((stages[0], stages[len(stages) // 2], stages[-1])):
            self.copy_of(path, str(number))

    def make(self, rng: random.Random) -> Input:
        name = rng.choice(sorted(self.sound))
        return name, mutated_file(name, self.sound[name], rng)

    def read(self, name: str, data: bytes) -> None:
        from optc.compiler.diagnostics import OptcError
        from optc.compiler.ir.program import Program
        from optc.compiler.pipeline.stages import load_stage

        self.replace(name, data)
        folder = self.place / name.partition("/")[0]
        with contextlib.suppress(OptcError):  # it refuses what was changed since it was written
            load_stage(folder)
        Program.load(folder)  # what reads artifacts of others


class Onnx(FolderReader):
    """model.onnx: the check, and then the engine."""

    cost = 60.0
    packages = ("onnx", "onnxruntime")

    def prepare(self) -> None:
        import onnx

        self.copy_of(self.seeds.compiled("onnx", "--target", "onnx-cpu"), "a")
        self._model = onnx.load_model_from_string(self.sound["a/model.onnx"])

    def make(self, rng: random.Random) -> Input:
        if rng.random() < 0.4:
            return "a/model.onnx", blind(self.sound["a/model.onnx"], rng)
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        for _ in range(rng.choice((1, 1, 2, 3))):
            try:
                _mutate_graph(model, rng)
            except (IndexError, ValueError, TypeError):
                continue
        return "a/model.onnx", model.SerializeToString()

    def read(self, name: str, data: bytes) -> None:
        from optc.compiler.artifact.onnx_check import check_onnx
        from optc.runtime.sessions.ort import open_engine

        self.replace(name, data)
        check_onnx(self.place / "a", "model.onnx")
        open_engine(self.place / "a" / "model.onnx", 1)


def _mutate_graph(model: Any, rng: random.Random) -> None:
    """One change of a message that stays a message."""
    graph, kind = model.graph, rng.randrange(12)
    node, tensor = rng.choice(graph.node), rng.choice(graph.initializer)
    names = ["", "x", *(item.name for item in graph.initializer), *(item.name for item in graph.input)]
    if kind == 0:
        for entry in tensor.external_data:
            entry.value = rng.choice(["../x", "/etc/passwd", "-1", "0", "9" * 12, "manifest.json", "4096", str(2**63)])
    elif kind == 1:
        tensor.dims[:] = [rng.choice([0, -1, 1, 2**31, 2**47, 2**60, 64, 128]) for _ in range(rng.randrange(5))]
    elif kind == 2:
        tensor.data_type = rng.randrange(-1, 30)
    elif kind == 3:
        node.op_type = rng.choice(
            ["If", "Loop", "Identity", "Reshape", "Expand", "Range", "MatMulNBits", "GroupQueryAttention", "PythonOp"]
        )
    elif kind == 4:
        node.domain = rng.choice(["", "com.microsoft", "ai.onnx", "ai.onnx.contrib", "x"])
    elif kind == 5:
        attribute = rng.choice(node.attribute)
        attribute.i = rng.choice([0, -1, 1, 2, 3, 7, 32, 2**31, 2**62, -(2**63)])
        attribute.type = rng.choice([attribute.type, 2])
    elif kind == 6:
        node.input.append(rng.choice(names))
    elif kind == 7:
        node.input[rng.randrange(len(node.input))] = rng.choice(names)
    elif kind == 8:
        del graph.node[rng.randrange(len(graph.node))]
    elif kind == 9:
        rng.choice(graph.input).name = rng.choice(["", "x"])
    elif kind == 10:
        spec = rng.choice([*graph.input, *graph.output, *graph.value_info])
        rng.choice(spec.type.tensor_type.shape.dim).dim_value = rng.choice([0, -1, 1, 2**40, 2**62, 3])
    else:
        rng.choice(graph.input).type.tensor_type.elem_type = rng.randrange(20)


class Groups(Reader):
    """Groups that a killed quantization kept."""

    cost = 6.0

    def prepare(self) -> None:
        import typing

        import msgspec
        import torch

        from optc.compiler.rewriting.quantization_record import LinearRecord
        from optc.passes.quantization.arithmetic.grid import Grid
        from optc.passes.quantization.arithmetic.store import Entry, GroupStore

        plain = {str: "x", int: 4, float: 0.1, bool: True}
        fields = {item.name: plain.get(item.type) for item in msgspec.structs.fields(LinearRecord)}
        record = LinearRecord(**typing.cast(Any, fields))
        entry = Entry(bits=4, group_size=32, symmetric=True, damping=None, note="", record=record)
        for old in self.place.glob("*.safetensors"):
            old.unlink()
        self._store = GroupStore(self.place)
        self._store.save(0, [(entry, torch.ones(8, 64), Grid(torch.ones(8, 2), torch.ones(8, 2), 4, 32, True))])
        (self._path,) = self.place.glob("*.safetensors")
        self._header, self._data = split_safetensors(self._path.read_bytes())

    def make(self, rng: random.Random) -> Input:
        header = copy.deepcopy(self._header)
        if rng.random() < 0.5:
            for key, text in header["__metadata__"].items():
                try:
                    header["__metadata__"][key] = text_of(mutated(json.loads(text), rng)).decode("latin1")
                except ValueError:
                    header["__metadata__"][key] = rng.choice(["", "x", "[]", "null"])
            return self._path.name, build_safetensors(header, self._data)
        return self._path.name, mutated_safetensors(header, self._data, rng)

    def read(self, name: str, data: bytes) -> None:
        self.write(name, data)
        self._store.load(0)


def stepped() -> tuple[Any, Any]:
    """A small model and its optimizer behind one step of training."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


class Checkpoint(FolderReader):
    """A training checkpoint of one process."""

    cost = 30.0

    def prepare(self) -> None:
        from optc.training import checkpoint
        from optc.training.data import Position

        self._model, optimizer = stepped()
        run = self.place / "run"
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        config = {"a": 1, "data": {"text": ["x"]}}
        state = checkpoint.RunState(step=1, position=Position(), model="m", corpus="c", config=config, run="r")
        self._folder = checkpoint.save(run, state, self._model, optimizer)
        self._now = state
        self.copy_of(self._folder, "step-00000001")

    def make(self, rng: random.Random) -> Input:
        name = rng.choice(sorted(name for name in self.sound if name.startswith("step-")))
        return name, mutated_file(name, self.sound[name], rng)

    def read(self, name: str, data: bytes) -> None:
        import torch

        from optc.training import checkpoint

        self.replace(name, data)
        folder = self.place / "step-00000001"
        optimizer = torch.optim.AdamW(self._model.parameters())
        state = checkpoint.read_state(folder)
        checkpoint.check_same_run(folder, state, self._now)
        checkpoint.restore(folder, state, self._model, optimizer)


class Command(FolderReader):
    """An artifact whose manifest was changed and sealed again, through the commands that read it."""

    cost = 400.0
    packages = ("onnx", "onnxruntime")
    refusals = (click.ClickException, click.exceptions.Exit, SystemExit)
    target: ClassVar[tuple[str, ...]] = ("--target", "onnx-cpu")
    model: ClassVar[Callable[[Seeds], Path]] = Seeds.model
    prompt: ClassVar[tuple[str, ...]] = ("--prompt-tokens", "5,17", "--max-new-tokens", "3")
    commands: ClassVar[tuple[str, ...]] = ("inspect", "verify", "check", "run", "bundle", "diff", "ir", "eval", "bench")
    _FIELDS = (
        "programs",
        "needs",
        "quantization",
        "engine",
        "target",
        "dtype",
        "source",
        "quality",
        "speed",
        "seconds",
    )

    def prepare(self) -> None:
        name = "-".join((*self.target, self.model.__name__)).strip("-")
        self.copy_of(self.seeds.compiled(name, *self.target, model=type(self).model), "a")
        self._tree = json.loads(self.sound["a/manifest.json"])
        self._tree.pop("self_sha256")
        self._places = [path for path in places(self._tree) if path[0] in self._FIELDS]
        self._text = self.seeds.text()

    def make(self, rng: random.Random) -> Input:
        try:
            return "a/manifest.json", sealed(text_of(mutated(self._tree, rng, self._places)))
        except (ValueError, RecursionError):
            return "a/manifest.json", b"{}"

    def command_of(self, data: bytes) -> str:
        """Which command reads an input."""
        return self.commands[hashlib.sha256(data).digest()[0] % len(self.commands)]

    def read(self, name: str, data: bytes) -> None:
        from optc.cli.main import cli

        self.replace(name, data)
        shutil.rmtree(self.place / "b", ignore_errors=True)
        artifact = str(self.place / "a")
        lines: dict[str, list[str]] = {
            "run": ["run", artifact, *self.prompt],
            "bundle": ["bundle", artifact, "-o", str(self.place / "b")],
            "diff": ["diff", artifact, "00", "01"],
            "ir": ["inspect", artifact, "--ir"],
            "eval": ["eval", artifact, "--text", str(self._text)],
            "bench": ["bench", artifact, "--prompt-tokens", "4", "--max-new-tokens", "2"],
        }
        command = self.command_of(data)
        with _fork_ends(self.place / "fork-fault.json"):
            cli.main(args=lines.get(command, [command, artifact]), prog_name="optc", standalone_mode=False)


@contextlib.contextmanager
def _fork_ends(told: Path) -> Iterator[None]:
    """Where a command goes on in a fork (`own_process.py`), that fork ends here with the command's exit code.

    Args:
        told: a file by which the fork says what its unknown error was.

    Raises:
        ForkError: the fork ended with one.
    """
    from optc.cli.common import fail, of_the_system
    from optc.compiler.diagnostics import OptcError

    owner, code = os.getpid(), 0
    told.unlink(missing_ok=True)
    try:
        yield
    except BaseException as error:
        if os.getpid() == owner:
            if told.exists():
                raise ForkError(*json.loads(told.read_text())) from error
            raise
        if isinstance(error, (click.ClickException, click.exceptions.Exit, SystemExit)):
            found = getattr(error, "exit_code", getattr(error, "code", 2))
            code = found if isinstance(found, int) else 2
        elif (known := error if isinstance(error, OptcError) else of_the_system(error)) is not None:
            code = fail(known, as_json=False)
        else:
            traceback.print_exc()
            told.write_text(json.dumps([kind_of(error), str(error)[:200]]))
            code = 1
    if os.getpid() != owner:
        os._exit(code)


class CommandFolder(Command):
    """The same for a model folder with a manifest."""

    packages = ()
    target = ("--target", "vllm")
    commands = ("inspect", "verify", "check", "run", "bundle")


class CommandPair(Command):
    """The same for an encoder and the decoder that reads it."""

    model = Seeds.encoder_decoder
    commands = ("inspect", "verify", "check", "run", "run", "bundle", "eval")


class CommandEmbedding(Command):
    """The same for a model that gives embeddings."""

    model = Seeds.sentences
    prompt = ("--embed", "--prompt", "ab")
    commands = ("inspect", "verify", "check", "run", "run", "bundle", "bench")


class CommandExecutorch(Command):
    """The same for an ExecuTorch program."""

    packages = ("executorch",)
    target = ("--target", "executorch")
    commands = ("inspect", "check", "bundle")


class Exported(FolderReader):
    """A .pt2 of torch.export.save: its graph, its tables of tensors, its members."""

    cost = 20.0

    def prepare(self) -> None:
        import torch

        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU(), torch.nn.BatchNorm1d(4)).eval()
        sizes = ({0: torch.export.Dim("rows", min=2, max=64)},)
        exported = torch.export.export(net, (torch.randn(3, 4),), dynamic_shapes=sizes)
        torch.export.save(exported, self.place / "net.pt2")
        self._whole = (self.place / "net.pt2").read_bytes()
        with zipfile.ZipFile(self.place / "net.pt2") as archive:
            self._members = {name: archive.read(name) for name in archive.namelist()}

    def make(self, rng: random.Random) -> Input:
        if rng.random() < 0.2:
            return "net.pt2", blind(self._whole, rng)
        members = dict(self._members)
        name = rng.choice([key for key in members if key.endswith(".json")] if rng.random() < 0.9 else sorted(members))
        members[name] = (
            text_of(mutated(json.loads(members[name]), rng), rng)
            if name.endswith(".json")
            else blind(members[name], rng)
        )
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for key, data in members.items():
                archive.writestr(key, data)
        return "net.pt2", packed.getvalue()

    def read(self, name: str, data: bytes) -> None:
        from optc.compiler.capture.exported import capture_exported
        from optc.compiler.ir.saved.exported_archive import read_exported

        capture_exported(read_exported(self.write(name, data)))


WHOLE: tuple[type[Reader], ...] = (
    Exported,
    Folder,
    TokenizerFile,
    Quantized,
    Stage,
    Onnx,
    Groups,
    Checkpoint,
    Command,
    CommandFolder,
    CommandPair,
    CommandEmbedding,
    CommandExecutorch,
)


def seed_files(reader: FolderReader) -> Iterable[Input]:
    """The sound files of a folder reader."""
    return reader.sound.items()
