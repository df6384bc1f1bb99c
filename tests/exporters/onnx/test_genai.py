"""What genai_config.json cannot say is noticed."""

from __future__ import annotations

import msgspec
from artifacts import make_manifest

from optc.exporters.onnx.genai import differing_layers


def test_layers_that_differ_are_named() -> None:
    contract = make_manifest().contract
    (layer,) = contract.layers
    assert differing_layers(contract) == ""
    assert differing_layers(msgspec.structs.replace(contract, layers=(layer, layer))) == ""
    wide = msgspec.structs.replace(layer, head_dim=16)
    text = differing_layers(msgspec.structs.replace(contract, layers=(wide, layer)))
    assert text == "layers differ in KV heads and head sizes, 2 of 8, 2 of 16"
