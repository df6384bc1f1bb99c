"""torch.export, with its failures as errors for users."""

from __future__ import annotations

from typing import Any

import torch

from optc.compiler import compat
from optc.compiler.diagnostics import CaptureError


def run_export(
    module: torch.nn.Module, args: tuple[Any, ...], dynamic_shapes: Any, *, where: str
) -> torch.export.ExportedProgram:
    """torch.export in non-strict mode; its failures become CaptureErrors."""
    try:
        with torch.no_grad():
            return compat.export_program(module, args, dynamic_shapes)
    except torch._dynamo.exc.UserError as error:
        raise CaptureError(
            "torch.export cannot make one graph for all shapes", where=where, why=str(error).strip().splitlines()[0],
            remedy="the model specializes on a shape or branches on data; see docs/compile.md",
        ) from error  # fmt: skip
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise CaptureError(
            "torch.export failed", where=where, why=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
            remedy="the model runs code that torch.export cannot trace",
        ) from error  # fmt: skip
