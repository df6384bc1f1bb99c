"""A checked model folder as a transformers model: with its weights, or as shapes alone."""

from __future__ import annotations

import copy
import inspect
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optc.compiler.capture.attention import NAME, register
from optc.compiler.capture.device_weights import StraightTo
from optc.compiler.capture.facts import AUDIO, generates_from_an_encoder, reads_pictures, rotary_limit
from optc.compiler.diagnostics import CaptureError, InputError, foreign_errors
from optc.compiler.files import side_by_side
from optc.compiler.formats.layouts.tensors import CPU, TensorReader
from optc.compiler.ir.lazy_weights import materialized
from optc.compiler.ir.stored_weights import return_freed_memory
from optc.compiler.model_folder.checkpoint import (
    CheckpointInfo,
    check_folder,
    check_values,
    compare_shapes,
    tied_names,
)
from optc.compiler.model_folder.config_bounds import check_sizes
from optc.compiler.model_folder.config_file import CONFIG, read_json
from optc.compiler.model_folder.quantized import QuantizedFolder, quantized_folder

RESIDENT_BYTES = 512 << 20
"""Models whose weights take no more than this in the compute type are held in memory: reading them again and again
would cost more time than their memory is worth."""

_TOGETHER = "check that config.json and the weights belong together"


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype,
    attention: str = NAME,
    trust_remote_code: bool | None = None,
    resident_bytes: int | None = None,
    bare: bool = False,
    device: torch.device = CPU,
) -> tuple[torch.nn.Module, CheckpointInfo]:
    """A checked model folder as an eval-mode transformers model; weights of a quantized one become dense.

    Args:
        dtype: compute type of the weights.
        attention: transformers' attention implementation; "optc" for capture, "eager" for a reference.
        resident_bytes: leave weights in their files (see `ir/lazy_weights`) where all of them take more in `dtype`;
            None reads them in any case.
        bare: the model that gives hidden states, whatever the folder has behind it; see `meta_model`.
        device: where the model is. Of another one than the CPU each tensor goes there as it is read, is looked at and made
            dense there, and `resident_bytes` has no effect.

    Raises:
        InputError: the folder, its config or one of its tensors is unusable.
    """
    info = check_folder(Path(folder), trust_remote_code=trust_remote_code)
    straight = None if device.type == "cpu" else StraightTo(info, device)
    if straight is None:
        check_values(info)
    quantized = quantized_folder(info, device)
    skeleton = meta_model(info, bare=bare)
    places = skeleton.state_dict(keep_vars=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in places.items()}
    compare_shapes(quantized.dense if quantized else info, shapes, tied=tied_names(places))
    with foreign_errors("transformers cannot load the model", where=str(info.path), remedy=_TOGETHER):
        # Given tensors and a config without quantization, transformers does not look for a quantizer of its own.
        model, report = type(skeleton).from_pretrained(
            None,
            config=skeleton.config,
            state_dict=_state(info, quantized, dtype, resident_bytes)
            if straight is None
            else straight.state(quantized, dtype),
            dtype=dtype,
            attn_implementation=_accepted(skeleton, attention),
            trust_remote_code=info.trusted,
            output_loading_info=True,
            **(_without_pooler(type(skeleton)) if bare else {}),
        )
        _read_generation_config(model, info.path)
    _check_report(info, report)
    if straight is not None:
        straight.place(model)
    return model.eval().requires_grad_(False), info


def _accepted(skeleton: Any, attention: str) -> str:
    """The attention implementation, or "eager" where a class knows only those of a table of its own."""
    config = copy.deepcopy(skeleton.config)
    config._attn_implementation = attention
    try:
        with torch.device("meta"):
            type(skeleton)(config)
    except KeyError as error:
        if error.args == (attention,):
            return "eager"
        raise
    return attention


def _state(
    info: CheckpointInfo, quantized: QuantizedFolder | None, dtype: torch.dtype, resident_bytes: int | None
) -> dict[str, Tensor]:
    """The tensors of a folder: in their files, or in memory where they take no more than `resident_bytes`."""
    if quantized is not None:
        state = quantized.state(dtype)
    else:
        reader = TensorReader(info.path, info.tensors)
        state = {name: reader.lazy(name) for name in info.tensors}
    total = sum(tensor.numel() * dtype.itemsize for tensor in state.values())
    if resident_bytes is None or total <= resident_bytes:
        return dict(zip(state, side_by_side(materialized, list(state.values()), total), strict=True))
    return_freed_memory()
    return state


def _read_generation_config(model: Any, folder: Path) -> None:
    """Give a model that was loaded from tensors what transformers reads with a folder: end-of-text ids."""
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    if path.is_file() and model.can_generate():
        read_json(path)  # transformers takes a file that cannot be read for one that is not there
        model.generation_config = GenerationConfig.from_pretrained(str(folder))


def _check_report(info: CheckpointInfo, report: dict[str, Any]) -> None:
    """Refuse a model that transformers loaded with gaps: it fills them with random numbers."""
    for kind in ("missing_keys", "mismatched_keys"):
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report.get(kind) or ())
        if names:
            raise InputError(
                f"{len(names)} tensor(s) of the model were not in the checkpoint",
                where=f"{info.path}: {names[0]}",
                why=f"transformers reports {kind.replace('_', ' ')}",
                remedy=_TOGETHER,
            )


