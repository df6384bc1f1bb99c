"""What rounding may cost: the budgets of quantization passes, beside what was measured.

Measured by `benchmarks/pass_drift.py` on the built-in passage (random models: on random tokens), worst of the methods
and granularities. "deep" is a random Llama as transformers initializes it, 22 layers of 256; "large" has 4 layers and
weights four times as large, which amplifies every error.

                          fiction-3m              fiction-26m             deep   large
                          KL       ppl     rel    KL       ppl     rel    rel    KL      rel   cosine
    weights, 8 bits       0.00058  +0.4%   0.014  0.00033  +0.4%   0.011  0.024  0.0017  0.046 0.9990
    weights, 4 bits       0.19     +24%    0.25   0.11     +10%    0.19   0.39   0.38    0.68  0.77
    weights, 3 bits       0.86     +135%   0.48   0.46     +38%    0.39   -      0.99    1.10  0.40
    weights, 2 bits       6.9      x1194   1.13   6.4      x581    1.14   -      1.58    1.39  0.03
    head, 8 bits          0.00015   +0.1%   0.007  0.00008 +0.0%   0.006  0.010  0.0007  0.029 0.9996
    head, 4 bits          0.036     +2.4%   0.120  0.027   +4.1%   0.120  0.163  0.15    0.42  0.910
    weights, FP8          0.0061   +1.9%   0.043  0.0032   -       0.035  0.090  0.024   0.17  0.985
    inputs, int8          0.0020   +1.0%   0.025  0.0009   -       0.019  0.016  0.0021  0.051 0.9987
    the same, calibrated  0.018    +2.2%   0.072  -        -       -      -      -       -     -
    inputs, FP8           0.0059   +1.9%   0.043  -        -       -      -      0.024   0.17  0.985
    inputs, NVFP4         0.090    +18%    0.157  -        -       -      -      0.23    0.53  0.86
    keys, values, int8    0.0008   +0.3%   0.016  -        -       -      -      0.0016  0.045 0.9990
    keys, values, FP8     0.012    +0.5%   0.060  -        -       -      -      0.029   0.19  0.982
    scales, float16       0.00001  +0.02%  0.001  0.00001  +0.01%  0.001  0.001  0.00001 0.001 1.0000

    convolutions and linears in static int8, by `benchmarks/static_int8.py` on outputs: EfficientNet-Lite0 as trained
    relative 0.13, top-1 of 92 % of photographs the same; ViT-S with random weights 0.05, ResNet-18 0.10; fiction-3m
    KL 0.013, +0.8%

Margins: KL and perplexity about three times the worst of the trained models (small ones lose the most), and never less
than 1.5 times "large"; relative error and cosine, which random models are judged by, at least 1.05 times "large" at 2,
3 and 4 bits and 1.5 to 2 times elsewhere. At 2 bits little of a small model is left; that budget stops no more than
numbers that are none.
"""

from __future__ import annotations

from optc.compiler.rewriting.budget import Budget

_WEIGHTS = {
    8: Budget(kl=0.005, top1=0.95, perplexity=0.015, relative=0.1, cosine=0.997),
    4: Budget(kl=0.6, top1=0.8, perplexity=0.7, relative=0.75, cosine=0.7),
    3: Budget(kl=2.5, top1=0.5, perplexity=4.0, relative=1.15, cosine=0.35),
    2: Budget(kl=12.0, top1=0.0, perplexity=4000.0, relative=1.5, cosine=-0.05),
}


def weight_budget(bits: int) -> Budget:
    """Of rounding the weights of all linears to so many bits: integers, or 4-bit floats and codebooks."""
    return _WEIGHTS[bits]


_HEAD = {
    8: Budget(kl=0.002, top1=0.95, perplexity=0.005, relative=0.06, cosine=0.999),
    4: Budget(kl=0.25, top1=0.8, perplexity=0.15, relative=0.55, cosine=0.85),
}


def head_budget(bits: int) -> Budget:
    """Of rounding the embedding and the head to so many bits."""
    return _HEAD[bits]


FP8_WEIGHTS = Budget(kl=0.04, top1=0.93, perplexity=0.06, relative=0.25, cosine=0.97)
INT8_INPUTS = Budget(kl=0.006, top1=0.95, perplexity=0.03, relative=0.1, cosine=0.996)
INT8_FIXED_INPUTS = Budget(kl=0.06, top1=0.9, perplexity=0.08, relative=0.25, cosine=0.97)
STATIC_INT8 = Budget(kl=0.06, top1=0.9, perplexity=0.08, relative=0.25, cosine=0.97)
FP8_INPUTS = Budget(kl=0.05, top1=0.9, perplexity=0.06, relative=0.25, cosine=0.97)
NVFP4_INPUTS = Budget(kl=0.4, top1=0.8, perplexity=0.6, relative=0.75, cosine=0.75)
INT8_KEYS_VALUES = Budget(kl=0.005, top1=0.95, perplexity=0.02, relative=0.1, cosine=0.996)
FP8_KEYS_VALUES = Budget(kl=0.05, top1=0.9, perplexity=0.06, relative=0.3, cosine=0.96)
FLOAT16_SCALES = Budget(kl=1e-4, top1=0.97, perplexity=2e-3, relative=0.01, cosine=0.9999)
