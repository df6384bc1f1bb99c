"""Run an AOTInductor artifact: `model.pt2` (native code) with its weights beside it in safetensors.

This file needs torch and safetensors only (and tokenizers, for text). It travels inside artifacts as
`generate.py`, so it imports nothing else:

    python generate.py --prompt "The old man" --max-new-tokens 64
    python generate.py --prompt-tokens 5,17,33 --json

In the artifact of an encoder or a plain module it is `run.py`, which takes tensors (and NumPy):

    python run.py --inputs inputs.npz --outputs outputs.npz
    python -c "from run import open_folder; print(open_folder(Path('.'))(image))"

Loading a package runs its native code: only load what you trust. `open_folder` checks every file
against the manifest first, which finds damage, not malice.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # its own folder comes first: a file of an artifact would be taken for a module of Python's
    _HERE = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [item for item in sys.path if os.path.realpath(item) != _HERE]

import argparse
import hashlib
import io
import json
import math
import platform
import stat
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_ROLES_OF_CACHES = ("key_cache", "value_cache", "row_state")
_DTYPES = {
    str(item).removeprefix("torch."): item
    for item in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}

MOST_MEMBERS, MOST_DIRECTORY = 10_000, 4 << 20
"""Files in a package; a model of hundreds of layers has some tens."""
MOST_MANIFEST = 32 << 20
"""Bytes of manifest.json."""
MOST_UNPACKED = 1 << 30
"""Bytes that the arrays of an .npz may have beyond those of the file: 10 MB of it can stand for 10 GB of zeros."""
MOST_GROWTH = 8
"""Times its size that a package may have when it is unpacked; torch does not compress what it writes."""


class PackageError(RuntimeError):
    """An artifact that cannot be loaded, or inputs that its native code would not survive."""


class ArchiveError(PackageError):
    """A package that must not be unpacked."""


_libraries: set[str] = set()


def _load_operators(path: Path) -> None:
    """Load a library of operators, unless this process has one like it: each would replace the kernels of the last."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest not in _libraries:
        torch.ops.load_library(str(path))
        _libraries.add(digest)


