"""Serving options: the YAML that `trtllm-serve MODEL --extra_llm_api_options FILE` takes.

Keys are fields of TensorRT-LLM's `LlmArgs` (tensorrt_llm/llmapi/llm_args.py).
"""

from __future__ import annotations

from typing import Any

import yaml

from optc.compiler.diagnostics import UsageError
from optc.compiler.target.target import CompileOptions

FILE = "serve.yaml"
DRAFT_TOKENS = 4
_NGRAM, _DRAFT = "ngram", "draft:"
_MATCHED = 4  # longest run of tokens that is looked up in the text so far


def check_serving(options: CompileOptions) -> None:
    """Refuse options that contradict each other.

    Raises:
        UsageError: names the flag.
    """
    for name in ("max_batch", "max_num_tokens", "max_seq_len", "draft_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"{_flag(name)} {value} is not positive", remedy=f"leave {_flag(name)} out")
    batch, tokens = options.max_batch, options.max_num_tokens
    if batch is not None and tokens is not None and tokens < batch:
        raise UsageError(
            f"--max-num-tokens {tokens} is less than --max-batch {batch}",
            why="each request of a batch runs one token at least", remedy=f"use {batch} or more",
        )  # fmt: skip
    if options.speculative is None and options.draft_tokens is not None:
        raise UsageError(
            "--draft-tokens does nothing without --speculative", remedy="add --speculative ngram"
        )
    method = options.speculative
    if method is not None and method != _NGRAM and not method.startswith(_DRAFT):
        raise UsageError(
            f"unknown speculative decoding '{method}'", remedy="use --speculative ngram, or draft:DIR"
        )
    if method == _DRAFT:
        raise UsageError("--speculative draft: names no model", remedy="use draft:DIR")


def serving_options(options: CompileOptions, context_length: int, cache_fp8: bool) -> str:
    """The text of the YAML file; the longest sequence is the model's context where it is not given."""
    values: dict[str, Any] = {
        "max_batch_size": options.max_batch,
        "max_num_tokens": options.max_num_tokens,
        "max_seq_len": options.max_seq_len or context_length or None,
        "kv_cache_config": {"dtype": "fp8" if cache_fp8 else "auto"},
        "speculative_config": _speculative(options),
    }
    kept = {key: value for key, value in values.items() if value is not None}
    text: str = yaml.safe_dump(kept, sort_keys=False)
    return text


def _speculative(options: CompileOptions) -> dict[str, Any] | None:
    count = options.draft_tokens or DRAFT_TOKENS
    if options.speculative is None:
        return None
    if options.speculative == _NGRAM:
        return {"decoding_type": "NGram", "max_draft_len": count, "max_matching_ngram_size": _MATCHED}
    folder = options.speculative.removeprefix(_DRAFT)
    return {"decoding_type": "DraftTarget", "max_draft_len": count, "speculative_model_dir": folder}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
