"""Which TensorRT builds, what it is given, and what is refused with which remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from chosen import chosen

from optc.compiler.diagnostics import OptcError, TargetError, UsageError
from optc.exporters.options.trt import TrtOptions
from optc.exporters.trt import builders
from optc.exporters.trt.facts import profiles
from optc.passes.kv_cache.fixed import cache_capacity

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Says what is installed."""

    def install(*packages: str, gpu: bool = False, version: tuple[int, int] = (10, 15)) -> None:
        monkeypatch.setattr(builders, "_installed", lambda runtime: runtime in packages)
        monkeypatch.setattr(builders, "_has_gpu", lambda: gpu)
        monkeypatch.setattr(builders, "_version", lambda: version)

    return install


def builder(**options: Any) -> tuple[str, str]:
    choice = builders.choose(TrtOptions(**options))
    return choice.ops, choice.runtime


def refused(**options: Any) -> OptcError:
    with pytest.raises(OptcError) as caught:
        chosen("trt", **options)
    return caught.value


def test_auto(machine: Machine) -> None:
    machine("rtx")
    assert builder() == ("fused", "rtx")
    assert builder(trt_runtime="none") == ("fused", "none")
    assert builder(trt_runtime="rtx", trt_ops="basic") == ("basic", "rtx")
    machine("tensorrt", "rtx", gpu=True)
    assert builder() == ("fused", "tensorrt")
    assert builder(trt_ops="basic") == ("basic", "tensorrt")
    machine("tensorrt", "rtx", gpu=True, version=(8, 6))
    assert builder() == ("basic", "tensorrt")
    assert builder(trt_ops="fused") == ("fused", "rtx")
    machine("tensorrt", "rtx", gpu=False)
    assert builder() == ("fused", "rtx")


def test_nothing_is_installed(machine: Machine) -> None:
    machine()
    for options in ({}, {"trt_runtime": "rtx"}):
        error = refused(**options)
        assert isinstance(error, TargetError)
        assert error.exit_code == 4
        assert 'pip install "optc[trt]"' in str(error)
        assert "--trt-runtime none" in str(error)


def test_standard_tensorrt_needs_a_gpu(machine: Machine) -> None:
    machine("tensorrt", "rtx")
    assert "there is none here" in str(refused(trt_runtime="tensorrt"))
    assert "needs the package tensorrt and an NVIDIA GPU" in str(refused(trt_ops="basic"))


def test_an_old_tensorrt(machine: Machine) -> None:
    machine("tensorrt", gpu=True, version=(10, 13))
    error = refused(trt_runtime="tensorrt", trt_ops="fused")
    assert "TensorRT 10.13 does not parse the op set 'fused'" in str(error)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"arch": "sm90"},
            "does not support the architecture sm90\n  cause: an H100 or H200 needs standard TensorRT",
        ),
        ({"arch": "sm87"}, "a Jetson Orin needs standard TensorRT"),
        ({"arch": "sm89", "trt_runtime": "none"}, "--arch is for TensorRT for RTX"),
        ({"trt_ops": "basic", "trt_runtime": "none", "quant": "awq"}, "nearest here: --quant smoothquant"),
        ({"trt_ops": "basic", "trt_runtime": "none", "quant": "int8"}, "does not take quantization 'int8'"),
        ({"trt_ops": "basic", "trt_runtime": "none", "dtype": "bf16"}, "does not take dtype bf16"),
        ({"quant": "fp8"}, "fp8 does not run on portable"),
        ({"quant": "fp8", "arch": "sm80,sm89"}, "fp8 does not run on sm80"),
        ({"max_batch": 0}, "'max-batch' cannot be 0"),
    ],
)
def test_refused(machine: Machine, options: dict[str, Any], text: str) -> None:
    machine("rtx")
    assert text in str(refused(**options))


def test_unknown_names(machine: Machine) -> None:
    machine("rtx")
    for options in ({"trt_ops": "fusd"}, {"trt_runtime": "rtxx"}):
        assert isinstance(refused(**options), UsageError)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"quant": "rtn", "symmetric": False}, "does not take asymmetric quantization"),
        ({"quant": "gptq", "bits": 3}, "does not take 3-bit weights"),
        ({"quant": "rtn", "bits": 2}, "nearest here: --quant rtn --bits 4"),
        ({"quant": "nf4"}, "does not take quantization 'nf4'"),
        ({"quant": "llm-int8"}, "does not take quantization 'llm-int8'"),
        ({"kv_cache": "paged"}, "does not take a paged KV cache"),
        ({"quant": "rtn", "group_size": 48}, "group size 48"),
    ],
)
def test_refused_before_any_weight_is_read(options: dict[str, Any], text: str) -> None:
    with pytest.raises(TargetError) as caught:
        chosen("trt", **options)
    assert text in str(caught.value)


def test_other_targets_have_no_tensorrt() -> None:
    for name, value in (("arch", "sm89"), ("trt_ops", "fused"), ("trt_runtime", "rtx"), ("max_batch", 2)):
        with pytest.raises(TargetError, match=f"does not take --{name.replace('_', '-')}"):
            chosen("onnx-cpu", **{name: value})


def test_capacity() -> None:
    assert cache_capacity(None, 1024) == 1024
    assert cache_capacity(None, 131072) == 2048
    assert cache_capacity(512, 1024) == 512
    with pytest.raises(TargetError, match="beyond the model's context of 1024 tokens"):
        cache_capacity(2048, 1024)
    with pytest.raises(TargetError, match="is too small to generate with"):
        cache_capacity(1, 1024)


@pytest.mark.parametrize(
    ("batch", "capacity", "vocab", "longest"),
    [
        (4, 2048, 8192, 2048),
        (4, 2048, 128256, 512),
        (1, 2048, 128256, 2048),
        (64, 2048, 256000, 128),
        (4, 32, 128, 32),
    ],
)
def test_profiles_bound_the_logits(batch: int, capacity: int, vocab: int, longest: int) -> None:
    prefill, decode = profiles(batch, capacity, vocab)
    assert prefill == {"name": "prefill", "batch": [1, 1, batch], "tokens": [1, min(longest, 128), longest]}
    assert decode == {"name": "decode", "batch": [1, 1, batch], "tokens": [1, 1, 1]}
