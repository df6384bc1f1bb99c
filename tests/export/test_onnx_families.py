"""Quantized models and head sizes without a kernel, exported, in ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import bounds
import numpy as np
import onnx
import onnxruntime
import ort_driver
import pytest
import torch
from families import FAMILIES
from ort_driver import schedules
from stages import captured, full_logits, sequences
from torch import Tensor, nn

from optc.compiler.capture import capture_model, capture_module
from optc.compiler.ir.program import Program
from optc.compiler.ops.packed.onnxruntime import unpack_nbits
from optc.compiler.ops.packed.rounded_inputs import round_activations
from optc.compiler.rewriting.passes import PassContext
from optc.compiler.rewriting.retrace import Replay
from optc.passes.quantization.round_scales import RoundScales
from optc.passes.quantization.rtn import QuantizeRtn

LINEAR = torch.ops.aten.linear.default
_LENGTHS = (21, 9, 14, 5)


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(256, 384), nn.Linear(384, 40, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.up(x)))


def _stored(program: Program) -> Program:
    """With scales as 16 bits hold them."""
    return RoundScales(strict=False).run(program, PassContext()).program


def _quantized_mlp(
    bits: int, group: int, symmetric: bool, level: int, folder: Path
) -> tuple[Program, Tensor, Tensor, Tensor]:
    """The legalized program; outputs of the canonical one, without and with inputs of linears rounded to int8 in
    groups; and those of ONNX Runtime."""
    program = capture_module(_Mlp(), [torch.randn(3, 256)], dynamic={"input_0": {0: "batch"}})
    options = {"bits": bits, "group_size": group, "symmetric": symmetric}
    canonical = _stored(QuantizeRtn(**options, head=True, signed=True).run(program, PassContext()).program)
    x = torch.randn(17, 256, generator=torch.Generator().manual_seed(1))
    after, _ = ort_driver.compiled(program, folder, quant="rtn", accuracy_level=level, **options)
    found = ort_driver.run(ort_driver.open_session(folder), x)[0]
    rounding = {LINEAR: lambda args, _: nn.functional.linear(round_activations(args[0], group), *args[1:])}
    return after, canonical(x), Replay(canonical, rounding).outputs(x)[0], found


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_quantized_module(bits: int, group: int, symmetric: bool, tmp_path: Path) -> None:
    """Without rounding of activations the kernel computes what Q/DQ says; with it, nearly."""
    after, expected, _, found = _quantized_mlp(bits, group, symmetric, 0, tmp_path / "exact")
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-5
    packed = after.weight("up.weight_packed")
    assert packed.shape == (384, 256 // group, group * bits // 8)
    assert int(unpack_nbits(packed, bits, group).max()) <= 2**bits - 1
    _, expected, rounded, found = _quantized_mlp(bits, group, symmetric, 4, tmp_path / "fast")
    rounding = bounds.gap([rounded], [expected])
    assert bounds.check([found], [expected], rounding).rms > rounding.rms / bounds.MARGIN


def test_a_quantized_decoder(tmp_path: Path) -> None:
    """4 bits, zero points: every schedule of ONNX Runtime within 1e-4 of the whole quantized sequence in eager mode."""
    options = {"bits": 4, "group_size": 32, "symmetric": False}
    program, result = ort_driver.compiled(
        captured("llama"), tmp_path, quant="rtn", accuracy_level=0, head_bits=32, **options
    )
    assert result.info["operators"]["MatMulNBits"] == 8
    canonical = _stored(QuantizeRtn(**options).run(captured("llama"), PassContext()).program)
    rows = sequences(*_LENGTHS)
    expected = [full_logits(canonical, row) for row in rows]
    scale = max(float(row.abs().max()) for row in expected)
    session = ort_driver.open_session(tmp_path)
    for way, logits in schedules(session, program.contract, rows).items():
        worst = max(float((got - want).abs().max()) for got, want in zip(logits, expected, strict=True))
        assert worst <= 1e-4 * max(1.0, scale), f"{way}: {worst:.2e}"


def test_the_head_is_multiplied_with_the_last_token(tmp_path: Path) -> None:
    """What a runtime gets that does not know of `logits_from_end`; ragged rows have each their own last token."""
    program, _ = ort_driver.compiled(captured("llama"), tmp_path)
    assert [spec.role for spec in program.contract.inputs][-1] == "logits_from_end"
    session = ort_driver.open_session(tmp_path)
    assert "logits_from_end" not in [item.name for item in session.get_inputs()]
    assert session.get_outputs()[0].shape == ["batch_size", 1, 128]
    rows = sequences(9, 4)
    ids = torch.tensor([rows[0], [*rows[1], *[0] * 5]])
    mask = (torch.arange(9) < torch.tensor([[9], [4]])).long()
    caches = {
        item.name: np.zeros((2, *(0 if isinstance(size, str) else size for size in item.shape[1:])), np.float32)
        for item in session.get_inputs()[2:]
    }
    (found,) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), **caches})
    assert found.shape == (2, 1, 128)
    for logits, row in zip(torch.from_numpy(found), rows, strict=True):
        expected = full_logits(captured("llama"), row)[-1]
        assert float((logits[0] - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_rotary_tables_are_made_when_the_model_is_loaded(tmp_path: Path) -> None:
    """Once, not in every step; right at the last of many positions too, whose angles are large."""
    cls, config_cls, usual = FAMILIES["llama"]
    positions = 1 << 17
    model = cls(config_cls(**{**usual, "max_position_embeddings": positions})).eval().requires_grad_(False)
    program, result = ort_driver.compiled(capture_model(model), tmp_path)
    assert result.weight_bytes < 4 * positions  # a table would be 8 times as large
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 4, str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    assert not {"Range", "Cos", "Sin"} & {node.op_type for node in graph.node}
    layers = {"MatMul", "GroupQueryAttention", "SkipSimplifiedLayerNormalization", "Split", "QuickGelu", "Mul"}
    ends = {"Gather", "RMSNormalization", "FusedMatMul"}
    around = Counter(node.op_type for node in graph.node if node.op_type not in layers | ends)
    lengths, last_row = {"ReduceSum": 1, "Sub": 1, "Shape": 1, "Cast": 2}, {"Shape": 1, "Min": 1, "Sub": 1, "Max": 1}
    assert around == Counter(lengths) + Counter(last_row) + Counter({"Unsqueeze": 2, "GatherND": 1})
    tables = {item.name: item for item in graph.initializer if list(item.dims) == [positions, 8]}
    names = next(node.input[7:9] for node in graph.node if node.op_type == "GroupQueryAttention")
    (frequencies,) = (tensor for name, tensor in program.weights() if "rotary_emb" in name)
    angle = (torch.arange(positions).float()[:, None] * frequencies).double()
    for name, expected in zip(names, (angle.cos(), angle.sin()), strict=True):
        found = torch.from_numpy(onnx.numpy_helper.to_array(tables[name]).copy())
        assert float((found - expected).abs().max()) <= 1e-6


@pytest.mark.parametrize(
    ("name", "sizes", "operators"),
    [
        ("llama", {"head_dim": 12}, {"TensorScatter": 4, "RotaryEmbedding": 4}),  # no kernel for such heads
        (
            "llama",
            {"head_dim": 8},
            {"GroupQueryAttention": 2, "RotaryEmbedding": 4},
        ),  # which cannot rotate such
        ("phi", {"hidden_size": 128}, {"GroupQueryAttention": 2}),  # which rotates half of each head
        ("gpt2", {"n_embd": 48}, {"TensorScatter": 4}),
    ],
    ids=["llama-12", "llama-8", "phi-32", "gpt2-12"],
)
def test_other_head_sizes(name: str, sizes: dict[str, int], operators: dict[str, int], tmp_path: Path) -> None:
    cls, config_cls, usual = FAMILIES[name]
    torch.manual_seed(0)
    model = cls(config_cls(**{**usual, **sizes})).eval().requires_grad_(False)
    program, result = ort_driver.compiled(capture_model(model), tmp_path)
    kinds = ("TensorScatter", "GroupQueryAttention", "RotaryEmbedding")
    assert {kind: n for kind, n in result.info["operators"].items() if kind in kinds} == operators
    rows = sequences(*_LENGTHS)
    with torch.no_grad():
        expected = [model(torch.tensor([row])).logits[0] for row in rows]
    session = ort_driver.open_session(tmp_path)
    for way, logits in schedules(session, program.contract, rows).items():
        worst = max(float((got - want).abs().max()) for got, want in zip(logits, expected, strict=True))
        assert worst <= 1e-5, f"{way}: {worst:.2e}"
