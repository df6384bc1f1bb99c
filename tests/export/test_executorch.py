"""The executorch target: .pte files that ExecuTorch's own runtimes run, with the numbers of the program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import bounds
import numpy as np
import pytest
import torch
from artifacts import captured_folder, make_artifact, quick_artifact
from chosen import chosen
from families import make_model
from once import short_example
from stages import captured, sequences
from transformers import AutoModelForCausalLM

import optc
from optc.compiler.artifact.folder import read_manifest
from optc.compiler.capture import capture_module
from optc.compiler.diagnostics import GateError, InputError, TargetError
from optc.compiler.ir.contract import AttentionFacts, Contract, KVCache
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import PassContext, PassResult
from optc.passes.fusion.norm import FuseNorm
from optc.passes.legalization.executorch import LegalizeExecutorch
from optc.passes.legalization.xnnpack import PackXnnpack, _rows
from optc.passes.quantization.head import QuantizeHead
from optc.passes.quantization.rtn import QuantizeRtn
from optc.targets import find_target

pytest.importorskip("executorch")

PROMPT = [0, 493, 718, 435, 875, 360, 263, 1597, 14, 283]
CAPACITY = 160


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 2 with random weights: a sliding window, softcap, grouped heads, norms that add one."""
    place = tmp_path_factory.mktemp("executorch") / "artifact"
    return quick_artifact("executorch", captured("gemma2", 1), place, max_seq_len=CAPACITY)


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return optc.load(tiny)


def reference(name: str, row: list[int], layers: int) -> np.ndarray[Any, Any]:
    """Logits [len, V] of transformers."""
    with torch.no_grad():
        out = make_model(name, layers=layers)(torch.tensor([row])).logits[0]
    return np.asarray(out)


def test_logits_are_those_of_transformers(model: Any) -> None:
    """A prompt longer than one call takes, chunks, single tokens, a rewind."""
    (row,) = sequences(150)
    wanted = reference("gemma2", row, 1)
    session = model.session
    assert session.chunk == 128
    scored = np.concatenate(list(session.score(row)))
    assert np.abs(scored - wanted).max() < 1e-4 * max(1.0, np.abs(wanted).max())
    last = session.prefill([row[:140]])
    assert np.abs(last[0] - wanted[139]).max() < 1e-4 * max(1.0, np.abs(wanted).max())
    session.extend([row[140:147]])
    assert np.abs(session.decode([row[147]])[0] - wanted[147]).max() < 1e-4 * max(1.0, np.abs(wanted).max())
    session.rewind([20])
    assert np.abs(session.decode([row[20]])[0] - wanted[20]).max() < 1e-4 * max(1.0, np.abs(wanted).max())


def test_rows_of_a_batch_do_not_meet(model: Any) -> None:
    rows = sequences(9, 4)
    together = [item.tokens for item in model.generate_batch(rows, max_new_tokens=8, ignore_eos=True)]
    alone = [model.generate(row, max_new_tokens=8, ignore_eos=True).tokens for row in rows]
    assert together == alone
    assert [len(tokens) for tokens in together] == [8, 8]


def test_the_context_is_max_seq_len(model: Any) -> None:
    with pytest.raises(InputError, match=f"does not fit the context of {CAPACITY}"):
        model.session.prefill([[5] * (CAPACITY + 1)])
    found = model.generate([5] * (CAPACITY - 1), max_new_tokens=8, ignore_eos=True)
    assert (len(found.tokens), found.stop) == (2, "context")


def test_layers_are_one_piece_each(tiny: Path, model: Any) -> None:
    """A piece up to the caches of each layer, and what lies around: norms and rotations do not cut a layer."""
    info = model.manifest.engine_info
    layers = len(model.manifest.contract.layers)
    assert info["delegates"] <= layers + 3
    assert "aten::index_put_.default" in info["operators"] or "aten::index_put_" in info["operators"]
    assert not [name for name in info["operators"] if name.startswith(("aten::bmm", "aten::linear", "aten::mean"))]


def test_what_runners_ask_for(tiny: Path) -> None:
    """Names of executorch/extension/llm/runner/constants.h, read with ExecuTorch's runtime."""
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(tiny / "model.pte")
    constants = {name: program.load_method(name).execute(())[0] for name in program.method_names - {"forward"}}
    assert constants["get_max_seq_len"] == 128
    assert constants["get_max_context_len"] == CAPACITY
    assert constants["get_vocab_size"] == 128
    assert constants["use_kv_cache"] == 1
    assert constants["enable_dynamic_shape"] == 1


@pytest.mark.slow
def test_a_model_folder_gives_the_tokens_of_transformers(tmp_path: Path) -> None:
    place, folder = tmp_path / "artifact", short_example(layers=1)
    quick_artifact("executorch", captured_folder(folder), place, source=folder, max_seq_len=128)
    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([PROMPT])
    wanted = source.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
    found = optc.load(place).generate(PROMPT, max_new_tokens=64)
    assert found.tokens == wanted[0, len(PROMPT) :].tolist()
    assert _by_its_runner(place, "The old man looked at the sea, and") == found.text


