"""Folders of sentence-transformers: `modules.json` and the modules that it runs behind the model, read as hostile input.

The layout is that of the library itself (https://sbert.net, versions 2 to 6). What is not known here is refused by its
name: a module or a setting that is left out gives other embeddings without a word.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from torch import Tensor

from optc.compiler.diagnostics import JSON_ERRORS, CaptureError, InputError, UsageError
from optc.compiler.files import FileStamp, file_stamp
from optc.compiler.formats.layouts.tensors import FLOATS, TensorReader
from optc.compiler.ir.contract import EmbeddingFacts
from optc.compiler.model_folder.checkpoint import CheckpointInfo, check_values, read_tensors, reading
from optc.compiler.model_folder.config_file import CONFIG, read_json, read_json_list

MODULES, SETTINGS = "modules.json", "config_sentence_transformers.json"
POOLINGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
"""Ways of pooling by sentence-transformers' names, in the order in which several stand side by side -> the switch of each
in files of versions before 6."""
ACTIVATIONS = ("Tanh", "Identity", "ReLU", "GELU", "Sigmoid", "SiLU")
"""Functions of torch.nn that may follow a Dense module, without arguments."""

_TRANSFORMER_SETTINGS = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
"""Where the first module has its settings: the first that is there counts."""
_LOADING = ("trust_remote_code", "attn_implementation", "dtype", "torch_dtype")
"""Arguments of the model's and the tokenizer's loader that change nothing that is computed here."""
_MOST_MODULES, _MOST_PROMPTS = 32, 256
_OTHER = "compile the model inside alone with --pooling none, or give a folder of other modules"


@dataclass(frozen=True)
class Pooling:
    """Hidden states [S, C] to one vector [C], or to several side by side."""

    modes: tuple[str, ...]


@dataclass(frozen=True)
class Dense:
    """A linear with weight [N, K] and bias [N], and a function of torch.nn behind it."""

    weight: Tensor
    bias: Tensor | None
    activation: str


@dataclass(frozen=True)
class Normalize:
    """To length 1 (L2)."""


Step = Pooling | Dense | Normalize


@dataclass(frozen=True)
class SentenceModules:
    """What stands behind the model of a folder, and how texts are encoded for it.

    Attributes:
        steps: in order; the first is the pooling.
        most_tokens: of a text; None where the folder says nothing.
        files: that say so, relative to the folder -> their stamps.
    """

    steps: tuple[Step, ...]
    prompts: dict[str, str] = dataclasses.field(default_factory=dict)
    default_prompt: str | None = None
    lower_case: bool = False
    most_tokens: int | None = None
    files: Mapping[str, FileStamp] = dataclasses.field(default_factory=dict)

    @property
    def pooling(self) -> tuple[str, ...]:
        """The ways of pooling."""
        return next(step.modes for step in self.steps if isinstance(step, Pooling))

    def facts(self, size: int) -> EmbeddingFacts:
        """What an artifact says of its embeddings, of so many numbers."""
        return EmbeddingFacts(
            size=size,
            pooling=self.pooling,
            normalized=isinstance(self.steps[-1], Normalize),
            lower_case=self.lower_case,
            prompts=self.prompts,
            default_prompt=self.default_prompt,
        )


def sentence_modules(folder: Path, pooling: str | None = None) -> SentenceModules | None:
    """What makes embeddings of a model folder; None where nothing does.

    Args:
        pooling: what was asked for: a way of pooling for a folder that does not say it, "none" for the hidden states.

    Raises:
        UsageError: a way of pooling for a folder that has its own.
        InputError: a file is malformed, too large, missing or not plain, or leaves the folder.
        CaptureError: a module or a setting that is not known.
    """
    if pooling == "none":
        return None
    with reading(folder):
        return _chosen(folder, pooling)


def modules_behind(folder: Path) -> tuple[str, ...]:
    """Names of the modules that stand behind the model of a folder.

    Raises:
        InputError: `modules.json` is malformed or too large.
    """
    return tuple(entry.name for entry in _entries(folder)[1:])


def _chosen(folder: Path, pooling: str | None) -> SentenceModules | None:
    entries = _entries(folder)
    if len(entries) > 1:
        if pooling is not None:
            raise UsageError(
                f"--pooling {pooling} contradicts the model folder",
                where=str(folder / MODULES),
                why="it says how embeddings are made",
                remedy="leave --pooling out; --pooling none gives the model's hidden states",
            )
        return _read(folder, entries)
    if pooling is None:
        return None
    if pooling not in POOLINGS:
        raise UsageError(f"unknown pooling '{pooling}'", remedy=f"choose one of {', '.join((*POOLINGS, 'none'))}")
    return SentenceModules((Pooling((pooling,)),))


def with_modules(info: CheckpointInfo, modules: SentenceModules) -> CheckpointInfo:
    """A checked folder whose digests and stamps cover the files of its modules too."""
    return dataclasses.replace(info, behind=tuple(modules.files), stamps={**info.stamps, **modules.files})


# -- modules.json ----------------------------------------------------------------------------------


class _Entry(msgspec.Struct):
    """A module, as `modules.json` lists it; the class that runs it and the folder of its files."""

    type: Annotated[str, Meta(max_length=256)]
    path: Annotated[str, Meta(max_length=256)] = ""

    @property
    def name(self) -> str:
        return self.type.rpartition(".")[2]


def _entries(folder: Path) -> list[_Entry]:
    """The modules of a folder; none where it has no `modules.json`."""
    path = folder / MODULES
    if not path.is_file():
        return []
    entries = _converted(read_json_list(path), list[_Entry], path)
    if len(entries) > _MOST_MODULES:
        why = f"{len(entries)} modules, at most {_MOST_MODULES} are allowed"
        raise InputError("too many modules", where=str(path), why=why, remedy="use another copy of the model")
    return entries


def _read(folder: Path, entries: list[_Entry]) -> SentenceModules:
    where = folder / MODULES
    for number, entry in enumerate(entries):
        _check_known(entry, tuple(_READERS) if number else ("Transformer",), where)
    if entries[0].path:
        raise CaptureError(
            f"the model's files are in '{entries[0].path}'",
            where=str(where),
            why="they are read from the folder itself",
            remedy=f'move them there, and set the first path of {MODULES} to ""',
        )
    files = {MODULES: file_stamp(where)}
    steps: list[Step] = []
    for entry in entries[1:]:
        place = _place(folder, entry, where)
        step, used = _READERS[entry.name](place)
        files |= {f"{entry.path}/{name}": file_stamp(place / name) for name in used}
        if isinstance(step, Pooling) != (not steps):
            why = "the first module behind the model is the pooling, and no other"
            raise CaptureError(f"{entry.type} stands in another place", where=str(where), why=why, remedy=_OTHER)
        steps.append(step)
    made = SentenceModules(tuple(steps), files=files)
    return _with_prompts(_with_settings(made, folder), folder)


def _check_known(entry: _Entry, known: tuple[str, ...], where: Path) -> None:
    """Code of the folder's own may bear any last name: only that of the library is what it is called."""
    if entry.type.startswith("sentence_transformers.") and entry.name in known:
        return
    raise CaptureError(
        f"the module {entry.type!a} is not known here",
        where=str(where),
        why=f"in its place optc takes {', '.join(known)} of sentence_transformers",
        remedy=_OTHER,
    )


