"""Program: an executable graph and its contract."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind
from torch.fx import GraphModule, Node

import optc.compiler.ops  # noqa: F401  (registers the dialect)
from optc.compiler.ir.contract import Contract
from optc.compiler.ir.late_code import late_code
from optc.compiler.ir.lazy_operators import pieces
from optc.compiler.ir.lazy_weights import LazyWeight, materialized
from optc.compiler.ir.proof import CaptureProof
from optc.compiler.ir.stored_weights import WorkFile, raw_bytes
from optc.compiler.ir.verification import VerificationError, verify_program
from optc.compiler.ir.weight_table import WeightTable
from optc.compiler.notebook import html_table
from optc.compiler.settings.fields import check_type


def _copy_signature(signature: ExportGraphSignature) -> ExportGraphSignature:
    """A signature whose specs and arguments can be edited without touching the original."""

    def copied(specs: list[Any]) -> list[Any]:
        return [dataclasses.replace(spec, arg=copy.copy(spec.arg)) for spec in specs]

    return ExportGraphSignature(copied(signature.input_specs), copied(signature.output_specs))


class Program:
    """A `torch.export.ExportedProgram` and its `Contract`; callable, printable, savable.

    A pass returns a new Program, or edits the one it got from `clone()`: tensors are shared between
    clones, graphs are not.

    Attributes:
        work_file: where large tensors that passes make are kept; None keeps them in memory.
    """

    def __init__(
        self,
        exported: ExportedProgram,
        contract: Contract,
        *,
        weight_table: WeightTable | None = None,
        work_file: WorkFile | None = None,
    ) -> None:
        self.exported = exported
        self.contract = contract
        self.weight_table = weight_table or WeightTable(exported)
        self.work_file = work_file
        self.proof: CaptureProof | None = None  # of the program as captured; passes make other programs
        self._module: GraphModule | None = None

    def __repr__(self) -> str:
        """A line: what it is, its size, and the passes that it came through; `format_program` prints all of it."""
        calls = sum(node.op == "call_function" for node in self.graph.nodes)
        weights = list(self.weights())
        size = sum(tensor.numel() * tensor.element_size() for _, tensor in weights)
        contract, model = self.contract, self.contract.model
        kind = f"{contract.kind} {model.architecture or model.model_type}".rstrip()
        passes = ", ".join(contract.passes) or "none"
        return f"Program({kind}, {calls} calls, {len(weights)} weights of {size / 1e6:.2f} MB, passes: {passes})"

    def _repr_html_(self) -> str:
        """The line, and the commonest operators."""
        counts = Counter(str(node.target) for node in self.graph.nodes if node.op == "call_function")
        return html_table(repr(self), ("operator", "calls"), counts.most_common(10))

    def __call__(self, *args: Any) -> Any:
        """Run the graph on user inputs, in the order of `contract.inputs`.

        List inputs (KV caches) are passed flat.
        """
        with torch.no_grad():
            return self.module()(*args)

    @property
    def graph(self) -> torch.fx.Graph:
        return self.exported.graph

    def module(self) -> GraphModule:
        """The graph with weights attached, without shape guards; built once."""
        if self._module is None:
            with late_code():
                self._module = self.exported.module(check_guards=False)
        return self._module

    def changed(self) -> Program:
        """Tell that the graph was edited: recompiles, validates, forgets the built module."""
        self.exported.graph.lint()
        with late_code():
            self.exported.graph_module.recompile()
        self.exported.validate()
        self._module = None
        return self

    def clone(self) -> Program:
        """A Program with its own graph and signature, sharing tensors with this one."""
        source = self.exported
        graph = torch.fx.Graph()
        values: dict[Node, Node] = {}
        result = graph.graph_copy(source.graph, values)
        for old, new in values.items():
            new.name = old.name  # names such as "input" are not kept by themselves; the signature needs them
        output = graph.output(result)
        output.meta = dict(source.graph.output_node().meta)
        with late_code():
            exported = ExportedProgram(
                root=source.graph_module,
                graph=graph,
                graph_signature=_copy_signature(source.graph_signature),
                state_dict=dict(source.state_dict),
                range_constraints=dict(source.range_constraints),
                module_call_graph=list(source.module_call_graph),
                example_inputs=source.example_inputs,
                constants=dict(source.constants),
                verifiers=[source.verifier],
            )
        return Program(exported, self.contract, work_file=self.work_file)

    def with_contract(self, **changes: Any) -> Program:
        """The same graph under a contract with some fields replaced."""
        contract = msgspec.structs.replace(self.contract, **changes)
        program = Program(self.exported, contract, weight_table=self.weight_table, work_file=self.work_file)
        program._module = self._module
        return program

    # -- weights ----------------------------------------------------------------------------

    def weight_names(self) -> Mapping[str, str]:
        """Placeholder name -> weight name, for parameters, buffers and lifted constants."""
        return self.weight_table.names

    def weight(self, name: str) -> torch.Tensor:
        """The tensor of a weight name (parameter, buffer or lifted constant).

        It may be lazy (see `ir/lazy_weights`): operators read it each time, shape and type cost nothing; who computes
        with it several times, or needs its memory, takes `materialized(program.weight(name))`.
        """
        found = self.exported.state_dict.get(name)
        tensor = self.exported.constants[name] if found is None else found
        assert isinstance(tensor, torch.Tensor), name
        return tensor

    def weight_of(self, node: object) -> str | None:
        """The weight name that a placeholder node stands for, or None."""
        if not isinstance(node, Node) or node.op != "placeholder":
            return None
        return self.weight_table.names.get(node.name)

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as this program keeps it: in its work file, where it has one and the tensor is large."""
        return tensor if self.work_file is None else self.work_file.store(tensor)

    def in_memory(self) -> Program:
        """The same program with every weight in memory; for engines and libraries that take nothing else."""
        if not any(isinstance(tensor, LazyWeight) for _, tensor in self.weights()):
            return self
        program = self.clone()
        program.work_file = None
        read: dict[int, Any] = {}
        for table in (program.exported.state_dict, program.exported.constants):
            for name, value in table.items():
                if isinstance(value, LazyWeight):
                    if id(value.recipe) not in read:
                        read[id(value.recipe)] = materialized(value)
                    tensor = read[id(value.recipe)]
                    is_parameter = isinstance(value, torch.nn.Parameter)
                    table[name] = torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        return program

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight the graph reads, once each, in placeholder order."""
        for name in dict.fromkeys(self.weight_names().values()):
            yield name, self.weight(name)

    def save(self, directory: str | Path, *, examples: bool = True) -> None:
        """Write graph, contract and weights into a folder, without pickle; see `ir/saved/programs`.

        Args:
            examples: with the example inputs, which rewrites that trace the program again start from.
        """
        check_type("directory", directory, str | Path, "a path")
        from optc.compiler.ir.saved.programs import write_program

        write_program(self.exported, self.contract, Path(directory), examples=examples)

    @staticmethod
    def load(directory: str | Path) -> Program:
        """Read a Program back; the files are treated as hostile.

        Raises:
            ArtifactError: damaged or not trusted (7).
        """
        check_type("directory", directory, str | Path, "a path")
        from optc.compiler.ir.saved.programs import GRAPH_FILE, damaged, read_program

        program = Program(*read_program(Path(directory)))
        try:
            verify_program(program, "load")
        except VerificationError as error:
            damaged(Path(directory) / GRAPH_FILE, error.where or error.what, error)
        return program

    def fingerprint(self) -> str:
        """sha256 over graph text, contract and weight bytes: equal Programs compute equal numbers."""
        digest = hashlib.sha256()
        digest.update(str(self.graph).encode())
        digest.update(msgspec.json.encode(self.contract, order="sorted"))
        for name, tensor in self.weights():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            for piece in pieces(tensor):
                digest.update(raw_bytes(piece.cpu()))
        return digest.hexdigest()

    def user_inputs(self) -> list[Node]:
        """Placeholders of the user inputs, in call order."""
        names = [
            spec.arg.name for spec in self.exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT
        ]
        by_name = {node.name: node for node in self.graph.nodes if node.op == "placeholder"}
        return [by_name[name] for name in names]

    def calls(self, *targets: object) -> list[Node]:
        """The call_function nodes with one of these targets, in graph order."""
        return [node for node in self.graph.nodes if node.op == "call_function" and node.target in targets]
