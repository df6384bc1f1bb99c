"""quantize-rtn: which linears, in which form, with which numbers and reasons."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from rewrites import count, difference, rewritten, stirred
from torch import Tensor

from optc.compiler.capture import capture_module
from optc.compiler.diagnostics import InputError, NoMatchError, UsageError
from optc.compiler.ir.contract import WeightQuantization
from optc.compiler.ir.program import Program
from optc.passes.quantization.rtn import QuantizeRtn

DEQUANTIZE = torch.ops.optc.dequantize.default
LINEAR = torch.ops.aten.linear.default

# Linears of two layers, without the head; BERT has one more before its head.
LINEARS = {"phi": 12, "phi3": 8, "gpt2": 8, "opt": 12, "gpt-neox": 8, "mixtral": 24, "bert": 13}
TIED = {"gemma", "gemma2", "gemma3", "gpt2", "opt", "bert"}


def _tied(name: str) -> str:
    return f"{name} is tied with the embedding (head=True quantizes a copy)"


def _restored(program: Program, result: Program) -> Program:
    """`program` with the weights that `result` has codes of replaced by what the codes stand for."""
    clone = program.clone()
    table = clone.exported.state_dict
    stacked: dict[str, list[Tensor]] = {}
    for codes, entry in result.contract.quantization.items():
        stem = codes.removesuffix("_codes")
        names = set(result.weight_names().values())
        zero = result.weight(f"{stem}_zero") if f"{stem}_zero" in names else None
        scale = result.weight(f"{stem}_scale")
        weight = torch.ops.optc.dequantize(
            result.weight(codes), scale, zero, bits=entry.bits, group_size=entry.group_size
        )
        stacked.setdefault(entry.source, []).append(weight)
    for source, weights in stacked.items():
        whole = torch.stack(weights) if program.weight(source).dim() == 3 else weights[0]
        whole = whole.mT if ".c_" in source else whole  # GPT-2 keeps [K, N]
        table[source] = torch.nn.Parameter(whole, requires_grad=False)
    return clone


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str) -> None:
    program = stirred(name)
    result = rewritten(QuantizeRtn(bits=8), program)
    expected = LINEARS.get(name, 14)
    assert result.matched == expected == len(result.program.contract.quantization)
    assert count(result.program, DEQUANTIZE) == expected
    assert result.candidates == expected + 1 + (2 if name == "mixtral" else 0)
    reasons = [miss.reason for miss in result.misses]
    head = "cls.predictions.decoder.weight" if name == "bert" else "lm_head.weight"
    if name == "mixtral":
        assert reasons == [f"model.layers.{i}.mlp.gate.weight routes tokens to experts" for i in (0, 1)]
    else:
        assert reasons == ([_tied(head)] if name in TIED else [])
    notes = [f"{head} computes the logits and is not quantized (head=True quantizes it)"] * (name not in TIED)
    notes.append("group size 64: the largest of 128, 64, 32 that divides every K")
    assert list(result.notes) == notes
    assert difference(_restored(program, result.program), result.program) <= 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_zero_points(name: str) -> None:
    program = stirred(name)
    result = rewritten(QuantizeRtn(bits=3, group_size=32, symmetric=False), program)
    assert all(node.args[2] is not None for node in result.program.calls(DEQUANTIZE))
    assert difference(_restored(program, result.program), result.program) <= 1e-5


def test_eight_bits_are_close_and_three_are_not() -> None:
    program = stirred("qwen3")
    errors = [difference(program, rewritten(QuantizeRtn(bits=bits), program).program) for bits in (8, 3)]
    assert errors[0] < 0.05 < 0.3 < errors[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights(dtype: torch.dtype) -> None:
    program = stirred("llama", dtype)
    result = rewritten(QuantizeRtn(bits=4), program)
    types = {node.args[1].meta["val"].dtype for node in result.program.calls(DEQUANTIZE)}
    assert types == {dtype}
    assert difference(_restored(program, result.program), result.program) == 0.0


def test_contract() -> None:
    result = rewritten(QuantizeRtn(bits=4, group_size=16, symmetric=False), stirred("llama"))
    source = "model.layers.1.mlp.down_proj.weight"
    contract = result.program.contract
    assert contract.quantization[f"{source}_codes"] == WeightQuantization(
        method="rtn", bits=4, group_size=16, symmetric=False, source=source
    )
    for part, shape in (("codes", (64, 128)), ("scale", (64, 8)), ("zero", (64, 8))):
        assert contract.sources[f"{source}_{part}"] == (source,)
        assert tuple(result.program.weight(f"{source}_{part}").shape) == shape
    assert source not in contract.sources
    assert source not in result.program.exported.state_dict


def test_one_group_per_row() -> None:
    result = rewritten(QuantizeRtn(bits=8, group_size=0), stirred("llama"))
    assert {tuple(n.args[1].meta["val"].shape)[1] for n in result.program.calls(DEQUANTIZE)} == {1}
    assert {node.kwargs["group_size"] for node in result.program.calls(DEQUANTIZE)} == {0}


def test_an_untied_head_on_request() -> None:
    result = rewritten(QuantizeRtn(bits=8, head=True), stirred("llama"))
    assert (result.matched, result.candidates) == (15, 15)
    assert "lm_head.weight_codes" in result.program.contract.quantization
    assert "lm_head.weight" not in result.program.exported.state_dict


def test_a_tied_head_on_request_leaves_the_embedding() -> None:
    program = stirred("gemma")
    result = rewritten(QuantizeRtn(bits=8, head=True), program)
    assert (result.matched, result.misses) == (15, ())
    assert result.program.weight("lm_head.weight") is program.weight("lm_head.weight")
    assert result.program.weight("lm_head.weight_codes").shape == (128, 64)
    assert difference(program, result.program) <= 0.05


def test_ignored_by_pattern() -> None:
    ignore = ("*.down_proj.*", "*.q_proj.weight", "model.norm.*")  # a norm stays in any case
    result = rewritten(QuantizeRtn(bits=8, ignore=ignore), stirred("llama"))
    assert result.matched == 10
    assert [miss.reason for miss in result.misses][:2] == [
        "model.layers.0.self_attn.q_proj.weight is ignored ('*.q_proj.weight')",
        "model.layers.0.mlp.down_proj.weight is ignored ('*.down_proj.*')",
    ]


@pytest.mark.parametrize(
    ("pattern", "remedy"),
    [
        ("*.wq.*", "correct the pattern, or leave it out"),
        ("re:.*wq", "correct the pattern, or leave it out"),
        ("re:down_proj", "use '*down_proj.weight'"),
        ("layers.0.mlp.down_proj", "use '*layers.0.mlp.down_proj.weight'"),
        ("mlp", "use '*mlp*'"),
        ("", "correct the pattern, or leave it out"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(pattern: str, remedy: str) -> None:
    """What it was to keep would be quantized otherwise."""
    with pytest.raises(NoMatchError) as caught:
        rewritten(QuantizeRtn(bits=8, ignore=("*.q_proj.*", pattern)), stirred("llama"))
    assert str(caught.value).startswith(f"ignore: '{pattern}' matches no weight\n  cause: names look like model.")
    assert caught.value.remedy == remedy


def test_a_group_size_that_does_not_divide() -> None:
    with pytest.raises(InputError) as caught:
        rewritten(QuantizeRtn(bits=4, group_size=128), stirred("llama"))
    assert caught.value.exit_code == 3
    assert str(caught.value) == (
        "group size 128 does not divide every weight\n"
        "  where: model.layers.0.self_attn.q_proj.weight\n"
        "  cause: it has K = 64\n"
        "  remedy: use 64, the nearest that divides every weight, or leave this weight out: --ignore "
        "model.layers.0.self_attn.q_proj.weight"
    )


def _group_error(group: list[float], scale: float, bits: int) -> float:
    """The squared error of rounding a group to all 2^bits multiples of a scale around zero, by hand."""
    half = 2 ** (bits - 1)
    codes = [max(-half, min(half - 1, round(value / scale))) for value in group]
    return sum((code * scale - value) ** 2 for code, value in zip(codes, group, strict=True))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ranges_of_the_least_error(bits: int) -> None:
    """Against a search over two hundred scales of each group by hand."""
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(bits))
    weight[0, 0], weight[1, 3] = 6.0, -6.0  # a group with an outlier at either end
    program = capture_module(_Product(weight), (torch.rand(2, 32),))
    errors = {}
    for ranges in ("searched", "full"):
        result = rewritten(QuantizeRtn(bits=bits, group_size=16, ranges=ranges), program).program
        codes, scale = (result.weight(f"weight_{part}") for part in ("codes", "scale"))
        values = torch.ops.optc.dequantize(codes, scale, None, bits=bits, group_size=16)
        errors[ranges] = (values - weight).square().reshape(6, 2, 16).sum(-1).flatten().tolist()
        assert (int(codes.min()), ranges) in ((0, "searched"), (1, "full"))
    best = []
    for index, group in enumerate(weight.reshape(12, 16).tolist()):
        top = max(map(abs, group)) / (2 ** (bits - 1) - 1)
        best.append(min(_group_error(group, top * step / 200, bits) for step in range(20, 201)))
        assert 0.99 * best[-1] <= errors["searched"][index] <= errors["full"][index]
    assert sum(errors["searched"]) < 1.1 * sum(best)
    assert sum(errors["searched"]) < 0.9 * sum(errors["full"])


def test_a_search_gains_nothing_at_eight_bits() -> None:
    program = capture_module(_Product(torch.randn(4, 32)), (torch.rand(2, 32),))
    found = [rewritten(QuantizeRtn(bits=8, ranges=ranges), program).program for ranges in ("searched", "full")]
    assert torch.equal(*(item.weight("weight_codes") for item in found))


class _Product(torch.nn.Module):
    """A linear without a bias."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight)


