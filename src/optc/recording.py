"""Write measured quality or speed into an artifact: manifest and report, in one step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from optc.compiler.artifact import rewrite
from optc.compiler.manifest import Manifest
from optc.exporters.report import write_report


def record(folder: Path, **measured: dict[str, Any]) -> Manifest:
    """Set `quality` and/or `speed` of an artifact and renew its report; the artifact is swapped whole.

    Raises:
        ArtifactError: the artifact is damaged.  InputError, ResourceError: it cannot be written.
    """

    def edit(directory: Path, manifest: Manifest) -> Manifest:
        changed = msgspec.structs.replace(manifest, **measured)
        write_report(directory, changed)
        return changed

    return rewrite(folder, edit)
