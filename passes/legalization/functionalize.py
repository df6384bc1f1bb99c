"""x.op_(...), x[...] = y  ->  op(x, ...), a new tensor that later reads take

Engines of graphs know values, no memory. A call that writes where others look (a view, an input, a constant) becomes a
call that returns what would have been written, and whoever looked there reads that: torch's functionalization.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.export.graph_signature import OutputKind
from torch.fx import Node

from optc.compiler.ir.export import functional_export
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import drop_dead
from optc.compiler.rewriting.in_place import without_writing
from optc.compiler.rewriting.passes import Miss, Pass, PassContext, PassResult


@dataclass(frozen=True, kw_only=True)
class Functionalize(Pass):
    """x.op_(...), x[...] = y -> op(x, ...), a new tensor that later reads take

    Where the target can run every such call as it stands, there is nothing to do. A module that writes into its inputs
    gives the same outputs afterwards and leaves its inputs alone; one that writes into its buffers keeps a state, which
    no engine here has, and is left as it is.
    """

    name: ClassVar[str] = "functionalize"
    leaves_inputs: ClassVar[bool] = True

    def run(self, program: Program, context: PassContext) -> PassResult:
        edited = program.clone()
        sites = _sites(edited, context)
        if not sites:
            return PassResult(program, 0, 0)
        for node in sites:
            without_writing(edited, node)
        left = _sites(edited, context)
        drop_dead(edited)
        if not left:
            return PassResult(edited.changed(), len(sites), len(sites))
        return _without_memory(program, edited.changed(), len(sites))


def _sites(program: Program, context: PassContext) -> list[Node]:
    """The calls that write, and that the target cannot run as they stand."""
    found = [node for node in program.graph.nodes if _writes(node)]
    return found if context.obstacle is None else [node for node in found if context.obstacle(node) is not None]


def _without_memory(program: Program, edited: Program, count: int) -> PassResult:
    """The whole program through torch's functionalization."""
    exported = functional_export(edited.exported)
    if OutputKind.BUFFER_MUTATION in {spec.kind for spec in exported.graph_signature.output_specs}:
        return PassResult(program, 0, count, tuple(_stateful(exported.graph_signature.buffers_to_mutate)))
    result = Program(exported, program.contract, work_file=program.work_file)
    written = _drop_writes(result)
    notes = (f"the module writes into its inputs ({', '.join(written)}), the artifact does not",) if written else ()
    drop_dead(result)
    return PassResult(result.changed(), count, count, notes=notes)


def _writes(node: Node) -> bool:
    """Whether a call writes into one of its arguments; the dialect's own operators write into caches, which stay."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "aten" and target._schema.is_mutable


def _stateful(written: dict[str, str]) -> Iterable[Miss]:
    for name in dict.fromkeys(written.values()):
        yield Miss(
            name, "the module writes into this buffer, which its next call reads: the target's engine has no state"
        )


def _drop_writes(program: Program) -> list[str]:
    """Take the values that would be written into inputs from the outputs; the names of those inputs."""
    signature, output = program.exported.graph_signature, program.graph.output_node()
    specs = signature.output_specs
    written = [str(spec.target) for spec in specs if spec.kind is OutputKind.USER_INPUT_MUTATION]
    if written:
        kept = [index for index, spec in enumerate(specs) if spec.kind is not OutputKind.USER_INPUT_MUTATION]
        output.args = (tuple(output.args[0][index] for index in kept),)
        signature.output_specs[:] = [specs[index] for index in kept]
    return written