def _by_its_runner(folder: Path, prompt: str) -> str:
    """ExecuTorch's C++ text runner, as phones run it, in a process of its own."""
    code = (
        "import sys; from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner\n"
        "runner, pieces = TextLLMRunner(sys.argv[1] + '/model.pte', sys.argv[1] + '/tokenizer.json'), []\n"
        "config = GenerationConfig(max_new_tokens=64, temperature=0.0, echo=False, num_bos=1)\n"
        "runner.generate(sys.argv[2], config, pieces.append)\n"
        "open(sys.argv[1] + '.text', 'w').write(''.join(pieces))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), prompt], check=True, capture_output=True)
    return Path(f"{folder}.text").read_text()


# -- 4 and 8 bits -----------------------------------------------------------------------------


def packed(bits: int, group_size: int, layers: int = 2, **options: Any) -> PassResult:
    """Tiny Llama, quantized and packed for XNNPACK."""
    quantized = QuantizeRtn(bits=bits, group_size=group_size, **options).run(captured("llama", layers), PassContext())
    return PackXnnpack(bits=bits).run(quantized.program, PassContext())


def with_head(program: Program) -> PassResult:
    """Linears in 4 bits, embedding and head in 8."""
    for rewrite in (QuantizeRtn(bits=4, group_size=32), QuantizeHead(bits=8, group_size=0)):
        program = rewrite.run(program, PassContext()).program
    return PackXnnpack(bits=4).run(program, PassContext())


@pytest.mark.parametrize(("name", "tables"), [("llama", 2), ("gemma", 1)])
def test_embedding_and_head_are_codes(name: str, tables: int) -> None:
    """A table that is tied has one tensor of codes; lookups give the very rows."""
    program = captured(name, 1)
    result = with_head(program)
    assert (result.matched, result.misses) == (9, ())
    signed = [weight for key, weight in result.program.weights() if key.endswith("_signed")]
    assert len([weight for weight in signed if int(weight.min()) < -8]) == tables  # the others have 4 bits
    (head,) = [node for node in result.program.calls(torch.ops.optc.linear_dynamic.default) if node.kwargs["bits"] == 8]
    assert head.kwargs["group_size"] == 0
    ids = torch.tensor([[3, 0, 7]])
    (lookup,) = result.program.calls(torch.ops.aten.embedding.default)
    codes, scale = (
        result.program.weight(str(result.program.weight_of(item))) for item in (lookup.args[0], head.args[2])
    )
    assert codes.dtype is torch.int8
    dense = QuantizeHead(bits=8, group_size=0).run(program, PassContext()).program
    (before,) = dense.calls(torch.ops.optc.dequantize.default)[:1]
    parts = [dense.weight(str(dense.weight_of(item))) for item in before.args[:2]]
    table = torch.ops.optc.dequantize(*parts, None, bits=8, group_size=0)
    own = _rows(codes, parts[1].reshape(-1), ids)
    assert torch.equal(own, table[ids])
    assert scale.dim() == 1


@pytest.mark.slow
def test_xnnpack_multiplies_our_codes(tmp_path: Path) -> None:
    """The whole .pte against the eager program over the same codes: of the linears, and of a tied embedding and head."""
    place, program = tmp_path / "artifact", captured("gemma", 1)
    quick_artifact("executorch", program, place, quant="rtn", group_size=32, max_seq_len=32)
    session = optc.load(place).session
    (row,) = sequences(20)
    found = np.concatenate(list(session.score(row)))
    bounds.check([torch.from_numpy(found)], *bounds.of_codes(with_head(program).program, [row]))
    manifest = read_manifest(place)
    assert manifest.engine_info["delegates"] <= 3
    assert not [name for name in manifest.engine_info["operators"] if "linear" in name or "quantize" in name]


def test_linear_dynamic_is_torch_ao_arithmetic() -> None:
    import torch.ao.quantization.fx._decomposed

    ops, generator = torch.ops.quantized_decomposed, torch.Generator().manual_seed(0)
    x = torch.randn((1, 7, 64), generator=generator)
    x[0, 3] = 0.0
    x[0, 4] = x[0, 4].abs() + 1.0
    codes = torch.randint(-8, 8, (5, 64), generator=generator, dtype=torch.int8)
    scale = (torch.rand((5, 2), generator=generator) + 0.1).bfloat16().float()
    bias = torch.randn(5, generator=generator)
    steps, zero = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
    bounds = (-128, 127, torch.int8)
    rounded = ops.dequantize_per_token(
        ops.quantize_per_token(x, steps, zero, *bounds), steps, zero, *bounds, torch.float32
    )
    middle = torch.zeros((5, 2), dtype=torch.long)
    weight = ops.dequantize_per_channel_group(codes, scale, middle, -8, 7, torch.int8, 32, torch.float32)
    wanted = torch.nn.functional.linear(rounded, weight, bias)
    found = torch.ops.optc.linear_dynamic(x, codes, scale, bias, bits=4, group_size=32)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_packing_keeps_the_codes() -> None:
    result = packed(4, 32)
    assert (result.matched, result.candidates, result.misses) == (14, 14, ())
    for node in result.program.calls(torch.ops.optc.linear_dynamic.default):
        codes, scale = (result.program.weight(str(result.program.weight_of(item))) for item in node.args[1:3])
        assert codes.dtype is torch.int8
        assert int(codes.min()) >= -8
        assert int(codes.max()) <= 7
        assert torch.equal(scale, scale.bfloat16().float())
    eight = packed(8, 0)
    assert eight.matched == 14
    assert {node.kwargs["group_size"] for node in eight.program.calls(torch.ops.optc.linear_dynamic.default)} == {0}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bits": 4, "group_size": 16}, "its groups of 16 columns are not a multiple of 32"),
        (
            {"bits": 4, "group_size": 32, "symmetric": False},
            "its weight has zero points: use symmetric codes",
        ),
        ({"bits": 8, "group_size": 32}, "its 8-bit weight has several scales per channel: use group size 0"),
        ({"bits": 3, "group_size": 32}, "its weight has 3 bits: there are products for 4 and 8"),
    ],
)
def test_what_cannot_be_packed(options: dict[str, Any], reason: str) -> None:
    result = packed(**options)
    assert (result.matched, result.candidates) == (0, 14)
    assert {miss.reason for miss in result.misses} == {reason}