class Package:
    """A loaded package: called with its inputs, flat and in order, it returns its outputs.

    The native code checks neither that its weights are there nor what it is given, and a mistake is a
    crash. So the runner behind this class is private, every call checks its inputs, and a call before
    `load_weights` is refused.

    Args:
        folder: the artifact; its files are already verified.
        info: the `engine_info` of the manifest's model. needs: the manifest's `needs`.
        weights: False leaves `load_weights` to the caller.

    Raises:
        PackageError: the host lacks something, or the files do not fit `info`.
    """

    def __init__(
        self, folder: Path, info: Mapping[str, Any], needs: Mapping[str, Any], *, weights: bool = True
    ) -> None:
        check_host(needs)
        self.info = info
        self._weights: dict[str, Tensor] = {}
        self._specs = [_Spec(item) for item in info["inputs"]]
        if info["library"]:
            _load_operators(_file(folder, info["library"]))
        path = _file(folder, info["model"])
        check_archive(path)
        try:
            # torch._inductor.aoti_load_package makes this object, after importing the whole compiler.
            self._runner = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
        except RuntimeError as error:
            raise PackageError(f"{path}: the package cannot be loaded: {_first_line(error)}") from error
        found, listed = set(self._runner.get_constant_fqns()), set(info["constants"])
        if found != listed:
            raise PackageError(
                f"{path}: the package expects other weights than those listed: {sorted(found ^ listed)[:4]}"
            )
        if weights:
            self.load_weights(_file(folder, info["weights"]))

    def load_weights(self, path: Path) -> None:
        """Map the weights into memory and hand them to the package, which uses them where they are.

        Raises:
            PackageError: a weight is missing, or of another shape or type than the package was compiled for.
        """
        expected: Mapping[str, Any] = self.info["constants"]
        try:
            with safe_open(str(path), framework="pt") as file:
                names = set(file.keys())
                if names != set(expected):
                    raise PackageError(f"{path}: not this package's weights: {sorted(names ^ set(expected))[:4]}")
                weights = {name: file.get_tensor(name) for name in sorted(names)}
        except (SafetensorError, OSError, ValueError) as error:
            raise PackageError(f"{path}: the weights cannot be read: {_first_line(error)}") from error
        for name, tensor in weights.items():
            kind, shape = str(tensor.dtype).removeprefix("torch."), list(tensor.shape)
            if kind != expected[name]["dtype"] or shape != list(expected[name]["shape"]):
                wanted = f"{expected[name]['dtype']} {list(expected[name]['shape'])}"
                raise PackageError(f"{path}: weight {name} is {kind} {shape}, the package needs {wanted}")
        self._runner.load_constants(weights, False, True, True)  # active set, all of them, not copied
        self._weights = weights  # the package points into them

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Run the package; caches among the inputs are written in place.

        Raises:
            PackageError: no weights, or an input of the wrong type, shape, layout or range.
        """
        if not self._weights and self.info["constants"]:
            raise PackageError("the package has no weights yet: call load_weights first")
        if len(inputs) != len(self._specs):
            raise PackageError(f"{len(inputs)} inputs given, the package takes {len(self._specs)}")
        sizes: dict[str, int] = {}
        for spec, tensor in zip(self._specs, inputs, strict=True):
            spec.check(tensor, sizes)
        self._check_relations(inputs, sizes)
        outputs: list[Tensor] = self._runner.run(list(inputs))
        return outputs

    def _check_relations(self, inputs: Sequence[Tensor], sizes: dict[str, int]) -> None:
        """What the code trusts beyond shapes: it would read or write outside its tensors."""
        table = {spec.role: tensor for spec, tensor in zip(self._specs, inputs, strict=True)}
        if (ids := table.get("input_ids")) is not None:
            vocabulary = self.info["vocab_size"] or 1 << 62
            if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
                raise PackageError(f"token ids must be from 0 to {vocabulary - 1}")
        if (positions := table.get("position_ids")) is not None and self.info["context_length"]:
            limit = self.info["context_length"]
            if positions.numel() and (int(positions.min()) < 0 or int(positions.max()) >= limit):
                raise PackageError(f"positions must be from 0 to {limit - 1}")
        limit = self.info["context_length"] or 1 << 62
        if "past" in sizes and sizes["past"] + sizes["seq"] > limit:
            raise PackageError(f"{sizes['past'] + sizes['seq']} tokens do not fit the context of {limit}")
        if self.info["kind"] == "encoder" and sizes.get("source", 0) > limit:
            raise PackageError(f"{sizes['source']} tokens do not fit the encoder's context of {limit}")
        if "capacity" in sizes:
            mask = table["attention_mask"]
            limit = min(sizes["capacity"], self.info["context_length"] or sizes["capacity"])
            ordered = 1 <= sizes["seq"] <= sizes["total"] <= limit
            if not ordered or int(mask.min()) < 0 or int(mask.max()) > 1:
                raise PackageError(
                    f"{sizes['seq']} new tokens of {sizes['total']} do not fit caches of {limit}, "
                    "or the mask is not 0 and 1"
                )

    def caches(self, **sizes: int) -> list[Tensor]:
        """Caches of zeros for the dynamic sizes: batch and capacity, or num_blocks."""
        return [
            torch.zeros([size if isinstance(size, int) else sizes[size] for size in spec.dims], dtype=spec.dtype)
            for spec in self._specs
            if spec.role in _ROLES_OF_CACHES
        ]


class _Spec:
    """What one input must be."""

    def __init__(self, item: Mapping[str, Any]) -> None:
        self.name, self.role, self.dims = str(item["name"]), str(item["role"]), list(item["dims"])
        self.dtype = _DTYPES[item["dtype"]]

    def check(self, tensor: Tensor, sizes: dict[str, int]) -> None:
        shape = tensor.shape
        good = tensor.dtype == self.dtype and len(shape) == len(self.dims) and tensor.device.type == "cpu"
        for wanted, size in zip(self.dims, shape, strict=False):
            if isinstance(wanted, str):
                base = wanted.removesuffix("_plus_1")
                wanted = sizes.setdefault(base, size - (base != wanted)) + (base != wanted)
            good = good and wanted == size
        if not good or not tensor.is_contiguous():
            layout = "" if tensor.is_contiguous() else ", not contiguous"
            raise PackageError(
                f"input {self.name} is {tensor.dtype} {list(shape)}{layout}; the package takes a contiguous "
                f"{self.dtype} {self.dims} on the CPU" + (f" with {sizes}" if sizes else "")
            )


class Decoder:
    """Greedy building blocks over a decoder package: rows of a batch with their KV caches.

    Args:
        capacity: most tokens per row, prompt included.
    """

    def __init__(self, package: Package, batch: int, capacity: int) -> None:
        kind, self._size = package.info["kv_cache"], package.info["block_size"]
        if kind not in ("linear", "paged"):
            raise PackageError("the package is not a decoder with a KV cache")
        self._package, self._paged, self.capacity = package, kind == "paged", capacity
        self.lengths = [0] * batch
        if self._paged:
            blocks = -(-capacity // self._size)
            self._tables = torch.arange(batch * blocks, dtype=torch.int32).view(batch, blocks)
            self._caches = package.caches(num_blocks=batch * blocks)
        else:
            self._caches = package.caches(batch=batch, capacity=capacity)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Start over with prompts of any lengths; logits [B, V] after the last token of each.

        Raises:
            PackageError: an empty prompt, one longer than the capacity, or another batch.
        """
        self.lengths = [0] * len(self.lengths)
        return self._advance(prompts)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to every row; logits [B, V]."""
        return self._advance([[token] for token in tokens])

    def _advance(self, rows: Sequence[Sequence[int]]) -> Tensor:
        if len(rows) != len(self.lengths) or not all(len(row) for row in rows):
            raise PackageError(f"one row of at least one token is needed for each of {len(self.lengths)}")
        totals = [held + len(row) for held, row in zip(self.lengths, rows, strict=True)]
        if max(totals) > self.capacity:
            raise PackageError(f"{max(totals)} tokens do not fit the capacity of {self.capacity}")
        with torch.inference_mode():
            logits = (self._run_paged if self._paged else self._run_linear)(rows, totals)
        self.lengths = totals
        return logits

    def _run_linear(self, rows: Sequence[Sequence[int]], totals: list[int]) -> Tensor:
        """Rows padded on the right; only the row sums of the mask count."""
        ids = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
        mask = (torch.arange(max(totals)) < torch.tensor(totals)[:, None]).long()
        logits = self._package(ids, mask, *self._caches)[0]
        return logits[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]

    def _run_paged(self, rows: Sequence[Sequence[int]], totals: list[int]) -> Tensor:
        """Rows laid end to end; row r owns the blocks from r * blocks on."""
        positions = [
            position for held, total in zip(self.lengths, totals, strict=True) for position in range(held, total)
        ]
        row_of = [index for index, row in enumerate(rows) for _ in row]
        position = torch.tensor(positions)
        block = self._tables[torch.tensor(row_of), position // self._size].long()
        starts = torch.tensor([0, *map(len, rows)]).cumsum(0).int()
        takes_trees = any(item["role"] == "tree" for item in self._package.info["inputs"])
        no_tree = [torch.full_like(position, -1)] if takes_trees else []  # each token sees all before it
        logits = self._package(
            torch.tensor([token for row in rows for token in row]),
            position,
            block * self._size + position % self._size,
            self._tables,
            torch.tensor(totals, dtype=torch.int32),
            starts,
            *no_tree,
            *self._caches,
        )[0]
        return logits[starts[1:].long() - 1]


def generate(
    package: Package, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Sequence[int] = ()
) -> list[list[int]]:
    """Greedy continuations; a row ends with its first stop token, which is included."""
    longest = max(map(len, prompts)) + max_new_tokens
    limit = package.info["context_length"] or longest
    decoder = Decoder(package, len(prompts), min(longest, limit))
    tokens: list[list[int]] = [[] for _ in prompts]
    logits = decoder.prefill(prompts)
    while True:
        chosen = logits.argmax(-1).tolist()
        for row, token in zip(tokens, chosen, strict=True):
            if not row or row[-1] not in stop_ids:
                row.append(token)
        done = all(row[-1] in stop_ids or len(row) == max_new_tokens for row in tokens)
        if done or max(decoder.lengths) == decoder.capacity:
            return tokens
        logits = decoder.step(chosen)


class _BoundedFile(io.FileIO):
    """A file whose list of members is read only where it is short: as objects it takes ten times the memory."""

    is_bounded = True

    def read(self, size: int | None = -1) -> bytes:
        if self.is_bounded and size is not None and size > MOST_DIRECTORY:
            raise zipfile.BadZipFile(f"its list of members has {size} bytes, more than {MOST_DIRECTORY}")
        return super().read(size) or b""


def check_archive(path: Path) -> None:
    """Refuse an archive that would be unpacked elsewhere than into its own folder, or to much more than it is.

    torch's loader writes every member to the name that it has.

    Raises:
        ArchiveError: names the member.
    """
    try:
        with _BoundedFile(str(path)) as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ArchiveError(f"{path}: the package is no archive: {_first_line(error)}") from error
    names = [member.filename for member in members]
    for member in members:
        parts = member.filename.replace("\\", "/").split("/")
        is_link = stat.S_ISLNK(member.external_attr >> 16)
        if is_link or ".." in parts or parts[0] == "" or ":" in parts[0] or "\0" in member.orig_filename:
            raise ArchiveError(f"{path}: the member {member.filename[:80]!r} of the package leads out of its folder")
    if len(set(names)) < len(names) or len(names) > MOST_MEMBERS:
        raise ArchiveError(f"{path}: the package has {len(names)} members, some of them twice or too many")
    unpacked, size = sum(member.file_size for member in members), path.stat().st_size
    if unpacked > MOST_GROWTH * size + (16 << 20):
        raise ArchiveError(f"{path}: {size} bytes would be unpacked to {unpacked}")


def check_host(needs: Mapping[str, Any]) -> None:
    """Refuse a host on which the native code would crash or mean something else.

    Raises:
        PackageError: names what is missing.
    """
    version = ".".join(torch.__version__.split(".")[:2])
    flags = needs.get("cpu_flags") if isinstance(needs, Mapping) else None
    if not isinstance(flags, list) or not all(isinstance(flag, str) for flag in flags):
        raise PackageError("the manifest does not say which instruction sets the package needs")
    if needs.get("torch") != version:
        raise PackageError(f"the package was compiled for torch {needs.get('torch')}, this is {torch.__version__}")
    if needs.get("machine", platform.machine()) != platform.machine():
        raise PackageError(f"the package was compiled for {needs['machine']}, this is {platform.machine()}")
    missing = sorted(set(flags) - _cpu_flags())
    if missing and sys.platform == "linux":
        raise PackageError(f"the processor lacks {', '.join(missing)}; compile on a machine like this one")


def _cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    lines = (line.partition(":") for line in path.read_text().splitlines()) if path.is_file() else ()
    return next((set(value.split()) for key, _, value in lines if key.strip() in ("flags", "Features")), set())


def open_folder(folder: Path) -> Package:
    """Check the files of an artifact against its manifest and load it.

    Raises:
        PackageError: no artifact of this kind, a damaged file, or a host that cannot run it.
    """
    try:
        manifest = json.loads(_manifest_text(folder))
        entries = [(str(item["path"]), item["size"], str(item["sha256"])) for item in manifest["files"]]
        engine, info, needs = (
            manifest["engine"],
            manifest["programs"]["model"]["engine_info"],
            manifest["needs"],
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PackageError(f"{folder}: no readable manifest.json: {_first_line(error)}") from error
    if engine != "aotinductor":
        raise PackageError(f"{folder}: the artifact's engine is {engine}, not aotinductor")
    for path, size, digest in entries:
        file = _file(folder, path)
        with file.open("rb") as stream:
            intact = os.fstat(stream.fileno()).st_size == size
            if not intact or hashlib.file_digest(stream, "sha256").hexdigest() != digest:
                raise PackageError(f"{file}: the file was changed after it was written")
    return Package(folder, info, needs)


def _manifest_text(folder: Path) -> str:
    path = _file(folder, "manifest.json")
    if path.stat().st_size > MOST_MANIFEST:
        raise ValueError(f"it has {path.stat().st_size} bytes, more than {MOST_MANIFEST}")
    return path.read_text(encoding="utf-8")


def _file(folder: Path, name: str) -> Path:
    """A plain file of the artifact; names that lead out of it are refused."""
    path = folder / name
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    if not inside or path.is_symlink() or not path.is_file():
        raise PackageError(f"{folder}: {name!r} is not a plain file of the artifact")
    return path


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Continue a prompt greedily.")
    parser.add_argument("--artifact", type=Path, default=Path(__file__).resolve().parent, help="the folder")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text (needs tokenizer.json and the tokenizers library)")
    prompt.add_argument("--prompt-tokens", help="token ids: 5,17,33")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--ignore-eos", action="store_true", help="continue after end-of-text tokens")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--json", action="store_true", help="print prompt_tokens, tokens and text as JSON")
    return parser.parse_args(arguments)


def run_arrays(options: Any) -> int:
    """The command line of a package that takes tensors; 0, or 1 with a message."""
    import numpy as np

    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        package = open_folder(options.artifact)
        arrays = [torch.from_numpy(array) for array in _read_arrays(options.inputs, package.info["inputs"])]
        kinds = [_DTYPES[item["dtype"]] for item in package.info["inputs"]]
        outputs = package(*(array.to(kind).contiguous() for array, kind in zip(arrays, kinds, strict=True)))
    except (PackageError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found = {
        name: (item.float() if item.dtype is torch.bfloat16 else item).numpy()
        for name, item in zip(package.info["outputs"], outputs, strict=True)
    }
    for name, array in found.items():
        print(f"{name} {array.dtype}{list(array.shape)}")
    if options.outputs:
        np.savez(options.outputs, **found)  # type: ignore[arg-type]
    return 0


def check_unpacked(file: BinaryIO) -> None:
    """Refuse an .npz or .npy whose arrays would take far more than it: NumPy takes memory by their headers, before it
    reads, and unpacks of a member as much as it is said to have.

    Raises:
        ValueError: says how much. Whatever zipfile raises of a damaged one.
    """
    size, packed = os.fstat(file.fileno()).st_size, file.read(2) == b"PK"
    file.seek(0)
    if packed:
        with _BoundedFile(file.fileno(), closefd=False) as bounded, zipfile.ZipFile(bounded) as archive:
            bounded.is_bounded = False
            unpacked = sum(member.file_size for member in archive.infolist())
            if unpacked > size + MOST_UNPACKED:
                raise ValueError(f"{size} bytes would be unpacked to {unpacked}")
            for member in archive.infolist():
                with archive.open(member) as stream:
                    _check_header(stream, member.file_size)
    else:
        _check_header(file, size)
    file.seek(0)


def _check_header(file: Any, size: int) -> None:
    """Hold what the header of an array promises to the bytes that there are; of anything else NumPy says what is wrong."""
    import numpy as np

    try:
        version = np.lib.format.read_magic(file)
    except ValueError:
        return
    known = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version in known:
        shape, _, dtype = known[version](file)
        taken = math.prod(shape) * dtype.itemsize
        if taken > size:
            raise ValueError(f"its header promises {taken} bytes, more than the file has: {size}")


def _read_arrays(path: Path, inputs: Sequence[Any]) -> list[Any]:
    import numpy as np

    if not path.is_file():  # a pipe would block
        raise PackageError(f"{path} is no file")
    try:
        with path.open("rb") as packed:
            check_unpacked(packed)
        with np.load(path, allow_pickle=False) as file:
            missing = [item["name"] for item in inputs if item["name"] not in file]
            arrays = [] if missing else [file[item["name"]] for item in inputs]
    except Exception as error:  # what NumPy raises on damaged files has any type
        raise PackageError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if missing:
        raise PackageError(f"{path} has no array '{missing[0]}'")
    return arrays


def _parse_arrays(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the model on its inputs.")
    parser.add_argument("--artifact", type=Path, default=Path(__file__).resolve().parent, help="the folder")
    parser.add_argument("--inputs", type=Path, required=True, help=".npz with an array under the name of each input")
    parser.add_argument("--outputs", type=Path, help=".npz that the outputs are written to")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0, or 1 with a message."""
    options = _parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        package = open_folder(options.artifact)
        tokenizer = None
        if (options.artifact / "tokenizer.json").is_file():
            import tokenizers

            tokenizer = tokenizers.Tokenizer.from_file(str(options.artifact / "tokenizer.json"))
        if options.prompt is not None and tokenizer is None:
            raise PackageError("the artifact has no tokenizer: give --prompt-tokens")
        prompt = (
            tokenizer.encode(options.prompt).ids
            if options.prompt is not None and tokenizer is not None
            else [int(item) for item in options.prompt_tokens.split(",")]
        )
        stop = () if options.ignore_eos else package.info["eos_token_ids"]
        tokens = generate(package, [prompt], options.max_new_tokens, stop)[0]
    except PackageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = tokenizer.decode(tokens) if tokenizer is not None else None
    result = {"prompt_tokens": prompt, "tokens": tokens, "text": text}
    print(json.dumps(result) if options.json else text if text is not None else ",".join(map(str, tokens)))
    return 0


if __name__ == "__main__":
    sys.exit(run_arrays(_parse_arrays(None)) if Path(__file__).name == "run.py" else main())
