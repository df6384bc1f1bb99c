"""A Hugging Face model folder, read as hostile input before transformers sees it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from optc.compiler.diagnostics import InputError
from optc.compiler.files import FileStamp, file_stamp, side_by_side
from optc.compiler.formats.layouts.tensors import TensorReader
from optc.compiler.formats.safetensors_header import TensorInfo, damaged, read_header, shown
from optc.compiler.ir.lazy_weights import materialized
from optc.compiler.ir.saved.safetensors_file import TYPES
from optc.compiler.model_folder.config_file import CONFIG, read_config, read_json

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# Elements looked at together. Reductions of this size stay on one thread: with busy cores, the barriers
# of thousands of parallel ones cost seconds (0.06 s against 0.3 to 9 s for 28 M elements).
_CHUNK = 1 << 15
_PIECE = 1 << 18  # elements in memory together: a buffer that is used again and again


@dataclass(frozen=True)
class CheckpointInfo:
    """A model folder whose structure was checked; no weight has been read.

    Attributes:
        config: config.json.
        tensors: name -> where it lies, of all weight files.
        has_tokenizer: a tokenizer.json is there; without it only token ids work.
        trusted: code from the folder may run.
        stamps: name of config.json and of each weight file -> what tells it from another that takes its place.
        behind: further files that say what is computed behind the model, relative to the folder.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    has_tokenizer: bool
    trusted: bool = False
    stamps: Mapping[str, FileStamp] = dataclasses.field(default_factory=dict)
    behind: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the weight files, sorted."""
        return tuple(sorted({tensor.file for tensor in self.tensors.values()}))

    @property
    def dtype(self) -> torch.dtype | None:
        """What most of the floating elements are stored in; None where there are none."""
        floats = (tensor for tensor in self.tensors.values() if tensor.dtype in _FLOATS)
        return prevailing((TYPES[tensor.dtype], math.prod(tensor.shape)) for tensor in floats)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files on the disk."""
        return sum((self.path / name).stat().st_size for name in self.files)


def prevailing(sizes: Iterable[tuple[torch.dtype, int]]) -> torch.dtype | None:
    """The type of most elements, of types and numbers of elements; None of nothing."""
    totals: Counter[torch.dtype] = Counter()
    for dtype, count in sizes:
        totals[dtype] += count
    return totals.most_common(1)[0][0] if totals else None


def check_folder(path: Path, *, trust_remote_code: bool | None = None) -> CheckpointInfo:
    """Check a model folder: its config, its index and the header of every weight file.

    Args:
        trust_remote_code: accept a model whose code lies in its own folder; None where the user has no way to say so.

    Raises:
        InputError: names the file, what is wrong with it and what to do.
    """
    path = Path(path)
    if not path.is_dir():
        what = "the model is a file, not a folder" if path.exists() else "the model folder does not exist"
        raise InputError(what, where=str(path), remedy="give a folder with config.json and *.safetensors")
    with reading(path):
        config = read_config(path, trust_remote_code=trust_remote_code)
        tensors = read_tensors(path)
        stamps = {name: file_stamp(path / name) for name in (CONFIG, *{tensor.file for tensor in tensors.values()})}
    has_tokenizer = (path / "tokenizer.json").is_file()
    return CheckpointInfo(path, config, tensors, has_tokenizer, bool(trust_remote_code), stamps)


def check_values(info: CheckpointInfo, names: Iterable[str] | None = None) -> None:
    """Look at every value of every floating tensor.

    Args:
        names: of those to look at; None takes all.

    Raises:
        InputError: NaN or Inf; names file, tensor and how many. Also data that cannot be read.
    """
    reader = TensorReader(info.path, info.tensors)
    wanted = info.tensors if names is None else names
    names = [name for name in wanted if info.tensors[name].dtype in _FLOATS]

    def check(name: str) -> None:
        _check_finite(info.path / info.tensors[name].file, name, reader.lazy(name))

    side_by_side(check, names, stamped_bytes(info))