def _place(folder: Path, entry: _Entry, where: Path) -> Path:
    """The folder of a module's files, inside the model's."""
    place = folder / entry.path
    plain = re.fullmatch(r"[\w-][\w.-]*", entry.path, re.ASCII) is not None
    if not plain or place.is_symlink() or (place.exists() and not place.is_dir()):
        why = f"{entry.path!a} is not the plain name of a folder inside the model's"
        raise InputError("a module has a bad path", where=str(where), why=why, remedy="use another copy of the model")
    return place


def _converted(value: Any, kind: Any, path: Path) -> Any:
    try:
        return msgspec.convert(value, kind)
    except JSON_ERRORS as error:
        raise InputError("malformed JSON", where=str(path), why=str(error), remedy="download the file again") from error


# -- modules ---------------------------------------------------------------------------------------


_Size = Annotated[int, Meta(ge=1, le=1 << 20)]


class _PoolingConfig(msgspec.Struct, forbid_unknown_fields=True):
    pooling_mode: str | list[str] | None = None
    include_prompt: bool = True
    embedding_dimension: _Size | None = None
    word_embedding_dimension: _Size | None = None
    pooling_mode_cls_token: bool = False
    pooling_mode_max_tokens: bool = False
    pooling_mode_mean_tokens: bool = False
    pooling_mode_mean_sqrt_len_tokens: bool = False
    pooling_mode_weightedmean_tokens: bool = False
    pooling_mode_lasttoken: bool = False


