"""The `optc::` dialect. Importing this package registers every op, those of other packages (`optc.ops`) too."""

from optc.compiler.ops import library
from optc.compiler.ops.dialect import (
    attention,
    attention_codes,
    drafts,
    greedy,
    mxfp4,
    nvfp4,
    paged,
    paged_tree,
    quantization,
    recurrent,
    rotary,
    rotation,
    sampling,
)
from optc.compiler.ops.packed import (
    cuda,
    cuda_experts,
    cuda_rows,
    inductor_cpu,
    onnxruntime,
    onnxruntime_codes,
    onnxruntime_products,
    tensorrt,
    xnnpack,
)

__all__ = [
    "attention",
    "attention_codes",
    "cuda",
    "cuda_experts",
    "cuda_rows",
    "drafts",
    "greedy",
    "inductor_cpu",
    "mxfp4",
    "nvfp4",
    "onnxruntime",
    "onnxruntime_codes",
    "onnxruntime_products",
    "paged",
    "paged_tree",
    "quantization",
    "recurrent",
    "rotary",
    "rotation",
    "sampling",
    "tensorrt",
    "xnnpack",
]

library.load_entry_points()
