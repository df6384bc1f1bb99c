"""Text that a model writes itself, greedily, behind passages of a text: what its draft heads will see when they are used.

    python benchmarks/self_generated.py --model examples/fiction-3m --text book.txt --rows 512 -o own.jsonl
    optc train --recipe medusa --model examples/fiction-3m --text own.jsonl --set data.append_eos=false -o out/heads

Each row of the output is {"tokens": [...]}: a passage, spread evenly over the text, and its continuation.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from optc.compiler.ir.devices import choose_device
from optc.runtime.generation.tokenizer import load_tokenizer
from optc.training.corpus import read_corpus
from optc.training.models import load_frozen


def passages(text: Tensor, rows: int, length: int) -> Tensor:
    """int64 [rows, length]: passages of a text [n], at even distances."""
    starts = torch.linspace(0, len(text) - length, rows).long()
    return text[starts[:, None] + torch.arange(length)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each passage")
    parser.add_argument("--length", type=int, default=257, help="tokens of each row, the passage's among them")
    parser.add_argument("--batch", type=int, default=1024, help="rows that are written together")
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--output", type=Path, required=True)
    asked = parser.parse_args()
    device = choose_device(asked.device)
    model = load_frozen(asked.model).to(device)
    tokenizer = load_tokenizer(asked.model)
    found = read_corpus([asked.text], tokenizer, vocab_size=model.config.vocab_size, end_token=None).documents
    prompts = passages(torch.cat(found), asked.rows, asked.prompt).to(device)
    with asked.output.open("w") as file, torch.inference_mode():
        for begin in range(0, asked.rows, asked.batch):
            part = prompts[begin : begin + asked.batch]
            size = asked.length - asked.prompt
            rows = model.generate(
                part,
                attention_mask=torch.ones_like(part),
                do_sample=False,
                max_new_tokens=size,
                min_new_tokens=size,  # no end of text
                use_cache=True,
            )
            file.writelines(json.dumps({"tokens": row}) + "\n" for row in rows.tolist())
            print(f"{begin + len(part)} of {asked.rows} rows", flush=True)


if __name__ == "__main__":
    main()
