"""Session over the two AOTInductor packages of an encoder-decoder model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from optc.compiler.artifact.manifest import Manifest
from optc.compiler.diagnostics import ArtifactError
from optc.compiler.ir.contract import CACHE_ROLES, Contract
from optc.compiler.ir.cross_inputs import cross_inputs, decoder_inputs, empty_cache
from optc.runtime.sessions.encoder_decoder import Array, EncoderDecoderSession
from optc.runtime.sessions.session import Logits

Run = Callable[..., list[Tensor]]


class PackageEncoderDecoderSession(EncoderDecoderSession):
    """The encoder's package makes keys and values of cross-attention, the decoder's takes them in every call.

    Args:
        encode, decode: the packages. contract: the decoder's, with the context that it was compiled for.

    Raises:
        ArtifactError: the contracts are not those of a pair.
    """

    def __init__(self, manifest: Manifest, encode: Run, decode: Run, contract: Contract) -> None:
        super().__init__(manifest.with_program(contract=contract))
        if len(cross_inputs(contract)) != len(self.encoder.outputs) - 1:
            raise ArtifactError(
                "the decoder does not read what the encoder gives",
                where="manifest.json",
                why=f"{len(self.encoder.outputs) - 1} tensors beside its states, {len(cross_inputs(contract))} are read",
                remedy="copy the artifact again from where it was made, or compile it again",
            )
        self._run_encoder, self._run_decoder, self._contract = encode, decode, contract
        self._masks: list[Tensor] = []
        self._read: list[Tensor] = []
        self._caches: list[Tensor] = []

    def _encode(self, inputs: Sequence[Array]) -> None:
        specs = self.encoder.inputs
        tensors = [
            torch.from_numpy(array).to(getattr(torch, spec.dtype)) for spec, array in zip(specs, inputs, strict=True)
        ]
        self._read = [item.contiguous() for item in self._run_encoder(*tensors)[1:]]
        self._masks = [item for spec, item in zip(specs, tensors, strict=True) if spec.role == "attention_mask"]
        own = [spec for spec in self._contract.inputs if spec.role in CACHE_ROLES]
        self._caches = [empty_cache(spec, len(tensors[0])) for spec in own]

    def _feed(self, ids: Array) -> Logits:
        inputs = decoder_inputs(self._contract.inputs, torch.from_numpy(ids), self._masks, self._caches, self._read)
        logits, *caches = self._run_decoder(*inputs)
        self._caches = [item.contiguous() for item in caches]
        found: Logits = logits.float().numpy()
        return found

    def _cut(self, length: int) -> None:
        self._caches = [item[:, :, :length].contiguous() for item in self._caches]

    def _take(self, rows: Sequence[int], *, read: bool) -> None:
        index = torch.tensor(rows)
        self._caches = [item[index] for item in self._caches]
        if read:
            self._read = [item[index] for item in self._read]
            self._masks = [item[index] for item in self._masks]

    def close(self) -> None:
        """Drop caches."""
        self._masks, self._read, self._caches = [], [], []
