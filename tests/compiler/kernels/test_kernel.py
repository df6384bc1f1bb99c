"""What is derived from kernels: legality, legalization, what an op library is built of, what a host needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stages import captured

from optc.compiler.capture import capture_module
from optc.compiler.ir.program import Program
from optc.compiler.kernels import kernel as kernels
from optc.compiler.kernels.cpu import library
from optc.compiler.kernels.cpu.linear_nbits import LINEAR_NBITS
from optc.compiler.kernels.cpu.linear_nbits import accepts as linear_accepts
from optc.compiler.kernels.cpu.paged_attention import PAGED_ATTENTION
from optc.compiler.kernels.kernel import CppSources, Kernel, find_kernel, kernels_for, needs_of, used_kernels
from optc.compiler.rewriting.passes import PassContext
from optc.exporters.inductor.legal import LEGAL
from optc.passes.kv_cache.paged import PageKVCache
from optc.passes.legalization.by_kernels import legalize

_optc = torch.ops.optc
PACKED = {"bits": 4, "K": 64, "group_size": 32, "activation_group": -1, "N": 16}
X, HALF, TABLE = torch.ones(2, 64), torch.ones(2, 64, dtype=torch.float16), torch.ones(16)


@pytest.mark.parametrize(
    ("x", "table", "changes", "reason"),
    [
        (X, None, {}, None),
        (HALF, TABLE, {}, None),
        (X, None, {"bits": 5}, "5-bit codes have no packed product (2, 3, 4, 8 have)"),
        (
            X,
            TABLE,
            {"activation_group": 0},
            "a codebook has a packed product up to 4 bits only, and with unrounded activations only",
        ),
        (
            X,
            TABLE,
            {"bits": 8},
            "a codebook has a packed product up to 4 bits only, and with unrounded activations only",
        ),
        (
            X,
            None,
            {"K": 131072, "group_size": 0, "activation_group": 0},
            "sums of 131072 products do not fit in 32 bits",
        ),
        (X, None, {"K": 131072, "group_size": 0, "activation_group": 32}, None),
        (X.double(), None, {}, "activations of type float64; the kernel takes float32, bfloat16, float16"),
    ],
)
def test_packed_product_says_what_it_takes(x: Any, table: Any, changes: dict[str, int], reason: str | None) -> None:
    assert linear_accepts([x, None, None, None, None, table], {**PACKED, **changes}) == reason


def paged() -> Program:
    return PageKVCache().run(captured("llama"), PassContext()).program


def test_calls_of_a_graph_are_judged() -> None:
    """Legality asks the kernel: what it does not take is refused with its reason."""
    program = paged()
    node = program.calls(_optc.paged_attention_.default)[0]
    assert PAGED_ATTENTION.obstacle(node) is None
    predicate = LEGAL[_optc.paged_attention_.default]
    assert predicate is not None
    assert predicate(node) is None
    node.args[1].meta["val"] = node.args[1].meta["val"].double()
    assert predicate(node) == "q, k, v and the pools differ in type"
    assert _optc.attention.default not in LEGAL
    assert len(LEGAL) == len(list(LEGAL)) == 6


def test_a_new_kernel_is_kept_by_legalization(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op with a form in ATen is spelled out, unless a kernel of the device takes the call."""

    class Rotated(torch.nn.Module):
        def forward(self, x: torch.Tensor, position: torch.Tensor) -> Any:
            knobs = {"scaling": 1.0, "interleaved": False}
            wide = _optc.rotary(x, position, torch.ones(4), **knobs)
            return wide, _optc.rotary(x.double(), position, torch.ones(4), **knobs)

    program = capture_module(Rotated(), (torch.randn(1, 2, 3, 8), torch.arange(3)[None]))
    assert legalize(program, "cpu", []).program.calls(_optc.rotary.default) == []
    own = Kernel(
        op="rotary",
        device="cpu",
        tolerance=0.0,
        accepts=lambda args, _: None if args[0].dtype is torch.float32 else "only float32",
        sources=CppSources(package="", op="rotary"),
        libraries=("torch",),
        cpu_flags=("avx2",),
    )
    monkeypatch.setattr(kernels, "_KERNELS", [own])
    result = legalize(program, "cpu", [])
    assert (result.matched, len(result.program.calls(_optc.rotary.default))) == (1, 1)
    inputs = (torch.randn(1, 2, 3, 8), torch.arange(3)[None])
    for found, expected in zip(result.program(*inputs), program(*inputs), strict=True):
        torch.testing.assert_close(found, expected)
    assert used_kernels(result.program, "cpu") == (own,)
    assert needs_of([own], lambda _: "2.11.0+cpu") == {"torch": "2.11", "cpu_flags": ["avx2"]}
    assert find_kernel(_optc.rotary.default, "cuda") is None


def test_library_holds_what_a_program_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources go in by kernel, inner loops once per instruction set."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert used_kernels(paged(), "cpu") == (PAGED_ATTENTION,)
    assert {kernel.op for kernel in kernels_for("cpu")} == {
        "paged_attention_",
        "paged_tree_attention_",
        "linear_few",
        "linear_nbits",
        "cached_linear_attention",
        "fused_experts",
    }
    names = [(unit.source, unit.flags[1:2]) for unit in library._units(LINEAR_NBITS)]
    assert names == [
        ("nbits.cpp", ("-DOPTC_NBITS=nbits_baseline",)),
        ("nbits.cpp", ("-DOPTC_NBITS=nbits_avx2",)),
        ("nbits.cpp", ("-DOPTC_NBITS=nbits_avx512",)),
        ("nbits_matrix.cpp", ("-DOPTC_NBITS_MATRIX=nbits_matrix_amx",)),
        ("linear_nbits.cpp", ("-DOPTC_HAS_AVX2",)),
    ]
    headers = {"torch_headers.h", "nbits.h", "nbits_lanes.h", "nbits_matrix.h"}
    assert all({*headers, unit.source} == set(unit.files()) for unit in library._units(LINEAR_NBITS))
