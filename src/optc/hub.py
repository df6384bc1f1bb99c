"""Models by their name on the Hugging Face hub: `Qwen/Qwen2.5-0.5B`, or `Qwen/Qwen2.5-0.5B@revision`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from optc.compiler.diagnostics import InputError

_ID = re.compile(r"(?P<name>[\w][\w.-]*/[\w][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_FILES = ("*.json", "*.jinja", "*.safetensors", "tokenizer.model", "*.txt", "*.py")
"""What a model folder is read from; weights in pickles stay where they are. Code runs only with --trust-remote-code."""


def local_model(model: Any) -> Any:
    """The folder of a model that is named by its id on the hub; anything else as it is.

    A path wins: what exists, and what lies in a folder that does. Files come through huggingface_hub into its cache
    (`HF_HOME`), and with `HF_HUB_OFFLINE=1` from there alone.

    Raises:
        InputError: the hub has no such model, does not give it, or cannot be reached, and the cache does not hold it.
    """
    if not isinstance(model, str | Path):
        return model
    found = _ID.fullmatch(str(model))
    path = Path(model)
    if found is None or path.exists() or path.parent.exists():
        return model
    return _snapshot(found["name"], found["revision"])


def _snapshot(name: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import constants, errors

    try:
        folder = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(_FILES))
    except errors.GatedRepoError as error:
        raise _missing(
            name, "its owner must let you in", "ask on the model's page, and log in: hf auth login"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        why = "the hub has no such model or revision, or it is private"
        raise _missing(name, why, "check the name, or log in: hf auth login") from error
    except errors.LocalEntryNotFoundError as error:
        offline = constants.HF_HUB_OFFLINE
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        remedy = "unset HF_HUB_OFFLINE" if offline else "connect, or give the path of a folder"
        raise _missing(name, f"{why}, and the cache does not hold it ({constants.HF_HUB_CACHE})", remedy) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise _missing(name, (str(error).strip().splitlines() or [""])[0], "try again, or give a folder") from error
    return Path(folder)


def _missing(name: str, why: str, remedy: str) -> InputError:
    return InputError(
        f"there is no folder '{name}', and the model is not to be had from the hub", why=why, remedy=remedy
    )