def _read_pooling(place: Path) -> tuple[Step, tuple[str, ...]]:
    path = place / CONFIG
    config: _PoolingConfig = _module_config(path, _PoolingConfig)
    if not config.include_prompt:
        raise CaptureError(
            "pooling leaves the prompt out",
            where=f"{path}: include_prompt",
            why="the program does not know which tokens are the prompt's",
            remedy=_OTHER,
        )
    if config.pooling_mode is None:
        modes = [mode for mode, switch in POOLINGS.items() if getattr(config, switch)] or ["mean"]
    else:
        modes = [config.pooling_mode] if isinstance(config.pooling_mode, str) else config.pooling_mode
    for mode in modes:
        if mode not in POOLINGS:
            why = f"optc takes {', '.join(POOLINGS)}"
            raise CaptureError(f"unknown pooling {mode!a}", where=f"{path}: pooling_mode", why=why, remedy=_OTHER)
    if not 0 < len(modes) <= len(POOLINGS):
        raise InputError("pooling of nothing, or of too much", where=str(path), remedy="use another copy of the model")
    return Pooling(tuple(modes)), (CONFIG,)


class _DenseConfig(msgspec.Struct, forbid_unknown_fields=True):
    in_features: _Size
    out_features: _Size
    bias: bool = True
    activation_function: str = "torch.nn.modules.activation.Tanh"
    module_input_name: str = "sentence_embedding"
    module_output_name: str | None = None
    use_residual: bool = False


def _read_dense(place: Path) -> tuple[Step, tuple[str, ...]]:
    path = place / CONFIG
    config: _DenseConfig = _module_config(path, _DenseConfig)
    _check_names(path, config.module_input_name, config.module_output_name)
    module, _, activation = config.activation_function.rpartition(".")
    if re.fullmatch(r"torch\.nn(\.modules\.\w+)?", module) is None or activation not in ACTIVATIONS:
        raise CaptureError(
            f"unknown function {config.activation_function!a} behind a Dense module",
            where=f"{path}: activation_function",
            why=f"optc takes {', '.join(ACTIVATIONS)} of torch.nn",
            remedy=_OTHER,
        )
    if config.use_residual:
        why = "the input of the module is added to its output"
        raise CaptureError("a Dense module with a residual", where=f"{path}: use_residual", why=why, remedy=_OTHER)
    tensors = read_tensors(place)
    check_values(CheckpointInfo(place, {}, tensors, has_tokenizer=False))
    wanted: dict[str, tuple[int, ...]] = {"linear.weight": (config.out_features, config.in_features)}
    wanted |= {"linear.bias": (config.out_features,)} if config.bias else {}
    reader = TensorReader(place, tensors)
    for name, shape in wanted.items():
        if reader.shape(name) != shape:
            raise reader.wrong_shape(name, f"found {list(reader.shape(name))}, expected {list(shape)} from {CONFIG}")
    unknown = sorted(set(tensors) - set(wanted))
    if unknown:
        why = f"{CONFIG} describes a module without it"
        raise InputError(f"unexpected tensor {unknown[0]!a}", where=str(place), why=why, remedy="use another copy")
    weight, *bias = (reader.read(name, *FLOATS) for name in wanted)
    files = (CONFIG, *sorted({tensor.file for tensor in tensors.values()}))
    return Dense(weight, bias[0] if bias else None, activation), files


class _NormalizeConfig(msgspec.Struct, forbid_unknown_fields=True):
    module_input_name: str = "sentence_embedding"
    module_output_name: str | None = None


def _read_normalize(place: Path) -> tuple[Step, tuple[str, ...]]:
    path = place / CONFIG
    if not path.is_file():  # files of it came with version 5
        return Normalize(), ()
    config: _NormalizeConfig = _module_config(path, _NormalizeConfig)
    _check_names(path, config.module_input_name, config.module_output_name)
    return Normalize(), (CONFIG,)


_READERS = {"Pooling": _read_pooling, "Dense": _read_dense, "Normalize": _read_normalize}


def _module_config(path: Path, kind: Any) -> Any:
    """Settings of a module; one that is not known is refused."""
    found = read_json(path)
    try:
        return msgspec.convert(found, kind)
    except JSON_ERRORS as error:
        raise InputError(
            "the module's settings are not known here", where=str(path), why=str(error), remedy=_OTHER
        ) from error