# -- refusals ---------------------------------------------------------------------------------


def test_quantization_is_refused_with_the_targets_that_take_it() -> None:
    with pytest.raises(TargetError, match="does not take quantization 'smoothquant'") as caught:
        chosen("pte", quant="smoothquant")
    assert "the same request runs on --target inductor-cpu or onnx-cpu or trt or vllm" in str(caught.value)
    with pytest.raises(TargetError, match="does not take asymmetric quantization"):
        chosen("pte", quant="rtn", symmetric=False)


def test_other_kinds_of_models_are_refused() -> None:
    with pytest.raises(TargetError, match="takes decoders, not a model of kind 'encoder'"):
        find_target("executorch").recipe("encoder", chosen("executorch"))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TargetError, match=r'ExecuTorch is not installed\n  remedy: pip install "optc\[executorch\]"'):
        chosen("executorch")


def test_a_length_beyond_the_context_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--max-seq-len 100000 is beyond the model's context of"):
        quick_artifact("executorch", captured("llama"), tmp_path / "out", max_seq_len=100_000)
    assert not (tmp_path / "out").exists()


def test_operators_without_a_kernel_are_listed_together() -> None:
    from optc.exporters.executorch.lower import lower

    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.i0(x) + torch.special.ndtri(x)

    program = torch.export.export(Odd(), (torch.ones(2, 3),))
    with pytest.raises(TargetError, match=r"no kernel for 2 operator\(s\)") as caught:
        lower(program, {})
    assert "i0" in str(caught.value)
    assert "ndtri" in str(caught.value)


def _pte(folder: Path, data: bytes) -> Path:
    layer = AttentionFacts(num_heads=4, num_kv_heads=2, head_dim=8, value_dim=8, scale=0.5, causal=True)
    contract = Contract(kind="decoder", inputs=(), outputs=(), layers=(layer,), kv_cache=KVCache(kind="linear"))
    info = {"model": "model.onnx", "vocab_size": 9, "context_length": 8, "chunk": 4}
    make_artifact(folder, engine="executorch", target="executorch", contract=contract, engine_info=info, files=())
    return folder


def test_a_file_that_is_no_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="ExecuTorch cannot load the program"):
        optc.load(_pte(tmp_path / "artifact", b""))


def test_the_comparison_notices_other_numbers() -> None:
    from optc.exporters.executorch.export import _compare

    numbers = torch.linspace(-3, 3, 8).double()
    _compare(numbers, numbers + 1e-6, 3e-5, "tokens 0 to 3")
    with pytest.raises(GateError, match="computes different numbers from the captured program") as caught:
        _compare(numbers, numbers + 1e-2, 3e-5, "tokens 0 to 3")
    assert "max abs difference 0.01" in str(caught.value)
    with pytest.raises(GateError, match=r"\[7\], not \[8\]"):
        _compare(numbers, numbers[:7], 3e-5, "tokens 0 to 3")


# -- the pass ---------------------------------------------------------------------------------


def test_norms_become_products() -> None:
    program = FuseNorm().run(captured("llama"), PassContext()).program
    result = LegalizeExecutorch().run(program, PassContext())
    assert (result.matched, result.candidates, result.misses) == (5, 5, ())
    assert not result.program.calls(torch.ops.aten.rms_norm.default)
    (row,) = [name for name, _ in result.program.weights() if name.startswith("mean_of_")]
    assert row == "mean_of_64"
    ids, places = torch.tensor([[3, 4, 5]]), torch.arange(3)[None]
    assert torch.allclose(program(ids, places), result.program(ids, places), atol=1e-5)


def test_norms_over_two_axes_are_left_alone() -> None:
    class Wide(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.rms_norm(x, (3, 4))

    result = LegalizeExecutorch().run(capture_module(Wide(), (torch.ones(2, 3, 4),)), PassContext())
    assert (result.matched, result.candidates) == (0, 1)
    assert result.misses[0].reason == "it runs over 2 axes, not one"
