"""quantize-kv-cache: calibrated scales of keys and values, by layer, head and channel."""

from __future__ import annotations

import bounds
import pytest
import torch
from rewrites import difference, stirred
from stages import captured
from torch import Tensor

from optc.compiler.calibration.sequences import Calibration, random_calibration
from optc.compiler.diagnostics import InputError
from optc.compiler.execution.stage_driver import run_stage
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import PassContext, PassResult
from optc.passes.fusion.rotary import FuseRotary
from optc.passes.kv_cache.quantize import ATTENTION, QuantizeKVCache
from optc.passes.kv_cache.static import StaticKVCache

_optc = torch.ops.optc
CALIBRATION = random_calibration(128, samples=4, length=32, seed=0)
SHAPES = {"layer": (1,), "head": (2, 1, 1), "channel": (2, 1, 16)}


def calibrated(rewrite: QuantizeKVCache, program: Program, calibration: Calibration | None = CALIBRATION) -> PassResult:
    before = program.fingerprint()
    result = rewrite.run(program, PassContext(calibration=calibration))
    assert program.fingerprint() == before
    result.program.exported.validate()
    return result


def keys_of(program: Program, index: int, tokens: Tensor) -> list[Tensor]:
    """Argument `index` of every attention on these tokens, by an interpreter of its own."""
    seen: list[Tensor] = []

    class Record(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):  # type: ignore[no-untyped-def]
            if target is ATTENTION:
                seen.append(args[index])
            return super().call_function(target, args, kwargs)

    Record(program.module()).run(tokens, torch.arange(tokens.shape[1]).expand_as(tokens))
    return seen


@pytest.mark.parametrize("granularity", SHAPES)
@pytest.mark.parametrize(("format", "top"), [("int8", 127.0), ("fp8", 448.0)])
def test_scales_are_the_largest_magnitudes(format: str, top: float, granularity: str) -> None:
    program = stirred("llama")
    rewrite = QuantizeKVCache(format=format, granularity=granularity)  # type: ignore[arg-type]
    result = calibrated(rewrite, program)
    assert (result.matched, result.candidates) == (2, 2)
    axes = {"layer": (0, 1, 2, 3), "head": (0, 2, 3), "channel": (0, 2)}[granularity]
    for index, part in ((1, "key"), (2, "value")):
        for layer, value in enumerate(keys_of(program, index, CALIBRATION.tokens)):
            scale = result.program.weight(f"kv_cache.{layer}.{part}_scale")
            assert tuple(scale.shape) == SHAPES[granularity]
            expected = value.abs().amax(axes).flatten() / top
            torch.testing.assert_close(scale.flatten(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "phi", "qwen3", "mixtral"])
def test_families(name: str) -> None:
    """Rounding shows, and not much; finer scales are closer, int8 is closer than fp8."""
    program = stirred(name)
    drift = {
        options: difference(
            program,
            calibrated(QuantizeKVCache(format=options[0], granularity=options[1]), program).program,  # type: ignore[arg-type]
        )
        for options in (("int8", "layer"), ("int8", "channel"), ("fp8", "head"))
    }
    assert min(drift.values()) > 0
    if name != "mixtral":  # its routers choose other experts
        assert max(drift.values()) <= 0.3
        assert drift["int8", "layer"] <= 0.05


@pytest.mark.parametrize("rotary", [False, True])
def test_with_a_cache_it_computes_the_same(rotary: bool) -> None:
    program = calibrated(QuantizeKVCache(), captured("llama")).program
    if rotary:
        program = FuseRotary().run(program, PassContext()).program
    cached = StaticKVCache().run(program, PassContext()).program
    rows = [[5, 9, 17, 33, 2, 90, 3, 3, 8], [7, 11, 13]]
    bounds.check(run_stage(cached, rows).logits, *bounds.of_codes(program, rows))


def test_twice_is_refused() -> None:
    once = calibrated(QuantizeKVCache(), stirred("llama")).program
    again = calibrated(QuantizeKVCache(), once)
    assert (again.matched, again.candidates) == (0, 2)
    assert {miss.reason for miss in again.misses} == {"its keys and values are already quantized"}


def test_errors() -> None:
    with pytest.raises(InputError, match="needs calibration tokens"):
        calibrated(QuantizeKVCache(), stirred("llama"), None)
    broken = stirred("llama").clone()
    name, table = "model.layers.1.self_attn.v_proj.weight", broken.exported.state_dict
    table[name] = torch.nn.Parameter(table[name].detach() * float("inf"), requires_grad=False)
    with pytest.raises(InputError) as caught:
        QuantizeKVCache().run(broken, PassContext(calibration=CALIBRATION))
    assert caught.value.where == "values of attention layer 1"
    none = QuantizeKVCache().run(_module(), PassContext(calibration=CALIBRATION))
    assert (none.matched, none.candidates) == (0, 0)


def _module() -> Program:
    from optc.compiler.capture import capture_module

    return capture_module(torch.nn.Linear(4, 4), (torch.rand(2, 4),))
