"""A package of somebody else's: a weight format with its op, a pass that makes it, an engine and a target.

`install` writes it as pip would: the package, and a dist-info folder with its entry points.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = "toy_optc"
ENTRY_POINTS = f"""\
[optc.ops]
toy = {PACKAGE}.ops
[optc.formats]
ternary = {PACKAGE}.ops:TERNARY
[optc.passes]
toy = {PACKAGE}.passes
[optc.engines]
toy = {PACKAGE}.target:ENGINE
[optc.targets]
toy = {PACKAGE}.target
"""

OPS = '''
"""W = scale * code, codes -1, 0 and 1."""
import torch
from optc.compiler.formats.weight_format import WeightFormat
from optc.compiler.ops.library import define


def _dequantize(codes, scale):
    return codes.to(scale.dtype) * scale


define("toy_ternary(Tensor codes, Tensor scale) -> Tensor", _dequantize,
       lambda codes, scale: scale.new_empty(codes.shape), aten=_dequantize, makes_weight=True)
TERNARY = WeightFormat(name="ternary", op="toy_ternary", parts=("codes", "scale"), bits=(2,), codes=torch.int8,
                       keywords=lambda bits, size, dtype: {}, in_folders=False)
'''

PASSES = '''
from dataclasses import dataclass
from typing import ClassVar

import torch
from optc.compiler.ir.contract import WeightQuantization
from optc.compiler.rewriting.budget import Budget
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult
from optc.passes.quantization.arithmetic.groups import weight_rows
from optc.passes.quantization.arithmetic.selection import (
    place_codes, quantize_selected, read_instead, select_linears, weight_name, weight_part,
)


@dataclass(frozen=True, kw_only=True)
class QuantizeTernary(Pass):
    """linear(x, W)  ->  linear(x, toy_ternary(codes, scale))"""

    name: ClassVar[str] = "quantize-ternary"
    lossy: ClassVar[bool] = True
    ignore: tuple[str, ...] = ()

    def budget(self, before):
        return Budget(kl=8.0, top1=0.0, perplexity=500.0, relative=3.0, cosine=-1.0)

    def run(self, program, context):
        return quantize_selected(program, select_linears(program, self.ignore, False), self._quantize)

    def _quantize(self, program, site):
        weight, source = weight_rows(program, site).float(), weight_name(program, site)
        limit = 0.7 * weight.abs().mean(1, keepdim=True)
        codes = torch.where(weight.abs() > limit, weight.sign(), 0.0)
        scale = (weight * codes).sum(1, keepdim=True) / codes.abs().sum(1, keepdim=True).clamp(min=1)
        entry = WeightQuantization(method="ternary", bits=2, group_size=0, symmetric=True, source=source,
                                   format="ternary")
        parts = [weight_part(program, site, "scale", scale)]
        read_instead(program, site, place_codes(program, site, codes.to(torch.int8), parts, entry))
'''

TARGET = """
from typing import Annotated

from msgspec import Meta
from optc.compiler.artifact.engines import Engine
from optc.compiler.ir.saved.tensors import write_tensors
from optc.compiler.target.options import TargetOptions
from optc.compiler.target.target import ExportResult, Step, Target
from optc.targets.every_operator import EveryOperator
from toy_optc.passes import QuantizeTernary


class ToyOptions(TargetOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    toy_words: Annotated[int, Meta(ge=1, le=9, description="Words of the greeting.")] = 2


ENGINE = Engine(name="toy", session="toy_optc.target:nothing", device="cpu", files=("weights",))


def _recipe(kind, options):
    return [Step(QuantizeTernary())]


def _export(program, request):
    words = request.of(ToyOptions).toy_words
    (request.directory / "greeting.txt").write_text(" ".join(["toy"] * words))
    tensors = {name: tensor.contiguous() for name, tensor in program.weights()}
    write_tensors(request.directory / "weights.safetensors", tensors)
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    return ExportResult(engine=ENGINE, info={"weights": "weights.safetensors"}, weight_bytes=sum(sizes.values()),
                        tensor_bytes=sizes)


TARGET = Target(name="toy", aliases=("plaything",), summary="weights of three values", device="cpu", dtypes=("fp32",),
                kv_caches=(), quant={}, legal=EveryOperator(), recipe=_recipe, export=_export, options=ToyOptions)
"""


def install(site: Path) -> None:
    """Write the package and its metadata into a folder of packages."""
    package, metadata = site / PACKAGE, site / f"{PACKAGE}-1.0.dist-info"
    package.mkdir(parents=True)
    metadata.mkdir()
    for name, text in {"__init__": "", "ops": OPS, "passes": PASSES, "target": TARGET}.items():
        (package / f"{name}.py").write_text(text)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE.replace('_', '-')}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
