"""Which placeholder of a graph stands for which weight: looked up once, and kept right while weights come and go.

A pass asks for the weight of a node once per site and adds weights as it goes; a table that is made anew for each
question makes it quadratic in the number of weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node

WEIGHT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_BEFORE_A_BUFFER = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.TOKEN)


class WeightTable:
    """The weights of one exported program. Programs that share the exported program share its table.

    The input specs of a signature are edited through this class alone.
    """

    def __init__(self, exported: ExportedProgram) -> None:
        self._exported = exported
        self._names: dict[str, str] | None = None
        self._last: Node | None = None
        """The placeholder behind which a new buffer goes, once one was added."""

    @property
    def names(self) -> Mapping[str, str]:
        """Placeholder name -> weight name, for parameters, buffers and lifted constants."""
        return MappingProxyType(self._table())

    def _table(self) -> dict[str, str]:
        if self._names is None:
            specs = self._exported.graph_signature.input_specs
            self._names = {spec.arg.name: spec.target or "" for spec in specs if spec.kind in WEIGHT_KINDS}
        return self._names

    def add_buffer(self, placeholder: str, name: str) -> Node:
        """A new placeholder for a persistent buffer, behind the last one.

        That keeps the order that torch.export demands: parameters, buffers, constants, user inputs.
        """
        table, graph = self._table(), self._exported.graph
        specs = self._exported.graph_signature.input_specs
        index = len(specs)
        while index and specs[index - 1].kind not in _BEFORE_A_BUFFER:
            index -= 1
        if self._last is None and index:
            last = specs[index - 1].arg.name
            self._last = next(node for node in graph.nodes if node.name == last)
        if self._last is not None:
            with graph.inserting_after(self._last):
                node: Node = graph.placeholder(placeholder)
        else:
            with graph.inserting_before(next(iter(graph.nodes))):
                node = graph.placeholder(placeholder)
        specs.insert(index, InputSpec(InputKind.BUFFER, TensorArgument(node.name), name, True))
        table[node.name] = name
        self._last = node
        return node

    def drop(self, placeholders: Collection[Node]) -> None:
        """Forget weights and erase their placeholders, which nothing reads."""
        gone = {node.name for node in placeholders}
        for node in placeholders:
            self._exported.graph.erase_node(node)
        specs = self._exported.graph_signature.input_specs
        specs[:] = [spec for spec in specs if spec.kind not in WEIGHT_KINDS or spec.arg.name not in gone]
        self._names = None
        self._last = None
