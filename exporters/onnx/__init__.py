"""ExportedProgram -> ONNX, by a walker of our own into onnx-ir.

The walker and its tables are loaded when something is written or held to them: onnx-ir takes its time to import, and a
plan writes nothing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from optc.compiler.ir.program import Program
from optc.compiler.target.target import ExportRequest, ExportResult, Predicate

for _name in ("onnx", "onnx_ir"):
    if importlib.util.find_spec(_name) is None:  # the target says so when it is asked for, not when it writes
        raise ModuleNotFoundError(f"No module named '{_name}'", name=_name)


class _Legal(Mapping[Any, Predicate | None]):
    """Operator -> predicate of `table.LEGAL`."""

    def __getitem__(self, operator: Any) -> Predicate | None:
        return _table()[operator]

    def __iter__(self) -> Iterator[Any]:
        return iter(_table())

    def __len__(self) -> int:
        return len(_table())


def _table() -> dict[Any, Predicate | None]:
    from optc.exporters.onnx.table import LEGAL

    return LEGAL


LEGAL = _Legal()
"""What can be written: operator -> predicate, None when every use of it can."""


def export_onnx(program: Program, request: ExportRequest) -> ExportResult:
    """See `export.export_onnx`."""
    from optc.exporters.onnx import export

    return export.export_onnx(program, request)


def export_onnx_cuda(program: Program, request: ExportRequest) -> ExportResult:
    """See `export.export_onnx_cuda`."""
    from optc.exporters.onnx import export

    return export.export_onnx_cuda(program, request)


def export_encoder_decoder(encoder: Program, decoder: Program, request: ExportRequest) -> ExportResult:
    """See `encoder_decoder.export_encoder_decoder`."""
    from optc.exporters.onnx import encoder_decoder

    return encoder_decoder.export_encoder_decoder(encoder, decoder, request)


__all__ = ["LEGAL", "export_encoder_decoder", "export_onnx", "export_onnx_cuda"]
