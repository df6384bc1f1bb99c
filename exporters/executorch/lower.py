"""From an ExportedProgram to the bytes of a .pte: XNNPACK takes what it can, portable kernels the rest."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram

from optc.compiler.diagnostics import TargetError
from optc.compiler.ir.quick_tracing import quick_shapes

XNNPACK = "XnnpackBackend"
_NO_OUT_VARIANT = re.compile(r"Missing out variants: \{(.*)\}")


@dataclass(frozen=True)
class Lowered:
    """A .pte and what is in it.

    Attributes:
        delegates: how many pieces XNNPACK runs.
        operators: portable kernels that the runtime must have, such as "aten::add.out".
    """

    data: bytes
    delegates: int
    operators: tuple[str, ...]


def lower(exported: ExportedProgram, constants: Mapping[str, Any]) -> Lowered:
    """Lower a program whose caches are buffers; writes into them stay in place.

    Args:
        constants: further methods of the .pte that return a constant: what runners ask for (get_max_seq_len ...).

    Raises:
        TargetError: operators without a kernel in the installed runtime, all of them.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    # Core ATen's own check would refuse operators one by one; what is left is compared with the runtime below.
    edge_config = EdgeCompileConfig(_check_ir_validity=False)
    backend_config = ExecutorchBackendConfig(
        run_reinplace_pass=True,  # else every call copies every cache twice
        sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
    )
    with warnings.catch_warnings(), torch.no_grad(), quick_shapes():
        warnings.simplefilter("ignore")
        logging.getLogger("executorch").setLevel(logging.ERROR)
        edge = to_edge_transform_and_lower(
            exported,
            partitioner=[XnnpackPartitioner()],
            compile_config=edge_config,
            constant_methods=dict(constants),
        )
        try:
            result = edge.to_executorch(backend_config)
        except RuntimeError as error:
            found = _NO_OUT_VARIANT.search(str(error))
            if found is None:
                raise
            raise _no_kernels([name.strip(" '") for name in found[1].split(",")]) from error
    plan = next(item for item in result.executorch_program.execution_plan if item.name == "forward")
    operators = {f"{item.name}.{item.overload}" if item.overload else item.name for item in plan.operators}
    missing = sorted(operators - _kernels())
    if missing:
        raise _no_kernels(missing)
    delegates = [item.id for item in plan.delegates]
    assert set(delegates) <= {XNNPACK}
    return Lowered(result.buffer, len(delegates), tuple(sorted(operators)))


def _kernels() -> set[str]:
    from executorch.runtime import Runtime

    return set(Runtime.get().operator_registry.operator_names)


def _no_kernels(names: list[str]) -> TargetError:
    return TargetError(
        f"ExecuTorch has no kernel for {len(names)} operator(s) of this model",
        where=", ".join(names),
        remedy="choose another target (optc targets), or rewrite them in a pass",
    )
