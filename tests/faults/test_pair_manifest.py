"""Manifests of encoder-decoder artifacts that were sealed again: what no exporter writes is refused before an engine opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from artifacts import make_manifest

from optc.compiler.artifact.manifest import Manifest, ProgramEntry, decode, encode
from optc.compiler.diagnostics import ArtifactError
from optc.compiler.ir.contract import Contract, CrossFacts, Input, KVCache, Output

ENCODER = Contract(
    kind="encoder",
    inputs=tuple(
        Input(name=name, role=name, dtype="int64", dims=("batch", "source"))  # type: ignore[arg-type]
        for name in ("input_ids", "attention_mask")
    ),
    outputs=(Output(name="states", role="hidden"),),
)


def _cache(name: str, role: Any, length: str) -> Input:
    return Input(name=name, role=role, dtype="float32", dims=("batch", 2, length, 8))


IDS = Input(name="input_ids", role="input_ids", dtype="int64", dims=("batch", "seq"))
MASK = Input(name="mask", role="encoder_mask", dtype="int64", dims=("batch", "source"))
OWN = (_cache("k", "key_cache", "past"), _cache("v", "value_cache", "past"))
CROSS = (_cache("ck", "cross_keys", "source"), _cache("cv", "cross_values", "source"))
LOGITS = Output(name="logits", role="logits")
PRESENT = (Output(name="pk", role="key_cache"), Output(name="pv", role="value_cache"))


def manifest(encoder: dict[str, Any] | None = None, files: dict[str, str] | None = None, **changes: Any) -> Manifest:
    made = make_manifest()
    decoder = Contract(
        kind="decoder",
        inputs=(IDS, MASK, *OWN, *CROSS),
        outputs=(LOGITS, *PRESENT),
        kv_cache=KVCache(kind="linear"),
        cross=CrossFacts(start_token_id=0),
        model=msgspec.structs.replace(made.contract.model, vocab_size=32),
    )
    names = {"model": "later.onnx", "first": "first.onnx", "encoder": "encoder.onnx"} if files is None else files
    own = {key: name for key, name in names.items() if key != "encoder"}
    programs = {
        "model": ProgramEntry(contract=msgspec.structs.replace(decoder, **changes), engine_info=own),
        "encoder": ProgramEntry(
            contract=msgspec.structs.replace(ENCODER, **(encoder or {})),
            engine_info={"model": names["encoder"]} if "encoder" in names else {},
        ),
    }
    return msgspec.structs.replace(made, programs=programs)


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "no first graph": ({"files": {"model": "a", "encoder": "e"}}, "three graphs"),
    "no graph of the encoder": ({"files": {"model": "a", "first": "b"}}, "three graphs"),
    "no logits": ({"outputs": PRESENT}, "one output of logits"),
    "two outputs of logits": ({"outputs": (LOGITS, *PRESENT, LOGITS)}, "one output of logits"),
    "two masks": ({"inputs": (IDS, MASK, msgspec.structs.replace(MASK, name="n"), *OWN, *CROSS)}, "one mask"),
    "keys without values": ({"inputs": (IDS, MASK, *OWN, CROSS[0])}, "as many keys as values"),
    "a cache that never comes out": ({"outputs": (LOGITS,)}, "as many caches in as out"),
    "nothing of the encoder": ({"inputs": (IDS, MASK, *OWN)}, "cross-attention"),
    "one name twice": ({"inputs": (IDS, MASK, *OWN, CROSS[0], msgspec.structs.replace(CROSS[1], name="ck"))}, "a name"),
    "no vocabulary": ({"model": make_manifest().contract.model.__class__()}, "a vocabulary"),
    "a start beyond it": ({"cross": CrossFacts(start_token_id=32)}, "a first token"),
    "a forced token beyond it": ({"cross": CrossFacts(start_token_id=0, forced_first_id=1 << 40)}, "a first token"),
    "an encoder without inputs": ({"encoder": {"inputs": ()}}, "an encoder of texts"),
    "an encoder without outputs": ({"encoder": {"outputs": ()}}, "states of the encoder"),
    "no decoder of an encoder": ({"cross": None}, "come together"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from optc.runtime.sessions.ort_encoder_decoder import OrtEncoderDecoderSession

    changes, why = CASES[case]
    data = encode(manifest(**changes))
    with pytest.raises(ArtifactError, match=why) as caught:
        OrtEncoderDecoderSession(tmp_path, decode(data, "manifest.json"), threads=1)
    assert caught.value.where
    assert caught.value.remedy