def _check_names(path: Path, reads: str, writes: str | None) -> None:
    if (reads, writes or reads) != ("sentence_embedding", "sentence_embedding"):
        raise CaptureError(
            f"a module reads {reads!a} and writes {writes or reads!a}",
            where=str(path),
            why="only modules behind the pooling, which read and write sentence_embedding, are taken",
            remedy=_OTHER,
        )


# -- how texts are encoded -------------------------------------------------------------------------


class _Transformer(msgspec.Struct, forbid_unknown_fields=True):
    """Settings of the model as a module. What is None has no effect."""

    max_seq_length: Annotated[int, Meta(ge=1, le=1 << 31)] | None = None
    do_lower_case: bool = False
    transformer_task: str = "feature-extraction"
    modality_config: dict[str, dict[str, Any]] | None = None
    module_output_name: str = "token_embeddings"
    processing_kwargs: dict[str, Any] | None = None
    unpad_inputs: bool | None = None
    model_args: dict[str, Any] | None = None
    model_kwargs: dict[str, Any] | None = None
    tokenizer_args: dict[str, Any] | None = None
    processor_kwargs: dict[str, Any] | None = None
    config_args: dict[str, Any] | None = None
    config_kwargs: dict[str, Any] | None = None


_OUTPUT = {"method": "forward", "method_output_name": "last_hidden_state"}


def _with_settings(made: SentenceModules, folder: Path) -> SentenceModules:
    """With what the first module says of texts: their length and case."""
    name = next((name for name in _TRANSFORMER_SETTINGS if (folder / name).is_file()), None)
    if name is None:
        return dataclasses.replace(made, most_tokens=_tokenizers_limit(folder))
    path = folder / name
    config: _Transformer = _module_config(path, _Transformer)
    wanted: tuple[tuple[str, Any, Any], ...] = (
        ("transformer_task", config.transformer_task, "feature-extraction"),
        ("module_output_name", config.module_output_name, "token_embeddings"),
        ("modality_config", config.modality_config or {"text": _OUTPUT}, {"text": _OUTPUT}),
        ("processing_kwargs", config.processing_kwargs or {}, {}),
    )
    for key, value, taken in wanted:
        if value != taken:
            why = f"it is {str(value)[:200]}; optc takes {taken}"
            raise CaptureError(f"unknown {key} of the model", where=str(path), why=why, remedy=_OTHER)
    for key in ("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs"):
        other = [item for item in getattr(config, key) or () if item not in _LOADING]
        if other:
            why = "what it changes is not known here"
            raise CaptureError(f"unknown {other[0]!a} in {key}", where=str(path), why=why, remedy=_OTHER)
    most = config.max_seq_length or _tokenizers_limit(folder)
    files = {**made.files, name: file_stamp(path)}
    return dataclasses.replace(made, lower_case=config.do_lower_case, most_tokens=most, files=files)


def _tokenizers_limit(folder: Path) -> int | None:
    """The length to which the tokenizer cuts, where it has one."""
    path = folder / "tokenizer_config.json"
    found = read_json(path).get("model_max_length") if path.is_file() else None
    return found if isinstance(found, int) and 0 < found < 1 << 31 else None


class _Settings(msgspec.Struct):
    """Of the whole; what else stands there tells of versions and of comparing, and is not needed."""

    model_type: str = "SentenceTransformer"
    prompts: Annotated[dict[str, Annotated[str, Meta(max_length=1 << 14)] | None], Meta(max_length=_MOST_PROMPTS)] = {}
    default_prompt_name: str | None = None


def _with_prompts(made: SentenceModules, folder: Path) -> SentenceModules:
    path = folder / SETTINGS
    if not path.is_file():
        return made
    settings: _Settings = _converted(read_json(path), _Settings, path)
    if settings.model_type != "SentenceTransformer":
        raise CaptureError(
            f"the folder is a {settings.model_type!a}",
            where=f"{path}: model_type",
            why="a SentenceTransformer gives one vector for each text",
            remedy=_OTHER,
        )
    prompts = {name: text or "" for name, text in settings.prompts.items()}
    try:
        "".join((*prompts, *prompts.values())).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            "a prompt is not text", where=str(path), why=str(error), remedy="use another copy of the model"
        ) from error
    if settings.default_prompt_name is not None and settings.default_prompt_name not in prompts:
        raise InputError(
            f"the default prompt {settings.default_prompt_name!a} is none of the prompts",
            where=str(path),
            remedy="use another copy of the model",
        )
    files = {**made.files, SETTINGS: file_stamp(path)}
    return dataclasses.replace(made, prompts=prompts, default_prompt=settings.default_prompt_name, files=files)