def meta_model(info: CheckpointInfo, *, bare: bool = False) -> Any:
    """The transformers model of a checked folder on the meta device: shapes only, no weight is read.

    Of a trusted folder the class may be one of its own.

    Args:
        bare: in place of the architecture that the config names, what `AutoModel` makes of it: the model without heads,
            and without a pooler of its own.

    Raises:
        InputError, CaptureError: unreadable config, unknown architecture, unsupported model.
    """
    config = pretrained_config(info, bare=bare)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the skeleton is that of the unquantized model
    made = _bare_class(info, config) if bare else _model_class(info, config)
    sounds = generates_from_an_encoder(made) and made.main_input_name == AUDIO
    if made.main_input_name != "input_ids" and not (sounds or reads_pictures(made)):
        raise _reads_other_input(made)
    register()
    with _config_errors(info), torch.device("meta"):
        return made(config, **(_without_pooler(made) if bare else {}))


def _without_pooler(made: type) -> dict[str, bool]:
    """Arguments that leave out a layer over the first token, which few checkpoints hold and no embedding needs."""
    taken = inspect.signature(made.__init__).parameters  # type: ignore[misc]
    return {"add_pooling_layer": False} if "add_pooling_layer" in taken else {}


def is_encoder_decoder(info: CheckpointInfo) -> bool:
    """Whether a checked folder holds a model whose decoder reads an encoder and chooses tokens.

    Raises:
        InputError, CaptureError: as `meta_model`.
    """
    return generates_from_an_encoder(_model_class(info, pretrained_config(info)))


def pretrained_config(info: CheckpointInfo, *, bare: bool = False) -> Any:
    """The config of a checked folder as transformers reads it.

    Args:
        bare: of an encoder-decoder model whose encoder transformers has as a model of its own, that of the encoder.

    Raises:
        InputError, CaptureError: unreadable, or of a model that is not supported.
    """
    from transformers import AutoConfig, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    check_sizes(info.config, info.tensors, info.path / CONFIG)
    with _config_errors(info):
        config = AutoConfig.from_pretrained(str(info.path), trust_remote_code=info.trusted)
    # What computes is for us to say, not for the folder: a name with a slash is a repository of kernels on the hub, whose
    # code transformers would load.
    config._attn_implementation = None
    config._experts_implementation = None
    if bare and _text_encoder(config) is not None:
        config.is_encoder_decoder = False
    rotary_limit(config)  # refuses one that has none, before any weight is read
    return config


def _config_errors(info: CheckpointInfo) -> AbstractContextManager[None]:
    """Classes of transformers check some values of a config, and stumble over others in every way there is."""
    return foreign_errors(
        "transformers cannot make the model that config.json describes",
        where=str(info.path / CONFIG),
        remedy="correct the value that it names; check model_type and the version of transformers",
    )


def _reads_other_input(made: type) -> CaptureError:
    """The refusal of a model of images or sounds."""
    name = made.main_input_name  # type: ignore[attr-defined]
    what = {
        "pixel_values": "a vision model that answers in text",
        "input_values": "an audio model",
        "input_features": "an audio model",
    }
    return CaptureError(
        f"the model reads {name}, not token ids",
        where=made.__name__,
        why=f"it is {what[name]}; folders are taken of models of text or of pictures" if name in what else None,
        remedy="load it in Python and capture it as a module: optc.capture(model, (example,), input_names=[...])",
    )


def _model_class(info: CheckpointInfo, config: Any) -> Any:
    import transformers

    names = getattr(config, "architectures", None) or []
    found = _own_class(info, names[0]) if names and info.trusted else None
    found = getattr(transformers, names[0], None) if names and found is None else found
    # transformers holds more than models: configs, functions, modules.
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    raise CaptureError(
        f"unknown architecture {names[0] if names else '(none named)'}",
        where="config.json: architectures",
        why="transformers has no such class, and "
        + ("auto_map does not name one" if info.trusted else "remote code is never executed"),
        remedy="use a model whose class is part of transformers",
    )


def _bare_class(info: CheckpointInfo, config: Any) -> Any:
    """The class that `AutoModel` makes of a config, or the encoder alone where that has a decoder as well (T5)."""
    import transformers

    own = info.config.get("auto_map")
    reference = own.get("AutoModel") if info.trusted and isinstance(own, dict) else None
    if isinstance(reference, str):
        return _own_class(info, reference.rpartition(".")[2])
    found = _text_encoder(config) or transformers.MODEL_MAPPING.get(type(config), None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    raise CaptureError(
        f"transformers has no single model of type {info.config['model_type']!a} without heads",
        where=str(info.path / CONFIG),
        why="embeddings are made of the hidden states that AutoModel gives",
        remedy="use a model that AutoModel loads",
    )


def _text_encoder(config: Any) -> Any:
    """What transformers has for the encoder alone of a kind of model that has a decoder too; None for others."""
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING

    both = type(config).is_encoder_decoder  # what a folder of the encoder says itself may be either
    return MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(config), None) if both else None


def _own_class(info: CheckpointInfo, name: str) -> Any:
    """The class of that name in the code of a trusted folder; None where auto_map does not name it."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    own = info.config.get("auto_map")
    references = own.values() if isinstance(own, dict) else ()
    reference = next((item for item in references if isinstance(item, str) and item.rpartition(".")[2] == name), None)
    if reference is None:
        return None
    where = f"{info.path / CONFIG}: auto_map"
    if "--" in reference:
        raise CaptureError(
            f"the code of {name} is in another repository",
            where=where,
            why=reference,
            remedy="put its files into the folder, and take the repository's name out of auto_map",
        )
    try:
        return get_class_from_dynamic_module(reference, str(info.path))
    except (ImportError, AttributeError, SyntaxError, OSError, ValueError) as error:
        raise CaptureError(
            f"the code of {name} cannot be loaded",
            where=where,
            why=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}",
            remedy="complete the folder's code, or install what it imports",
        ) from error