def compare_shapes(
    info: CheckpointInfo, expected: Mapping[str, tuple[int, ...]], *, tied: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """Check the tensors of a checkpoint against what its config asks for.

    Names are matched as they are, or with one leading module more or less (a model saved with or
    without its head). A model may also be stored under other names that its loader converts
    (experts one by one, older names); then as many elements must be left over as are missing, and
    which they are is for the loader's own report to say.

    Args:
        expected: name -> shape of the weights of the model that config.json describes.
        tied: name -> name of the weight that it shares; one of the two is enough.

    Returns:
        Tensors of the checkpoint that the model has no place for under their name.

    Raises:
        InputError: a tensor of another shape, a missing one, or layers beyond those of the config.
    """
    found = match_names(info.tensors, expected)
    for name, source in found.items():
        shape = info.tensors[source].shape
        if shape != expected[name]:
            raise _mismatch(
                f"tensor '{shown(source)}' has the wrong shape",
                info.path / info.tensors[source].file,
                f"found {list(shape)}, expected {list(expected[name])} from {CONFIG}",
            )
    used = set(found.values())
    spare = tuple(name for name in info.tensors if name not in used)
    _check_missing(info, expected, found, spare, tied or {})
    forms = {_form(name) for name in expected}
    for name in spare:
        if _form(name) in forms:
            why = f"{CONFIG} describes a model without it: fewer layers than the weights have"
            raise _mismatch(f"unexpected tensor '{shown(name)}'", info.path / info.tensors[name].file, why)
    return spare


def tied_names(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Names that share a tensor -> its first name, from a state dict with `keep_vars=True`."""
    first: dict[int, str] = {}
    owners = {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}
    return {name: owner for name, owner in owners.items() if name != owner}


def weights_digest(info: CheckpointInfo, stopped: Callable[[], bool] = bool) -> str:
    """sha256 over all weight files and those behind the model: what `sha256sum FILES | sha256sum` prints, each kind sorted.

    Args:
        stopped: asked every megabyte, whether the answer is no longer wanted.

    Raises:
        InputError: a file is not the one that was checked and read.
        CancelledError: it was stopped.
    """
    digest, files = hashlib.sha256(), (*info.files, *sorted(info.behind))
    hashes = side_by_side(lambda file: _sha256(info, file, stopped), files, stamped_bytes(info))
    for file, found in zip(files, hashes, strict=True):
        digest.update(f"{found}  {file}\n".encode())
    return digest.hexdigest()


def stamped_bytes(info: CheckpointInfo) -> int:
    """Bytes of the files of a folder when it was checked."""
    return sum(stamp.size for stamp in info.stamps.values())


def config_digest(info: CheckpointInfo) -> str:
    """sha256 of config.json.

    Raises:
        InputError: it is not the file that was read.
    """
    return _sha256(info, CONFIG)


# -- weights -------------------------------------------------------------------------------------


def has_weights(folder: Path) -> bool:
    """Whether a folder has a file that `read_tensors` would read."""
    return (folder / _SINGLE).is_file() or (folder / _INDEX).is_file()


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Headers of the files that transformers would choose: the single one first, then the index.

    Raises:
        InputError: there are none, or one is damaged.
    """
    if (folder / _SINGLE).is_file():
        tensors = read_header(folder / _SINGLE)
    elif (folder / _INDEX).is_file():
        tensors = _sharded(folder)
    else:
        raise _no_weights(folder)
    if not tensors:
        raise damaged(folder / (_SINGLE if (folder / _SINGLE).is_file() else _INDEX), "it holds no tensors")
    return tensors


def _sharded(folder: Path) -> dict[str, TensorInfo]:
    index = folder / _INDEX
    try:
        placed = msgspec.convert(read_json(index).get("weight_map"), dict[str, str])
    except msgspec.ValidationError as error:
        why = f"weight_map: {error}"
        raise InputError("malformed index", where=str(index), why=why, remedy="download the file again") from error
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(placed.values())):
        if not re.fullmatch(r"[\w.-]+\.safetensors", file, re.ASCII):
            why = f"{file!r} is not the name of a safetensors file in this folder"
            raise InputError("the index names a bad file", where=str(index), why=why, remedy="use another copy")
        if not (folder / file).is_file():
            raise InputError(
                f"the shard {file} is missing",
                where=str(folder),
                why=f"{_INDEX} names it",
                remedy="download the missing file",
            )
        for name, info in read_header(folder / file).items():
            if name in tensors:
                raise damaged(folder / file, f"{tensors[name].file} has the same tensor", name)
            tensors[name] = info
    for name, file in placed.items():
        if name not in tensors or tensors[name].file != file:
            raise damaged(folder / file, f"{_INDEX} says that the tensor is here, and it is not", name)
    return tensors


def _no_weights(folder: Path) -> InputError:
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
    if pickled:
        return InputError(
            "the weights are pickled",
            where=str(folder / pickled[0]),
            why="unpickling can run code",
            remedy="convert the weights to safetensors (in transformers: model.save_pretrained)",
        )
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    why = f"found {', '.join(others[:4])} instead" if others else None
    return InputError(
        "the model folder has no weights",
        where=str(folder),
        why=why,
        remedy=f"it needs {_SINGLE}, or {_INDEX} and its shards",
    )


def _check_finite(path: Path, name: str, tensor: torch.Tensor) -> None:
    values, nans, infs = tensor.view(-1), 0, 0
    pieces = (materialized(values[i : i + _PIECE]) for i in range(0, values.numel(), _PIECE))
    for chunk in (chunk for piece in pieces for chunk in piece.split(_CHUNK)):
        if chunk.element_size() == 1:
            chunk = chunk.float()  # float8 has no reductions
        # aminmax passes NaN on and is an order of magnitude faster than isfinite.
        if not all(math.isfinite(bound) for bound in chunk.aminmax()):
            nans += int(chunk.isnan().sum())
            infs += int(chunk.isinf().sum())
    is_bound = tensor.dim() == 0 and not nans  # one number, such as the bound of a clamp that is off
    if (nans or infs) and not is_bound:
        raise InputError(
            f"tensor '{shown(name)}' has values that are not finite",
            where=str(path),
            why=f"{nans} NaN and {infs} Inf of {values.numel()} values",
            remedy="use another checkpoint: this one was saved from a diverged run, or is damaged",
        )


# -- names and shapes ----------------------------------------------------------------------------


def match_names(tensors: Iterable[str], expected: Iterable[str]) -> dict[str, str]:
    """Expected name -> name in the checkpoint, for those found."""
    here = set(tensors)
    longer = {name.partition(".")[2]: name for name in here}
    found = {}
    for name in expected:
        shorter = name.partition(".")[2]
        match = name if name in here else shorter if shorter in here else longer.get(name)
        if match is not None:
            found[name] = match
    return found


def _check_missing(
    info: CheckpointInfo,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, str],
    spare: tuple[str, ...],
    tied: Mapping[str, str],
) -> None:
    owners = {name: tied.get(name, name) for name in expected}
    present = {owners[name] for name in found}
    missing = [name for name in expected if owners[name] not in present]
    needed = sum(math.prod(expected[owner]) for owner in {owners[name] for name in missing})
    if needed > sum(math.prod(info.tensors[name].shape) for name in spare):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        why = f"{CONFIG} asks for it with shape {list(expected[missing[0]])}"
        raise _mismatch(f"missing tensor '{missing[0]}'{more}", info.path, why)


