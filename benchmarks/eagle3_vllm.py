"""A draft model (EAGLE-3) that `optc train` wrote, in vLLM and here: how many of its drafts are kept.

    python benchmarks/eagle3_vllm.py --vllm SITE --peer-file peer.json       # needs a GPU; writes what vLLM counted
    python benchmarks/eagle3_vllm.py --peer-file peer.json                   # the same prompts here, and the comparison
    python benchmarks/eagle3_vllm.py --base ../shared/models/fiction-26m --draft out/eagle3-26m ...

Greedy answers of 128 tokens to prompts of 128 from unseen books, so many tokens drafted in every step. Here the base and
its draft model are one `inductor-cpu` artifact in fp32; vLLM runs both in bf16. SITE is a folder that holds vLLM.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, record
from speculative import compiled, session
from vllm_peer import VllmPeer

from optc.runtime.generation.tokenizer import load_tokenizer
from optc.runtime.measuring.speculation import cut_prompts, decode
from optc.runtime.sampling import Sampling
from optc.runtime.serving.engine import engine_for
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.speculative.settings import speculation_of

COUNT, LENGTH = 128, 128
DRAFTED = "vllm:spec_decode_num_draft_tokens"
DRAFTS, ACCEPTED = "vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens"


def there(given: argparse.Namespace, prompts: list[list[int]], log: Path) -> dict[str, Any]:
    """vLLM's answers and what it counted."""
    options = {
        "dtype": "bfloat16",
        "enforce_eager": True,
        "gpu_memory_utilization": 0.2,
        "max_model_len": 1024,
        "disable_log_stats": False,
        "speculative_config": {
            "method": "eagle3",
            "model": str(given.draft.resolve()),
            "num_speculative_tokens": given.tokens,
        },
    }
    with VllmPeer(given.vllm, given.base, options, log).wait() as peer:
        answers = peer.ask("serve", prompts=prompts, counts=[COUNT] * len(prompts))["tokens"]
        counted = peer.ask("counters")
        return {
            "version": peer.version,
            "acceptance_length": 1 + counted[ACCEPTED] / counted[DRAFTS],
            "counters": counted,
            "answers": answers,
        }


def here(given: argparse.Namespace, prompts: list[list[int]], place: Path) -> dict[str, Any]:
    """The engine's answers and what it counted."""
    compiled(given.base, place / "base", {"speculative": "eagle3", "draft": given.draft})
    speculation = speculation_of("eagle3", None, given.tokens, adaptive=False)
    engine = engine_for(
        session(place / "base", 1), EngineOptions(max_running=8, speculation=speculation), folder=place / "base"
    )
    found = decode(engine, prompts, COUNT, Sampling())
    figures = engine.metrics().speculation
    assert figures is not None
    engine.close()
    return {
        "acceptance_length": figures.acceptance_length,
        "by_position": list(figures.acceptance_by_position),
        "answers": found.tokens,
    }


def main() -> None:
    """One side, or both compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=ROOT / "examples" / "fiction-3m")
    parser.add_argument("--draft", type=Path, default=ROOT / "examples" / "fiction-3m-eagle3")
    parser.add_argument("--text", type=Path, default=ROOT.parent / "shared" / "text" / "validation.txt")
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--vllm", type=Path, default=None, metavar="SITE")
    parser.add_argument("--peer-file", type=Path, required=True)
    parser.add_argument("--name", default="eagle3_vllm")
    given = parser.parse_args()
    tokenizer = load_tokenizer(given.base)
    assert tokenizer is not None
    text = given.text.read_text(encoding="utf-8")[:2_000_000]
    prompts = cut_prompts(tokenizer.encode(text), given.prompts, LENGTH)
    with tempfile.TemporaryDirectory() as temporary:
        if given.vllm is not None:
            found = there(given, prompts, given.peer_file.with_suffix(".log"))
            given.peer_file.write_text(json.dumps(found))
            print({name: value for name, value in found.items() if name != "answers"})
            return
        peer = json.loads(given.peer_file.read_text())
        ours = here(given, prompts, Path(temporary))
    pairs = list(zip(ours.pop("answers"), peer.pop("answers"), strict=True))
    figures = {
        "base": given.base.name,
        "drafted": given.tokens,
        "prompts": given.prompts,
        "here": ours,
        "vllm": peer,
        "acceptance_ratio": ours["acceptance_length"] / peer["acceptance_length"],
        "equal_answers": sum(a == b for a, b in pairs),
    }
    record(given.name, figures, 1)


if __name__ == "__main__":
    main()
