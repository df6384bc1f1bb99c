"""The rows of quant_quality.py: methods and formats of optc, and configurations of ModelOpt beside them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        goal: the largest share that the project set itself. folder: as a model folder has it, whose loader runs no
            operators in front of linears. plain: round on full ranges, without a search. peer: `method` is a
            configuration of ModelOpt, which quantizes. weights_alone: of it, leave inputs unrounded.
    """

    name: str
    method: str
    bits: int
    symmetric: bool
    group_size: int | None = 128
    goal: float | None = None
    folder: bool = False
    plain: bool = False
    peer: bool = False
    weights_alone: bool = False

    @property
    def format(self) -> tuple[int, bool, int | None]:
        return self.bits, self.symmetric, self.group_size


ROWS = (
    Row("plain-4", "rtn", 4, True, plain=True),
    Row("plain-4-asym", "rtn", 4, False, plain=True),
    Row("plain-3", "rtn", 3, True, plain=True),
    Row("plain-3-asym", "rtn", 3, False, plain=True),
    Row("rtn-4", "rtn", 4, True),
    Row("rtn-4-asym", "rtn", 4, False),
    Row("rtn-3", "rtn", 3, True),
    Row("rtn-3-asym", "rtn", 3, False),
    Row("gptq-4", "gptq", 4, True, goal=0.42),
    Row("gptq-4-asym", "gptq", 4, False, goal=0.50),
    Row("gptq-3", "gptq", 3, True, goal=0.34),
    Row("awq-4", "awq", 4, True, goal=0.60),
    Row("awq-4-asym", "awq", 4, False, goal=0.70),
    Row("awq+gptq-4-asym", "awq+gptq", 4, False),
    Row("rotate+rtn-4", "rotate+rtn", 4, True),
    Row("rotate+gptq-4", "rotate+gptq", 4, True, goal=0.26),
    Row("rotate+gptq-4-asym", "rotate+gptq", 4, False),
    Row("rotate+gptq-3", "rotate+gptq", 3, True),
    Row("best-3", "best", 3, True),
    Row("best-4", "best", 4, True),
    Row("rotate+best-4", "rotate+best", 4, True, goal=0.26),
    Row("rotate+best-3", "rotate+best", 3, True, goal=0.17),
    Row("best-4-asym", "best", 4, False, goal=0.42),
    Row("best-3-asym", "best", 3, False, goal=0.30),
    Row("int8", "int8", 8, True, 0),
    Row("smoothquant", "smoothquant", 8, True, 0),
    Row("smoothquant folder", "smoothquant", 8, True, 0, folder=True),
    Row("smoothquant-mixed folder", "smoothquant-mixed", 8, True, 0, folder=True),
    Row("smoothquant-rotated folder", "smoothquant-rotated", 8, True, 0, folder=True),
    Row("rotate+smoothquant", "rotate+smoothquant", 8, True, 0),
    Row("rotate+smoothquant folder", "rotate+smoothquant", 8, True, 0, folder=True),
    Row("w4a8", "w4a8", 4, True),
    Row("llm-int8", "llm-int8", 8, True, 0),
    Row("fp8", "fp8", 8, True, 0),
    Row("fp8-block", "fp8-block", 8, True),
    Row("nf4", "nf4", 4, True, 64),
    Row("nvfp4", "nvfp4", 4, True, 16),
    Row("mxfp4", "mxfp4", 4, True, 32),
    Row("modelopt-mxfp4", "MXFP4_DEFAULT_CFG", 4, True, 32, peer=True),
    Row("modelopt-mxfp4 weights", "MXFP4_DEFAULT_CFG", 4, True, 32, peer=True, weights_alone=True),
    Row("modelopt-nvfp4", "NVFP4_DEFAULT_CFG", 4, True, 16, peer=True),
    Row("modelopt-nvfp4-awq", "NVFP4_AWQ_LITE_CFG", 4, True, 16, peer=True),
    Row("modelopt-int4-awq", "INT4_AWQ_CFG", 4, True, peer=True),
    Row("modelopt-w4a8", "W4A8_AWQ_BETA_CFG", 4, True, peer=True),
    Row("modelopt-fp8", "FP8_DEFAULT_CFG", 8, True, 0, peer=True),
    Row("modelopt-smoothquant", "INT8_SMOOTHQUANT_CFG", 8, True, 0, peer=True),
)
