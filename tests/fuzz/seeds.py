"""What is mutated: a tiny model, and what optc makes of it, made once in a folder that is given."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT_TEXT = "The quick brown fox jumps over the lazy dog and reads the sea, all night long. " * 12


class Seeds:
    """Folders by name; each is made when it is asked for, and kept.

    Args:
        folder: where they lie; may be one of an earlier run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def model(self) -> Path:
        """A Llama of one layer with a tokenizer of characters."""
        return self._made("model", _write_model)

    def wide_model(self) -> Path:
        """The same with rows and columns of 128 numbers, for what is quantized in blocks."""
        return self._made("wide-model", lambda place: _write_model(place, 128, pairs=2))

    def experts(self) -> Path:
        """A Mixtral of one layer, two of whose four experts read a token."""
        return self._made("experts", _write_experts)

    def bitsandbytes(self) -> Path:
        """The wide model as transformers writes it in 4 bits of bitsandbytes."""
        from bitsandbytes_folders import write_bitsandbytes

        source = self.wide_model()
        return self._made("bitsandbytes", lambda place: write_bitsandbytes(place, source))

    def sentences(self) -> Path:
        """A BERT of one layer with its pooling, as sentence-transformers writes it."""
        return self._made("sentences", _write_sentences)

    def encoder_decoder(self) -> Path:
        """A T5 of one layer with the same tokenizer."""
        return self._made("encoder-decoder", _write_encoder_decoder)

    def text(self) -> Path:
        """A text that is long enough for the gate, calibration and training."""
        return self._made("text.txt", lambda place: place.write_text(PROMPT_TEXT))

    def compiled(self, name: str, *arguments: str, model: Callable[[Seeds], Path] | None = None) -> Path:
        """An artifact of a model, the plain one if none is given: `optc compile MODEL ARGUMENTS`."""
        folder = (model or Seeds.model)(self)
        return self._made(name, lambda place: _optc("compile", folder, *arguments, "-o", place))

    def stages(self) -> list[Path]:
        """Finished stages of a work folder."""

        def make(place: Path) -> None:
            place.mkdir()
            out = self.folder / "stages-artifact"
            quantized = ("--target", "vllm", "--quant", "rtn", "--group-size", "32")
            _optc("compile", self.model(), *quantized, "--work-dir", place, "-o", out, "--force")

        return sorted(path.parent for path in self._made("stages", make).rglob("graph.json"))

    def _made(self, name: str, make: Callable[[Path], Any]) -> Path:
        place = self.folder / name
        with (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes one makes it
            if not place.exists():
                part = self.folder / f"{name}.part"
                shutil.rmtree(part, ignore_errors=True)
                make(part)
                part.rename(place)
        return place


def split_safetensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, tensors) of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _optc(*arguments: object) -> None:
    from optc.cli.main import main

    try:
        main([str(item) for item in arguments])
    except SystemExit as done:
        if done.code not in (0, None):
            raise RuntimeError(f"optc {arguments} ended with {done.code}") from done


def _write_model(folder: Path, size: int = 32, pairs: int = 1) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=size,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=pairs,
        intermediate_size=2 * size,
        vocab_size=128,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4.0)
    model.save_pretrained(folder)
    _write_tokenizer(folder)


def _write_experts(folder: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        num_local_experts=4,
        vocab_size=128,
        max_position_embeddings=256,
    )
    transformers.MixtralForCausalLM(config).eval().save_pretrained(folder)
    _write_tokenizer(folder)


def _write_sentences(folder: Path) -> None:
    import torch
    import transformers
    from sentence_folders import MEAN, write_sentence_folder

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}
    config = transformers.BertConfig(num_hidden_layers=1, vocab_size=128, pad_token_id=0, **sizes)
    write_sentence_folder(folder, [*MEAN, ("Normalize", {})], model=transformers.BertModel(config).eval())
    _write_tokenizer(folder)


def _write_encoder_decoder(folder: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 128}
    ends = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **ends)).eval().save_pretrained(folder)
    _write_tokenizer(folder)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = [chr(code) for code in range(32, 127)] + ["\n"]
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: i + 3 for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
