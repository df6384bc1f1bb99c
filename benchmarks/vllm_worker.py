"""vLLM in a process of its own, driven by lines of JSON: what benchmarks compare with. It imports nothing of optc.

    PYTHONPATH=SITE python benchmarks/vllm_worker.py FOLDER --options '{"load_format": "dummy"}'

Reads one JSON object per line and answers each with one line, on the standard output that it was started with; vLLM's own
output goes to standard error. Prompts are token ids, answers greedy and without an end.

    {"do": "serve", "prompts": [[1, 2]], "counts": [128]}    {"seconds": 1.5, "tokens": [[5, 6, ...]]}
    {"do": "score", "rows": [[1, 2, 3]]}                     {"log_probabilities": [[-1.2, -0.3]]}
    {"do": "counters"}                                       {"vllm:spec_decode_num_drafts": 10, ...}
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def serve(llm: Any, request: dict[str, Any]) -> dict[str, Any]:
    """All prompts at once; seconds until the last answer is there."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    sampling = [
        SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        for count in request["counts"]
    ]
    begin = time.perf_counter()
    answers = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "tokens": [list(answer.outputs[0].token_ids) for answer in answers]}


def score(llm: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The log-probability of each token but the first."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    answers = llm.generate([{"prompt_token_ids": row} for row in request["rows"]], sampling, use_tqdm=False)
    found = []
    for row, answer in zip(request["rows"], answers, strict=True):
        found.append([step[token].logprob for token, step in zip(row[1:], answer.prompt_logprobs[1:], strict=True)])
    return {"log_probabilities": found}


def counters(llm: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Counters of drafts, whole and by place."""
    return {
        metric.name: getattr(metric, "value", None) if hasattr(metric, "value") else list(metric.values)
        for metric in llm.get_metrics()
        if metric.name.startswith("vllm:spec_decode")
    }


DO: dict[str, Callable[[Any, dict[str, Any]], dict[str, Any]]] = {"serve": serve, "score": score, "counters": counters}


def main() -> None:
    """Open the model, say so, and answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--options", default="{}", help="JSON of arguments of vllm.LLM")
    given = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ.update(ENVIRONMENT)
    begin = time.perf_counter()
    from vllm import LLM
    from vllm import __version__ as version

    llm = LLM(given.folder, skip_tokenizer_init=True, **json.loads(given.options))
    _say(answers, {"ready": time.perf_counter() - begin, "version": version})
    for line in sys.stdin:
        request = json.loads(line)
        _say(answers, DO[request["do"]](llm, request))


def _say(answers: Any, content: dict[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