def _form(name: str) -> str:
    """A name without its layer number: the same in every layer."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)


def _mismatch(what: str, where: Path, why: str) -> InputError:
    return InputError(what, where=str(where), why=why, remedy="check that config.json and the weights belong together")


# -- files ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Errors of the file system, as those of a model folder.

    Raises:
        InputError: names the file.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            "the model cannot be read",
            where=str(error.filename or path),
            why=str(error),
            remedy="check its permissions and the disk",
        ) from error


def _sha256(info: CheckpointInfo, name: str, stopped: Callable[[], bool] = bool) -> str:
    """The hash of a file that is the one whose stamp was taken when the folder was checked."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with reading(info.path / name), (info.path / name).open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if stopped():
                raise CancelledError
    check_stamp(info, name)
    return digest.hexdigest()


def check_stamp(info: CheckpointInfo, name: str) -> None:
    """A file is the one that it was when the folder was checked.

    Raises:
        InputError: it is not, or cannot be asked for.
    """
    path = info.path / name
    with reading(path):
        if name in info.stamps and file_stamp(path) != info.stamps[name]:
            raise InputError(
                f"{name} was changed while it was read",
                where=str(path),
                why="it is not the file that was checked at the beginning",
                remedy="run again when nothing writes into the model's folder",
            )