def test_twice_is_refused_with_a_reason() -> None:
    once = rewritten(QuantizeRtn(bits=8), stirred("llama")).program
    again = rewritten(QuantizeRtn(bits=4), once)
    assert (again.matched, again.candidates, again.program is once) == (0, 15, True)
    assert {miss.reason for miss in again.misses} == {"its weight is already quantized"}


def test_options() -> None:
    with pytest.raises(UsageError, match="6-bit weights are not supported"):
        QuantizeRtn(bits=6)
    with pytest.raises(InputError, match="group size -8 is negative"):
        QuantizeRtn(group_size=-8)
    assert QuantizeRtn.lossy
    assert str(QuantizeRtn(bits=3, symmetric=False)) == "quantize-rtn(bits=3, symmetric=False)"


class _Shared(torch.nn.Module):
    """Linears that share a weight; one weight that something else reads; one of odd width."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = torch.nn.Linear(32, 32)
        self.free = torch.nn.Linear(32, 32)
        self.wide = torch.nn.Parameter(torch.randn(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.shared(x)) @ self.wide
        return x.sum() + self.free(torch.ones(1, 32)) * self.free.weight.sum()


def test_shared_weights_share_their_codes() -> None:
    program = capture_module(_Shared(), (torch.rand(2, 32),))
    result = rewritten(QuantizeRtn(bits=8), program)
    assert list(result.program.contract.quantization) == ["shared.weight_codes", "wide_codes"]
    assert (result.matched, result.candidates) == (3, 4)
    assert [miss.reason for miss in result.misses] == ["free.weight is read by aten.sum.default too"]
    assert result.program.weight("wide_codes").shape == (8, 32)  # stored [N, K], whatever the model does
    x = torch.rand(2, 32)
    torch.testing.assert_close(result.program(x), program(x), rtol=2e-2, atol=0.1)


def test_a_weight_that_is_not_finite_is_named() -> None:
    program = stirred("llama").clone()
    name = "model.layers.1.mlp.up_proj.weight"
    broken = program.weight(name).detach().clone()
    broken[3, 5] = float("nan")
    program.exported.state_dict[name] = torch.nn.Parameter(broken, requires_grad=False)
    with pytest.raises(InputError) as caught:
        rewritten(QuantizeRtn(bits=4), program)
    assert (caught.value.what, caught.value.where) == ("the weight holds NaN or infinity", name)
