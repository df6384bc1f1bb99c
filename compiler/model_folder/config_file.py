"""config.json of a model folder, read as hostile input."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optc.compiler.diagnostics import JSON_ERRORS, InputError
from optc.compiler.files import read_plain
from optc.compiler.json_text import parse_json

CONFIG = "config.json"
_ADAPTER = "adapter_config.json"
_MAX_BYTES = 32 << 20
_AGAIN = "download the file again"


def read_config(folder: Path, *, trust_remote_code: bool | None) -> dict[str, Any]:
    """The config of a model folder.

    Args:
        trust_remote_code: whether the user allows code from the folder; None where there is no way to allow it.

    Raises:
        InputError: missing, malformed, without model_type or architectures; it needs code from the
            folder and that is not allowed; or it sends transformers to weights other than the
            folder's safetensors.
    """
    path = folder / CONFIG
    if not path.is_file():
        adapter = (folder / _ADAPTER).is_file()
        raise InputError(
            f"the model folder has no {CONFIG}",
            where=str(folder),
            why="it holds an adapter, not a model" if adapter else None,
            remedy="merge the adapter into its model first" if adapter else "give a model saved by transformers",
        )
    config = read_json(path)
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise _unusable(path, "it names no model_type")
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise _unusable(path, "it names no architectures")
    _refuse_other_weights(folder, config)
    if "auto_map" in config and not trust_remote_code and not _is_native(config["model_type"], names[0]):
        raise InputError(
            f"{names[0]!a} needs code from the model folder",
            where=f"{path}: auto_map",
            why="transformers has no such architecture; code of a model is never executed unless asked for",
            remedy="use a model whose class is part of transformers"
            if trust_remote_code is None
            else "read the code, then allow it with --trust-remote-code, or use a model of transformers",
        )
    return config


def parts_beside(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What the config of a multimodal model has beside its language model: vision_config, audio_config."""
    if "text_config" not in config:
        return ()
    mine = ("text_config", "quantization_config")
    return tuple(
        key for key, item in config.items() if key.endswith("_config") and key not in mine and isinstance(item, dict)
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size.

    Raises:
        InputError: too large, malformed, or not an object.
    """
    value = _read(path)
    if not isinstance(value, dict):
        raise InputError("malformed JSON", where=str(path), why="it is not an object", remedy=_AGAIN)
    return value


def read_json_list(path: Path) -> list[Any]:
    """The same of a JSON list.

    Raises:
        InputError: too large, malformed, or no list.
    """
    value = _read(path)
    if not isinstance(value, list):
        raise InputError("malformed JSON", where=str(path), why="it is not a list", remedy=_AGAIN)
    return value


def _read(path: Path) -> Any:
    try:
        return parse_json(read_plain(path, "reading the model's files", most=_MAX_BYTES))
    except JSON_ERRORS as error:
        raise InputError("malformed JSON", where=str(path), why=str(error), remedy=_AGAIN) from error


def _refuse_other_weights(folder: Path, config: dict[str, Any]) -> None:
    """What makes transformers read weight files that were not checked, pickled ones among them."""
    if "transformers_weights" in config:
        raise _unusable(folder / CONFIG, "transformers_weights sends the loader to another file", "remove that key")
    if (folder / _ADAPTER).is_file():  # loaded on top of the model where peft is installed
        raise InputError(
            "the model folder holds an adapter as well",
            where=str(folder / _ADAPTER),
            remedy="merge the adapter into the model first, or move it away",
        )


def _is_native(model_type: str, architecture: str) -> bool:
    """Whether transformers has the model itself: then it ignores the folder's code unless it is trusted."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES and isinstance(getattr(transformers, architecture, None), type)


def _unusable(path: Path, why: str, remedy: str = _AGAIN) -> InputError:
    return InputError("the model's config is unusable", where=str(path), why=why, remedy=remedy)
