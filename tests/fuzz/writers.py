"""optc's writers, as the campaign against the disk runs them (`disk.py`): over and over, each time over what was there.

What a writer computes and does not depend on the disk is computed once, when it is made ready. Everything that optc
writes is struck here, but for

- what is written into a folder that another row publishes: stages' text (`ir/`), report, companions, checksums, the
  files of tensorboard;
- what lives as long as a process: folders of `optc serve`, work files without a name, scratch of compilers;
- dumps for people who debug (`--dump-ir`) and reports of unknown errors, which nothing reads.
"""

from __future__ import annotations

from fuzz.artifact_writers import (
    bundle_writer,
    exporter,
    figures_writer,
    plan_writer,
    quantize_writer,
    shard_writer,
    sign_writer,
)
from fuzz.part_writers import group_writer, keys_writer, library_writer, mark_writer, recipe_writer, stage_writer
from fuzz.seeds import Seeds
from fuzz.training_writers import checkpoint_writer, deepspeed_writer, sharded_writer, trainer
from fuzz.writer import Kind

_AOTI = (("torch._inductor", "aot_compile"),)
_PAIR = (("optc.exporters.onnx.encoder_decoder", "first_call"), ("optc.writing", "open_written"))
# torch's threads, which opening starts, do not live on in forks
_AOTI_PAIR = (*_AOTI, ("optc.writing", "open_written"))
_PTE = (("optc.exporters.executorch.export", "trace"), ("optc.exporters.executorch.export", "lower"))

COMPUTED = (*_PAIR, *_AOTI_PAIR, *_PTE)
"""Functions of writers that do not touch the disk, by module and name."""

WRITERS: dict[str, Kind] = {
    "train": trainer(),
    "quantize": Kind(quantize_writer),
    "heads": trainer(medusa={"enabled": True, "heads": 2}),
    "adapters": trainer(lora={"enabled": True, "export": "adapters"}),
    "executorch": exporter("executorch", computed=_PTE, packages=("executorch",)),
    "inductor": exporter("inductor-cpu", computed=_AOTI),
    "inductor-int4": exporter("inductor-cpu", "--quant", "rtn", "--group-size", "32", computed=_AOTI),
    "encoder-decoder": exporter(
        "onnx-cpu", computed=_PAIR, packages=("onnx_ir", "onnxruntime"), model=Seeds.encoder_decoder
    ),
    "encoder-decoder-inductor": exporter("inductor-cpu", computed=_AOTI_PAIR, model=Seeds.encoder_decoder),
    "inductor-cuda": exporter("inductor-cuda"),
    "trtllm": exporter("trtllm", "--quant", "fp8"),
    "trt": exporter("trt", "--trt-runtime", "none", packages=("onnx", "onnx_ir")),
    "onnx": exporter("onnx-cpu", packages=("onnx_ir", "onnxruntime")),
    "vllm": exporter("vllm"),
    "shards": Kind(shard_writer),
    "bundle": Kind(bundle_writer, ("onnx_ir", "onnxruntime")),
    "plan": Kind(plan_writer, ("onnx", "onnx_ir")),
    "figures": Kind(figures_writer),
    "sign": Kind(sign_writer, ("cryptography",)),
    "keys": Kind(keys_writer, ("cryptography",), light=True),
    "machine-key": Kind(mark_writer, light=True),
    "recipe": Kind(recipe_writer),
    "library": Kind(library_writer, light=True),
    "stage": Kind(stage_writer),
    "group": Kind(group_writer, light=True),
    "checkpoint": Kind(checkpoint_writer, light=True),
    "sharded": Kind(sharded_writer, light=True),
    "deepspeed": Kind(deepspeed_writer, ("deepspeed",), light=True),
}
"""Those that take longest first."""
