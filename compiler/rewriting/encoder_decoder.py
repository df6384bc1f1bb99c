"""Encoder and decoder in the three graphs that transformers' `generate` calls.

The encoder's states; the first call of a decoder, which makes keys and values of cross-attention of the states; and the
decoder's later calls, which is the decoder's program as it is. Nothing is computed anew: both programs are replayed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import Node

from optc.compiler.diagnostics import CaptureError
from optc.compiler.ir.contract import CACHE_ROLES, Input
from optc.compiler.ir.cross_inputs import cross_inputs, decoder_inputs
from optc.compiler.ir.devices import program_device
from optc.compiler.ir.export import run_export
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import drop_dead, keep_outputs
from optc.compiler.rewriting.retrace import NamedForward, Replay, axis_limit

_SIZE = torch.ops.aten.sym_size.int
_SHARED = {2: (0, 1), 3: (0,)}
"""Rank of a source -> its axes that are the states' too: of token ids all, of features the batch."""
_SIZES = {"batch": 2, "source": 11, "seq": 7}


def states_alone(encoder: Program) -> Program:
    """The encoder's program without keys and values of cross-attention."""
    return keep_outputs(encoder, 1)


def first_call(encoder: Program, decoder: Program) -> Program:
    """(ids, encoder's mask, encoder's states) -> logits, caches of the decoder, and keys and values that it reads.

    Args:
        encoder, decoder: of the same stage.

    Raises:
        CaptureError: the encoder makes keys and values of more than its states.
    """
    both = torch.nn.Module()
    both.add_module("encoder", encoder.module())
    both.add_module("decoder", decoder.module())
    tail = _AfterStates(encoder)
    inputs = _inputs(encoder, decoder)
    own = [spec for spec in decoder.contract.inputs if spec.role in CACHE_ROLES]
    has_mask = decoder.contract.input_index("encoder_mask") is not None

    def forward(ids: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        states, masks = rest[-1], rest[:-1]
        cross = tail.outputs_of(states, masks)
        empty = [states.new_zeros((ids.shape[0], int(s.dims[1]), 0, int(s.dims[3]))) for s in own]
        found = Replay(decoder, {}).outputs(*decoder_inputs(decoder.contract.inputs, ids, masks, empty, cross))
        return *found, *(item.clone() for item in cross)

    assert has_mask or len(inputs) == 2
    args, shapes = _examples(encoder, decoder, inputs)
    with torch.fx.traceback.preserve_node_meta():
        exported = run_export(
            NamedForward(both, forward, [spec.name for spec in inputs]), args, shapes, where="the decoder's first call"
        )
    _rename(exported)
    contract = decoder.with_contract(
        inputs=inputs,
        outputs=(*decoder.contract.outputs, *encoder.contract.outputs[1:]),
        quantization={},
        layers=(),
        cross=None,
    ).contract
    result = Program(exported, contract, work_file=decoder.work_file)
    drop_dead(result)
    return result.changed()


class _AfterStates(Replay):
    """The part of an encoder's program behind its states."""

    def __init__(self, encoder: Program) -> None:
        super().__init__(encoder, {})
        graph = encoder.module().graph
        states, *rest = graph.output_node().args[0]
        self._states: Node = states
        self._needed = _ancestors(rest, states)
        self._given: Tensor | None = None
        source = next(node for node in graph.nodes if node.op == "placeholder")
        for user in set(source.users) & self._needed:
            if user.target is not _SIZE or user.args[1] not in _SHARED[len(source.meta["val"].shape)]:
                raise CaptureError(
                    "keys and values of cross-attention depend on more than the encoder's states",
                    where=user.name,
                    remedy="please report this with the model's config.json",
                )

    def outputs_of(self, states: Tensor, masks: tuple[Tensor, ...]) -> list[Tensor]:
        """Keys and values of each layer."""
        self._given = states
        source = states  # of which needed nodes read sizes alone
        return self.outputs(source, *masks)[1:]

    def run_node(self, n: Node) -> Any:
        if n is self._states:
            return self._given
        return super().run_node(n) if n.op in ("placeholder", "output") or n in self._needed else None


def _ancestors(nodes: list[Node], stop: Node) -> set[Node]:
    found, pending = set[Node](), list(nodes)
    while pending:
        node = pending.pop()
        if node is not stop and node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _inputs(encoder: Program, decoder: Program) -> tuple[Input, ...]:
    states = encoder.graph.output_node().args[0][0].meta["val"]
    length = cross_inputs(decoder.contract)[0].dims[2]
    kept = tuple(spec for spec in decoder.contract.inputs if spec.role in ("input_ids", "encoder_mask"))
    dtype = str(states.dtype).removeprefix("torch.")
    return *kept, Input(
        name="encoder_hidden_states",
        role="encoder_states",
        dtype=dtype,
        dims=("batch", length, int(states.shape[2])),
    )


def _examples(
    encoder: Program, decoder: Program, inputs: tuple[Input, ...]
) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """Inputs, and their dynamic axes with the ranges that these have in the programs."""
    dims: dict[str, Any] = {}
    for program in (encoder, decoder):
        for node, spec in zip(program.user_inputs(), program.contract.inputs, strict=True):
            for axis, name in enumerate(spec.dims):
                if isinstance(name, str) and name in _SIZES and name not in dims:
                    dims[name] = Dim(name, min=1, max=axis_limit(node, program, axis))
    args, shapes = [], []
    for spec in inputs:
        sizes = [size if isinstance(size, int) else min(_SIZES[size], dims[size].max) for size in spec.dims]
        args.append(torch.ones(sizes, dtype=getattr(torch, spec.dtype), device=program_device(decoder)))
        shapes.append({axis: dims[name] for axis, name in enumerate(spec.dims) if isinstance(name, str)})
    return tuple(args), tuple(shapes)


def _rename(exported: ExportedProgram) -> None:
    """Give weights the names that they have in the two programs; of a name that both have, the encoder's keeps its prefix."""
    taken = {name.removeprefix("decoder.") for name in exported.state_dict if name.startswith("decoder.")}

    def plain(name: str) -> str:
        side, _, rest = name.partition(".")
        return rest if side == "decoder" or (side == "encoder" and rest not in taken) else name

    for table in (exported.state_dict, exported.constants):
        items = [(plain(name), value) for name, value in table.items()]
        table.clear()
        table.update(items)
    for spec in exported.graph_signature.input_specs:
        if spec.target is not None:
            spec.target = plain(spec.target)
