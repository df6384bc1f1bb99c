"""llama.cpp as a contender of `edge_peers.py`: a Llama's folder as GGUF in Q4_K_M, its logits and its speed.

It needs `llama-cpp-python`, which is built from source, and `gguf`; `why_not` says what is missing. The folder is
written in 16 bits, as llama.cpp's own converter does it, and quantized by llama.cpp itself. Its library is called
directly, with token ids: so no tokenizer has to go into the file, and it reads what the other contenders read.
"""

from __future__ import annotations

import ctypes
import importlib
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

K_BLOCK = 256
"""Columns of a block of llama.cpp's k-quants. Tensors whose rows are no multiple of it get a type with blocks of 32."""
_Q4_K_M = 15  # LLAMA_FTYPE_MOSTLY_Q4_K_M of llama.h
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def why_not() -> str | None:
    """What is missing for a row of llama.cpp; None where nothing is."""
    for module, package in (("llama_cpp", "llama-cpp-python"), ("gguf", "gguf")):
        try:
            importlib.import_module(module)
        except (ImportError, OSError) as error:  # a library that was built for another machine does not load
            return f"{package} is not here: {error}"
    return None


def write_q4_k_m(model: Path, folder: Path) -> Path:
    """The folder of a Llama as `model-q4_k_m.gguf`; the file in 16 bits is removed."""
    import llama_cpp

    folder.mkdir(parents=True)
    wide, narrow = folder / "model-f16.gguf", folder / "model-q4_k_m.gguf"
    _write_f16(model, wide)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = _Q4_K_M, 2
    with _quiet():
        if llama_cpp.llama_model_quantize(str(wide).encode(), str(narrow).encode(), ctypes.byref(parameters)):
            raise SystemExit(f"llama.cpp cannot quantize {model}")
    wide.unlink()
    return narrow


def runs(file: Path) -> str | None:
    """Why llama.cpp cannot decode a file here, tried in a process of its own; None where it can.

    A library that was built for its own machine may use instructions that this one says it has and does not let run (AMX in
    some virtual machines): it is killed then.
    """
    done = subprocess.run([sys.executable, __file__, str(file)], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"llama.cpp was killed by {signal.Signals(-done.returncode).name}"
    return (done.stderr.strip().splitlines() or [f"llama.cpp ended with {done.returncode}"])[-1]


def stored_types(file: Path) -> dict[str, int]:
    """Type -> tensors of a GGUF file."""
    import gguf

    return dict(Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors))


def fallback(file: Path) -> str:
    """Which tensors have rows that k-quants cannot cut, in words; "" where there are none."""
    import gguf

    tensors = [tensor for tensor in gguf.GGUFReader(file).tensors if len(tensor.shape) > 1]
    odd = Counter(tensor.tensor_type.name for tensor in tensors if int(tensor.shape[0]) % K_BLOCK)
    if not odd:
        return ""
    kinds = ", ".join(f"{count} in {name}" for name, count in sorted(odd.items()))
    return f"{odd.total()} of {len(tensors)} matrices have rows that are no multiple of {K_BLOCK}: not k-quants, but {kinds}"


class LlamaCppSession:
    """A GGUF file as `evaluate` reads a session, and as `speeds` times one.

    Args:
        context: tokens that its cache holds.
    """

    def __init__(self, file: Path, *, threads: int, context: int) -> None:
        import llama_cpp

        self._lib, self.context_length = llama_cpp, context
        with _quiet():
            parameters = llama_cpp.llama_model_default_params()
            self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), parameters)
            if not self._model:
                raise SystemExit(f"llama.cpp cannot open {file}")
            options = llama_cpp.llama_context_default_params()
            options.n_ctx = options.n_batch = context
            options.n_ubatch = 512
            options.n_threads = options.n_threads_batch = threads
            self._context = llama_cpp.llama_init_from_model(self._model, options)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(context, 0, 1)

    def score(self, tokens: Sequence[int]) -> Iterator[np.ndarray[Any, Any]]:
        """Logits float32 [len(tokens), V]."""
        self.forget()
        yield self.feed(tokens, 0, every=True)

    def forget(self) -> None:
        """Empty the cache."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def feed(self, tokens: Sequence[int], start: int, *, every: bool = False) -> np.ndarray[Any, Any]:
        """Append tokens behind `start` others; logits float32 [len(tokens), V] of every one, or [1, V] of the last."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token, start + place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = every or place == len(tokens) - 1
        if self._lib.llama_decode(self._context, batch):
            raise SystemExit("llama.cpp cannot decode")
        rows = len(tokens) if every else 1
        address = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(address, shape=(rows, self.vocab_size)).copy()


def in_llama_cpp(file: Path, threads: int, context: int) -> Any:
    """As `edge_peers.Timed`: greedy steps, each choosing the best token of the one before."""
    session = LlamaCppSession(file, threads=threads, context=context)

    def run(length: int, steps: int) -> tuple[float, float]:
        tokens = [int(item) for item in np.random.default_rng(length).integers(3, session.vocab_size, length)]
        session.forget()
        begin = time.perf_counter()
        chosen = int(session.feed(tokens, 0)[0].argmax())
        first = time.perf_counter()
        for place in range(length, length + steps):
            chosen = int(session.feed([chosen], place)[0].argmax())
        return first - begin, time.perf_counter() - first

    return run


def _write_f16(model: Path, file: Path) -> None:
    """Matrices in float16 and vectors in float32, rows of queries and keys in the order of llama.cpp's rotary embedding."""
    import gguf
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    weights = AutoModelForCausalLM.from_pretrained(model).state_dict()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in weights.items():
        place = _place(name)
        if place == "output.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if (count := heads.get(place.split(".")[-2])) is not None:
            values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(place, values.astype(np.float16 if values.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _place(name: str) -> str:
    """What GGUF calls a weight of a Llama."""
    stem = name.removesuffix(".weight")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{(_NORMS | _LINEARS)[part]}.weight"


@contextmanager
def _quiet() -> Iterator[None]:
    """No lines of llama.cpp's on stderr; it goes on calling what it was given here."""
    import llama_cpp

    _KEPT.append(llama_cpp.llama_log_callback(lambda *_: None))
    llama_cpp.llama_log_set(_KEPT[-1], ctypes.c_void_p())
    yield


_KEPT: list[Any] = []


if __name__ == "__main__":
    LlamaCppSession(Path(sys.argv[1]), threads=1, context=256).feed(range(3, 67), 0)
