"""Decode speed on the CPU, int4 g128, batch 1: optc against a bare ONNX Runtime loop, onnxruntime-genai
and transformers eager fp32, interleaved, on a random decoder of about 115 M parameters.

    python benchmarks/cpu_decode.py            # about five minutes on two cores
    python benchmarks/cpu_decode.py --layers 2 --rounds 2   # a quick look

The bare loop is the least that a program around onnxruntime can do: buffers bound once, past and
present shared, argmax. Its graph is the artifact's.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import DECODER_115M, genai_seconds, interleave, random_llama, ratio, record

PROMPT, STEPS = 128, 64


def optc_contender(artifact: Path, prompt: list[int]) -> Callable[[], float]:
    """Tokens per second of what `optc run` does after the first token."""
    import optc

    model = optc.load(artifact)

    def once() -> float:
        result = model.generate(prompt, max_new_tokens=STEPS + 1, ignore_eos=True)
        return 1e3 / float(result.tpot_ms)

    return once


def bare_contender(artifact: Path, prompt: list[int], threads: int) -> Callable[[], float]:
    """A loop around onnxruntime with bound, shared buffers and nothing else."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(artifact / "model.onnx"), options, providers=["CPUExecutionProvider"])
    caches = [value for value in session.get_inputs() if value.name.startswith("past_key_values")]
    capacity = PROMPT + STEPS + 1

    def once() -> float:
        binding = session.io_binding()
        binding.bind_output("logits")
        for value in caches:
            shape = [1, value.shape[1], capacity, value.shape[3]]
            buffer = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            binding.bind_ortvalue_input(value.name, buffer)
            binding.bind_ortvalue_output(value.name.replace("past_key_values", "present"), buffer)

        def step(tokens: list[int], total: int) -> int:
            binding.bind_cpu_input("input_ids", np.array([tokens], np.int64))
            binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
            binding.bind_output("logits")
            session.run_with_iobinding(binding)
            return int(binding.get_outputs()[0].numpy()[0, -1].argmax())

        token = step(prompt, PROMPT)
        begin = time.perf_counter()
        for index in range(STEPS):
            token = step([token], PROMPT + 1 + index)
        return STEPS / (time.perf_counter() - begin)

    return once


def genai_contender(artifact: Path, prompt: list[int]) -> Callable[[], float]:
    """onnxruntime-genai's Generator on the same folder."""
    import onnxruntime_genai as og

    model = og.Model(str(artifact))

    return lambda: STEPS / genai_seconds(model, prompt, STEPS)[1]


def transformers_contender(folder: Path, prompt: list[int]) -> Callable[[], float]:
    """transformers eager fp32 with its own cache."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    @torch.no_grad()
    def once() -> float:
        out = model(input_ids=torch.tensor([prompt]), use_cache=True)
        begin = time.perf_counter()
        for _ in range(STEPS):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        return STEPS / (time.perf_counter() - begin)

    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, default=DECODER_115M["layers"])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    import torch

    import optc

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        folder, artifact = Path(name) / "model", Path(name) / "artifact"
        shape = {**DECODER_115M, "layers": arguments.layers}
        parameters = random_llama(folder, **shape)
        compiled = optc.compile(
            folder,
            target="onnx-cpu",
            quant="rtn",
            bits=4,
            group_size=128,
            output=artifact,
            pass_option="quantize-rtn.head=true",
        )
        prompt = np.random.default_rng(0).integers(3, shape["vocab"], PROMPT).tolist()
        contenders = {
            "optc": optc_contender(artifact, prompt),
            "bare-onnxruntime": bare_contender(artifact, prompt, arguments.threads),
            "onnxruntime-genai": genai_contender(artifact, prompt),
            "transformers-eager-fp32": transformers_contender(folder, prompt),
        }
        figures = interleave(contenders, arguments.rounds)
    from optc.runtime.measuring.benchmark import median_rate, read_bandwidth

    result = {
        "model": {**shape, "parameters": parameters, "weight_bytes": compiled.manifest.weight_bytes},
        "prompt": PROMPT,
        "decode_steps": STEPS,
        "rounds": arguments.rounds,
        "decode_tokens_per_s": {key: median_rate(rows).to_dict() for key, rows in figures.items()},
        "ratio_of_optc_to": {key: ratio(figures["optc"], figures[key]) for key in figures if key != "optc"},
        "bandwidth_limit_tokens_per_s": read_bandwidth(arguments.threads) / compiled.manifest.weight_bytes,
    }
    record("cpu_decode", result, arguments.threads)


if __name__ == "__main__":
    main()
