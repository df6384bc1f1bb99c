"""Serving options: the YAML that `trtllm-serve MODEL --extra_llm_api_options FILE` takes.

Keys are fields of TensorRT-LLM's `LlmArgs` (tensorrt_llm/llmapi/llm_args.py).
"""

from __future__ import annotations

from typing import Any

import yaml

from optc.exporters.options.hf import DRAFT, NGRAM, ServeOptions

FILE = "serve.yaml"
DRAFT_TOKENS = 4
_MATCHED = 4  # longest run of tokens that is looked up in the text so far


def serving_options(options: ServeOptions, context_length: int, cache_fp8: bool) -> str:
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


def _speculative(options: ServeOptions) -> dict[str, Any] | None:
    count = options.draft_tokens or DRAFT_TOKENS
    if options.speculative is None:
        return None
    if options.speculative == NGRAM:
        return {"decoding_type": "NGram", "max_draft_len": count, "max_matching_ngram_size": _MATCHED}
    folder = options.speculative.removeprefix(DRAFT)
    return {"decoding_type": "DraftTarget", "max_draft_len": count, "speculative_model_dir": folder}
