"""Session over the three ONNX graphs of an encoder-decoder model, in ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from optc.compiler.artifact.manifest import Manifest
from optc.compiler.diagnostics import ArtifactError
from optc.compiler.ir.contract import CACHE_ROLES, CROSS_ROLES, Contract
from optc.runtime.sessions.encoder_decoder import Array, EncoderDecoderSession
from optc.runtime.sessions.ort import open_engine, run_engine
from optc.runtime.sessions.session import Logits, default_threads, other_graph


class OrtEncoderDecoderSession(EncoderDecoderSession):
    """`encoder_model.onnx`, then `decoder_model.onnx` once, then `decoder_with_past_model.onnx` for each call.

    Args:
        folder: of the graphs; the caller has verified them and their external data.
        threads: of one operator; None takes one per physical core that this process may use.

    Raises:
        TargetError: this ONNX Runtime cannot run the graphs. ArtifactError: the manifest describes others.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, threads: int | None = None) -> None:
        super().__init__(manifest)
        threads = threads or default_threads()
        infos = (manifest.programs["encoder"].engine_info, manifest.engine_info, manifest.engine_info)
        paths = [info.get(key) for info, key in zip(infos, ("model", "first", "model"), strict=True)]
        if not all(paths):
            raise ArtifactError(
                "the manifest does not name the three graphs of an encoder-decoder model",
                where=str(folder),
                why=f"it names {paths!a}",
                remedy="copy the artifact again from where it was made, or compile it again",
            )
        self._graphs = [open_engine(folder / str(path), threads) for path in paths]
        self._names = _Names(manifest.contract)
        _check_names(self._graphs, self._names, self.encoder, folder)
        self._read: dict[str, Array] = {}
        """What the first call reads of the encoder, later what all others read."""
        self._caches: dict[str, Array] = {}

    def _encode(self, inputs: Sequence[Array]) -> None:
        specs = self.encoder.inputs
        feed = {spec.name: array for spec, array in zip(specs, inputs, strict=True)}
        (states,) = run_engine(self._graphs[0], [self.encoder.outputs[0].name], feed)
        self._read = {"encoder_hidden_states": states}
        if self._names.mask is not None:
            mask = next(array for spec, array in zip(specs, inputs, strict=True) if spec.role == "attention_mask")
            self._read[self._names.mask] = mask
        self._caches = {}

    def _feed(self, ids: Array) -> Logits:
        names, first = self._names, not self._caches
        graph = self._graphs[1 if first else 2]
        asked = [names.logits, *names.present, *(names.made if first else ())]
        logits, *found = run_engine(graph, asked, {names.ids: ids, **self._read, **self._caches})
        self._caches = dict(zip(names.past, found, strict=False))
        if first:
            del self._read["encoder_hidden_states"]
            self._read |= dict(zip(names.read, found[len(names.past) :], strict=True))
        return np.asarray(logits, np.float32)

    def _cut(self, length: int) -> None:
        self._caches = {name: np.ascontiguousarray(item[:, :, :length]) for name, item in self._caches.items()}

    def _take(self, rows: Sequence[int], *, read: bool) -> None:
        index = np.array(rows, np.int64)
        self._caches = {name: item[index] for name, item in self._caches.items()}
        if read:
            self._read = {name: item[index] for name, item in self._read.items()}

    def close(self) -> None:
        """Drop caches and graphs."""
        self._graphs, self._read, self._caches = [], {}, {}


class _Names:
    """Inputs and outputs of the decoder's graphs, by their roles."""

    def __init__(self, contract: Contract) -> None:
        def named(*roles: str) -> list[str]:
            return [spec.name for spec in contract.inputs if spec.role in roles]

        self.ids = named("input_ids")[0]
        self.mask = next(iter(named("encoder_mask")), None)
        self.past, self.read = named(*CACHE_ROLES), named(*CROSS_ROLES)
        self.made = [name.replace("past_key_values", "present") for name in self.read]
        self.present = [spec.name for spec in contract.outputs if spec.role in CACHE_ROLES]
        self.logits = next(spec.name for spec in contract.outputs if spec.role == "logits")


def _check_names(graphs: Sequence[object], names: _Names, encoder: Contract, folder: Path) -> None:
    """Refuse graphs that lack what the manifest names.

    Raises:
        ArtifactError: names the first input or output.
    """
    mask = [] if names.mask is None else [names.mask]
    wanted = [
        ([spec.name for spec in encoder.inputs], [encoder.outputs[0].name]),
        ([names.ids, *mask, "encoder_hidden_states"], [names.logits, *names.present, *names.made]),
        ([names.ids, *mask, *names.past, *names.read], [names.logits, *names.present]),
    ]
    for graph, (inputs, outputs) in zip(graphs, wanted, strict=True):
        taken = {item.name for item in graph.get_inputs()}  # type: ignore[attr-defined]
        given = {item.name for item in graph.get_outputs()}  # type: ignore[attr-defined]
        missing = sorted({*inputs} - taken) + sorted({*outputs} - given)
        if missing:
            raise other_graph(folder, f"a graph has no '{missing[0][:80]}'")
