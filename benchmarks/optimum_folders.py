"""Folders of `onnx-cpu` loaded by optimum's ORTModel classes: outputs and greedy tokens beside transformers'.

    python benchmarks/optimum_folders.py --optimum SITE

SITE is a folder that holds optimum-onnx and a transformers that it takes, which is older than optc's:

    pip install --target SITE --no-deps optimum==2.1.0 optimum-onnx==0.1.0 transformers==4.57.3 'huggingface_hub<1' tokenizers==0.22.1

Models are tiny, with random weights; they are compiled here, and opened by optimum in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

LAYERS: dict[str, int] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
TEXT: dict[str, Any] = {**LAYERS, "vocab_size": 100, "max_position_embeddings": 64, "pad_token_id": 0}
PICTURE: dict[str, Any] = {**LAYERS, "image_size": 32, "patch_size": 8}
LLAMA: dict[str, Any] = {**TEXT, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {
    "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
T5 = {
    "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 100,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
SEGFORMER = {
    "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "decoder_hidden_size": 16, "num_attention_heads": [1, 1, 2, 2],
    "image_size": 32,
}  # fmt: skip
MODELS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("ORTModelForFeatureExtraction", "BertConfig", "BertModel", TEXT),
    ("ORTModelForSequenceClassification", "BertConfig", "BertForSequenceClassification", TEXT),
    ("ORTModelForTokenClassification", "BertConfig", "BertForTokenClassification", TEXT),
    ("ORTModelForQuestionAnswering", "BertConfig", "BertForQuestionAnswering", TEXT),
    ("ORTModelForMaskedLM", "BertConfig", "BertForMaskedLM", TEXT),
    ("ORTModelForImageClassification", "ViTConfig", "ViTForImageClassification", PICTURE),
    ("ORTModelForSemanticSegmentation", "SegformerConfig", "SegformerForSemanticSegmentation", SEGFORMER),
    ("ORTModelForCausalLM", "LlamaConfig", "LlamaForCausalLM", LLAMA),
    ("ORTModelForCausalLM", "GPT2Config", "GPT2LMHeadModel", GPT2),
    ("ORTModelForSeq2SeqLM", "T5Config", "T5ForConditionalGeneration", T5),
]
"""optimum's class; transformers' config and class, and sizes."""
GENERATE = {"do_sample": False, "max_new_tokens": 8}
TOLERANCE = 1e-4


def write(work: Path) -> None:
    """Folders of models, artifacts of optc, and what transformers makes of some inputs."""
    import torch
    import transformers

    import optc

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 100, (2, 11), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    pictures = torch.randn(2, 3, 32, 32, generator=generator)
    for number, (_, config_class, model_class, sizes) in enumerate(MODELS):
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes)).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(3.0) if weight.dim() > 1 else weight.add_(0.02 * torch.randn_like(weight))
        model.save_pretrained(work / f"source-{number}")
        optc.compile(work / f"source-{number}", target="onnx-cpu", output=work / f"out-{number}")
        inputs = {"pixel_values": pictures}
        if model.main_input_name == "input_ids":
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids) if model.can_generate() else mask}
        with torch.inference_mode():
            if model.can_generate():
                outputs = {"tokens": model.generate(**inputs, **GENERATE, pad_token_id=0)}
            else:
                outputs = {key: item for key, item in model(**inputs).items() if isinstance(item, torch.Tensor)}
        named = {**inputs, **{f"out.{key}": item for key, item in outputs.items()}}
        np.savez(work / f"{number}.npz", **{key: item.numpy() for key, item in named.items()})


def read(work: Path) -> dict[str, Any]:
    """What optimum's classes compute of them: the largest difference of each output, or whether tokens are equal."""
    import optimum.onnxruntime as ort_models
    import torch

    found: dict[str, Any] = {}
    for number, (name, _, model_class, _) in enumerate(MODELS):
        arrays = dict(np.load(work / f"{number}.npz"))
        inputs = {key: torch.from_numpy(item) for key, item in arrays.items() if not key.startswith("out.")}
        model = getattr(ort_models, name).from_pretrained(work / f"out-{number}")
        row = found[f"{name} of {model_class}"] = {}
        if "out.tokens" in arrays:
            tokens = model.generate(**inputs, **GENERATE, pad_token_id=0).numpy()
            row["tokens_equal"] = bool(np.array_equal(tokens, arrays["out.tokens"]))
            continue
        for key, output in model(**inputs).items():
            wanted = arrays[f"out.{key}"]
            gap = np.abs(np.asarray(output) - wanted)
            mask = arrays.get("attention_mask")
            if mask is not None and gap.shape[:2] == mask.shape:
                gap = gap[mask.astype(bool)]
            row[key] = float(gap.max() / np.abs(wanted).max())
    return found


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("optimum", "optimum-onnx", "transformers", "onnxruntime")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimum", type=Path, help="folder with optimum-onnx and its transformers")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read is not None:
        print(json.dumps({"libraries": versions(), "classes": read(arguments.read)}))
        return
    if arguments.optimum is None:
        parser.error("--optimum SITE is needed")
    from common import record

    with tempfile.TemporaryDirectory() as place:
        write(Path(place))
        path = os.pathsep.join([str(arguments.optimum), os.environ.get("PYTHONPATH", "")])
        command, environment = [sys.executable, __file__, "--read", place], {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result = json.loads(done.stdout.splitlines()[-1])
    rows = [value for row in result["classes"].values() for value in row.values()]
    good = all(value if isinstance(value, bool) else value <= TOLERANCE for value in rows)
    record("optimum_folders", {**result, "all_equal": good}, 1)


if __name__ == "__main__":
    main()
