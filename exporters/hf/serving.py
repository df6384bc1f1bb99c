"""Serving options: YAML for `trtllm-serve MODEL --extra_llm_api_options FILE` and `vllm serve MODEL --config FILE`.

Keys of the former are fields of TensorRT-LLM's `LlmArgs` (tensorrt_llm/llmapi/llm_args.py), those of the latter are vLLM's
own flags. A draft model in the folder is named by its place there: servers are started in the folder.
"""

from __future__ import annotations

import json
from typing import Any

import yaml

from optc.compiler.model_folder.eagle3 import Eagle3Config
from optc.exporters.hf.drafts import FOLDER
from optc.exporters.options.hf import DRAFT, NGRAM, DraftingServer, FolderOptions, ServeOptions

FILE = "serve.yaml"
DRAFT_TOKENS = 4
_MATCHED = 4  # longest run of tokens that is looked up in the text so far


def serving_options(
    options: ServeOptions, context_length: int, cache_fp8: bool, draft: Eagle3Config | None = None
) -> str:
    """The text of TensorRT-LLM's YAML file; the longest sequence is the model's context where it is not given.

    Args:
        draft: of the draft model in the folder.
    """
    values: dict[str, Any] = {
        "max_batch_size": options.max_batch,
        "max_num_tokens": options.max_num_tokens,
        "max_seq_len": options.max_seq_len or context_length or None,
        "kv_cache_config": {"dtype": "fp8" if cache_fp8 else "auto"},
        "speculative_config": _of_trtllm(options, draft),
    }
    kept = {key: value for key, value in values.items() if value is not None}
    text: str = yaml.safe_dump(kept, sort_keys=False)
    return text


def vllm_options(options: FolderOptions, draft: Eagle3Config | None) -> str | None:
    """The text of vLLM's YAML file; None where there is nothing to say."""
    if options.speculative is None:
        return None
    method, count = _drafting(options, draft)
    if method == NGRAM:
        told = {"method": NGRAM, "prompt_lookup_max": _MATCHED}
    elif draft is not None:
        told = {"method": "eagle3", "model": FOLDER}
    else:
        told = {"method": "draft_model", "model": method}
    text: str = yaml.safe_dump({"speculative-config": json.dumps({**told, "num_speculative_tokens": count})})
    return text


def _of_trtllm(options: ServeOptions, draft: Eagle3Config | None) -> dict[str, Any] | None:
    if options.speculative is None:
        return None
    method, count = _drafting(options, draft)
    if method == NGRAM:
        return {"decoding_type": "NGram", "max_draft_len": count, "max_matching_ngram_size": _MATCHED}
    if draft is None:
        return {"decoding_type": "DraftTarget", "max_draft_len": count, "speculative_model_dir": method}
    behind = [number - 1 for number in draft.boundaries]  # it counts layers by what they give
    told = {"decoding_type": "Eagle3", "max_draft_len": count, "speculative_model_dir": FOLDER}
    return {**told, "eagle3_layers_to_capture": behind}


def _drafting(options: DraftingServer, draft: Eagle3Config | None) -> tuple[str, int]:
    """n-grams, or the folder of a model; and how many tokens are drafted."""
    assert options.speculative is not None
    count = options.draft_tokens or (DRAFT_TOKENS if draft is None else draft.max_draft_tokens)
    return options.speculative.removeprefix(DRAFT), count
