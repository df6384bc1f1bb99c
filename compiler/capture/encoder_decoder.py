"""Capture of encoder-decoder models: two programs, between which keys and values of cross-attention pass.

The encoder gives its states, and keys and values of every cross-attention layer, which depend on the states alone and are
made once per request. The decoder takes these and the cache that transformers' own forward continues: what a model does
with the past (positions, relative biases, masks) is captured as it is. Rows of a call hold as many tokens; so an answer has
no mask of its own. Cross-attention caches: `EncoderDecoderCache` of transformers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.export import Dim

from optc.compiler.capture.attention import NAME, AttentionError, register
from optc.compiler.capture.eval_mode import in_eval_mode
from optc.compiler.capture.facts import AUDIO, attention_layers, model_facts, refuse_changing_rotary, stated_context
from optc.compiler.capture.implementations import implementations
from optc.compiler.capture.proof.encoder_decoder import prove_encoder_decoder
from optc.compiler.diagnostics import CaptureError
from optc.compiler.ir.contract import CACHE_ROLES, CROSS_ROLES, Contract, CrossFacts, Input, KVCache, Output
from optc.compiler.ir.cross_inputs import decoder_inputs
from optc.compiler.ir.export import run_export
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import drop_dead
from optc.compiler.rewriting.retrace import NamedForward

_MAX_BATCH = 1024
_UNKNOWN_CONTEXT = 1 << 20
_SOURCE, _SEQ, _PAST = 11, 7, 5
"""Sizes of the examples: different, so that torch.export takes none of them for another."""


@dataclass(frozen=True)
class EncoderDecoder:
    """Both programs of a model; `decoder.proof` is that of both together."""

    encoder: Program
    decoder: Program


def _encode(model: Any, source: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    """(ids or features, mask) -> states [B, T, C], then keys and values [B, H, T, D] of each cross-attention."""
    more = {} if mask is None else {"attention_mask": mask}
    encoder = model.get_encoder()
    states = encoder(**{encoder.main_input_name: source}, **more, return_dict=True)[0]
    cache = _empty_cache()
    first = torch.zeros((source.shape[0], 1), dtype=torch.long, device=source.device)
    _decode(model, first, states, cache, mask)
    return states, *_flat(cache.cross_attention_cache)


def _continue(
    model: Any, ids: Tensor, mask: Tensor | None, own: Sequence[Tensor], cross: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """(ids [B, S], encoder's mask, own caches, cross caches) -> logits [B, S, V], then the grown own caches."""
    cache = _empty_cache()
    for layer in range(len(own) // 2):
        cache.self_attention_cache.update(own[2 * layer], own[2 * layer + 1], layer)
        cache.cross_attention_cache.update(cross[2 * layer], cross[2 * layer + 1], layer)
        cache.is_updated[layer] = True
    keys = cross[0]
    width = int(model.get_encoder().config.hidden_size)
    unread = keys.new_zeros((keys.shape[0], keys.shape[2], width))  # only its shape counts: the keys are there
    out = _decode(model, ids, unread, cache, mask)
    return out.logits, *_flat(cache.self_attention_cache)


def _empty_cache() -> Any:
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def _flat(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _decode(model: Any, ids: Tensor, states: Tensor, cache: Any, mask: Tensor | None) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    more = {} if mask is None else {"attention_mask": mask}
    return model(
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        decoder_input_ids=ids,
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
        **more,
    )


@in_eval_mode
def capture_encoder_decoder(
    model: torch.nn.Module, *, prove: bool = True, tokens: Sequence[int] = ()
) -> EncoderDecoder:
    """Capture an encoder-decoder model of transformers in memory, and hold both programs to its own forward.

    Attention is captured as in `capture_model`: one `optc.attention` per layer, or where that cannot say what a layer
    computes (T5's relative biases) transformers' eager attention, which the notes of the proof say.

    Args:
        prove, tokens: as in `capture_model`.

    Raises:
        CaptureError: the model cannot be exported. GateError: the programs are not what it computes.
    """
    refuse_changing_rotary(model.config)
    register()
    note = ""
    try:
        found = _captured(model, NAME)
    except AttentionError as error:
        note = f"captured with eager attention: {error.what}"
        found = _captured(model, "eager")
    if prove:
        proof = prove_encoder_decoder(found.encoder, found.decoder, model, tokens=tokens)
        found.decoder.proof = msgspec.structs.replace(
            proof, notes=(*proof.notes, *_notes(model), *filter(None, [note]))
        )
    return found


def _captured(model: Any, attention: str) -> EncoderDecoder:
    with implementations(model, attention, NAME):
        try:
            return _Capture(model).run()
        except CaptureError as error:
            error.where = error.where or type(model).__name__
            raise


class _Capture:
    """Sizes, examples and contracts of one model."""

    def __init__(self, model: Any) -> None:
        self.model, self.config, encoder = model, model.config, model.get_encoder()
        self.cross = cross_facts(model)
        self.is_audio = encoder.main_input_name == AUDIO
        if not self.is_audio and encoder.main_input_name != "input_ids":
            raise CaptureError(
                f"the encoder reads {encoder.main_input_name}",
                where=type(model).__name__,
                why="encoder-decoder models are taken of text, and of features of sounds",
                remedy="capture encoder and decoder as modules: optc.capture(module, (example, ...))",
            )
        self.device = next(iter(model.parameters())).device
        self.dtype = next(iter(model.parameters())).dtype
        self.batch = Dim("batch", min=1, max=_MAX_BATCH)
        self.context = decoder_context(self.config) or _UNKNOWN_CONTEXT
        self.source, self.mask = self._example()

    def _example(self) -> tuple[Tensor, Tensor | None]:
        if self.is_audio:
            bands, frames = self.features
            made = torch.randn((2, bands, frames), generator=torch.Generator().manual_seed(0))  # the gate feeds it too
            return made.to(self.device, self.dtype), None
        ids = torch.zeros(
            (2, min(_SOURCE, stated_context(self.config) or _SOURCE)), dtype=torch.long, device=self.device
        )
        return ids, torch.ones_like(ids)

    @property
    def features(self) -> tuple[int, int]:
        """(mel bands, frames) of a sound: Whisper's encoder takes its whole window, padded, in two frames per state."""
        bands, states = (getattr(self.config, name, None) for name in ("num_mel_bins", "max_source_positions"))
        if not (isinstance(bands, int) and isinstance(states, int)):
            raise CaptureError(
                "the sizes of the sounds are not known",
                where="config.json: num_mel_bins, max_source_positions",
                remedy="use a model of Whisper's kind",
            )
        encoder = self.model.get_encoder()
        stride = encoder.conv1.stride[0] * encoder.conv2.stride[0] if hasattr(encoder, "conv2") else 1
        return bands, states * int(stride)

    def run(self) -> EncoderDecoder:
        with torch.no_grad():
            cache = _empty_cache()
            states = _encode(self.model, self.source, self.mask)[0]
            first = torch.zeros((2, _PAST), dtype=torch.long, device=self.device)
            _decode(self.model, first[:, : self.context], states, cache, self.mask)
        own, cross = _flat(cache.self_attention_cache), _flat(cache.cross_attention_cache)
        return EncoderDecoder(self._encoder(len(own)), self._decoder(own, cross))

    def _encoder(self, caches: int) -> Program:
        inputs = self._encoder_inputs()
        source = {0: self.batch} if self.is_audio else {0: self.batch, 1: self._source_dim()}
        args = tuple(item for item in (self.source, self.mask) if item is not None)
        exported = self._export(
            lambda source, mask=None: _encode(self.model, source, mask), inputs, args, [source for _ in args]
        )
        facts = model_facts(self.config, getattr(self.model, "generation_config", None))
        contract = Contract(
            kind="module" if self.is_audio else "encoder",
            inputs=tuple(inputs),
            outputs=(
                Output(name="last_hidden_state", role="output" if self.is_audio else "hidden"),
                *(
                    Output(name=name.replace("past_key_values", "present"), role=role)
                    for name, role in _cache_names(caches, "encoder")
                ),
            ),
            model=facts,
            sources={name: (name,) for name in exported.state_dict},
        )
        return _program(exported, contract)

    def _export(
        self, forward: Callable[..., Any], inputs: Sequence[Input], args: tuple[Tensor, ...], shapes: Sequence[Any]
    ) -> torch.export.ExportedProgram:
        shell = NamedForward(self.model, forward, [spec.name for spec in inputs])
        return run_export(shell, args, tuple(shapes), where=type(self.model).__name__)

    def _encoder_inputs(self) -> list[Input]:
        if self.is_audio:
            dtype = str(self.dtype).removeprefix("torch.")
            return [Input(name=AUDIO, role="input", dtype=dtype, dims=("batch", *self.features))]
        names: tuple[Any, ...] = ("input_ids", "attention_mask")
        return [Input(name=name, role=name, dtype="int64", dims=("batch", "source")) for name in names]

    def _source_dim(self) -> Dim:
        return Dim("source", min=1, max=stated_context(self.config) or _UNKNOWN_CONTEXT)

    def _decoder(self, own: list[Tensor], cross: list[Tensor]) -> Program:
        inputs = self._decoder_inputs(own, cross)
        seq, past = Dim("seq", min=1, max=self.context), Dim("past", min=0, max=self.context)
        ids = torch.zeros((2, min(_SEQ, self.context)), dtype=torch.long, device=self.device)
        dims = {"batch": self.batch, "seq": seq, "past": past}
        if not self.is_audio:
            dims["source"] = self._source_dim()
        shapes = [{axis: dims[name] for axis, name in enumerate(spec.dims) if isinstance(name, str)} for spec in inputs]

        def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
            found: dict[Any, list[Tensor]] = defaultdict(list)
            for spec, tensor in zip(inputs, tensors, strict=True):
                found["cross" if spec.role in CROSS_ROLES else "own" if spec.role in CACHE_ROLES else spec.role].append(
                    tensor
                )
            mask = found["encoder_mask"][0] if found["encoder_mask"] else None
            return _continue(self.model, found["input_ids"][0], mask, found["own"], found["cross"])

        masks = [] if self.mask is None else [self.mask]
        args = decoder_inputs(inputs, ids, masks, own, cross)
        exported = self._export(forward, inputs, tuple(args), shapes)
        facts = model_facts(self.config, getattr(self.model, "generation_config", None))
        contract = Contract(
            kind="decoder",
            inputs=tuple(inputs),
            outputs=(
                Output(name="logits", role="logits"),
                *(
                    Output(name=name.replace("past_key_values", "present"), role=role)
                    for name, role in _cache_names(len(own), "decoder")
                ),
            ),
            kv_cache=KVCache(kind="linear"),
            model=msgspec.structs.replace(facts, context_length=decoder_context(self.config)),
            sources={name: (name,) for name in exported.state_dict},
            cross=self.cross,
        )
        return _program(exported, contract)

    def _decoder_inputs(self, own: list[Tensor], cross: list[Tensor]) -> list[Input]:
        dtype = str(own[0].dtype).removeprefix("torch.")
        inputs = [Input(name="input_ids", role="input_ids", dtype="int64", dims=("batch", "seq"))]
        if not self.is_audio:
            inputs.append(
                Input(name="encoder_attention_mask", role="encoder_mask", dtype="int64", dims=("batch", "source"))
            )
        sides = (("decoder", own, "past"), ("encoder", cross, cross[0].shape[2] if self.is_audio else "source"))
        for layer in range(len(own) // 2):
            for side, tensors, length in sides:
                names = _cache_names(len(own), side)[2 * layer : 2 * layer + 2]
                for (name, role), tensor in zip(names, tensors[2 * layer : 2 * layer + 2], strict=True):
                    dims = ("batch", int(tensor.shape[1]), length, int(tensor.shape[3]))
                    inputs.append(Input(name=name, role=role, dtype=dtype, dims=dims))
        return inputs


def _cache_names(count: int, side: str) -> list[tuple[str, Any]]:
    """(name, role) of the keys and values of each layer, as optimum's models of ONNX Runtime name them."""
    roles = ("key_cache", "value_cache") if side == "decoder" else ("cross_keys", "cross_values")
    return [
        (f"past_key_values.{layer}.{side}.{part}", role)
        for layer in range(count // 2)
        for part, role in zip(("key", "value"), roles, strict=True)
    ]


def _program(exported: torch.export.ExportedProgram, contract: Contract) -> Program:
    """A program of its own part of the model alone."""
    program = Program(exported, contract)
    drop_dead(program)
    kept = {name: contract.sources[name] for name in exported.state_dict}
    return program.with_contract(layers=attention_layers(exported), sources=kept).changed()


def decoder_context(config: Any) -> int:
    """Most tokens of an answer, the start token included; 0 where the config names none."""
    return getattr(config, "max_target_positions", None) or stated_context(config)


_IGNORED = ("num_beams", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "forced_eos_token_id")
"""Settings of a generation config that change greedy answers, and that optc leaves to its user: the values that do not."""


def cross_facts(model: Any) -> CrossFacts:
    """How the model's answers begin, from its generation config and config.

    Raises:
        CaptureError: they name no token that an answer starts with.
    """
    generation, config = getattr(model, "generation_config", None), model.config

    def stated(name: str) -> Any:
        found = getattr(generation, name, None)
        return getattr(config, name, None) if found is None else found

    start = stated("decoder_start_token_id")
    start = stated("bos_token_id") if start is None else start
    if not isinstance(start, int):
        raise CaptureError(
            "the model does not say what its answers start with",
            where="config.json: decoder_start_token_id",
            why=f"it is {start!r}",
            remedy="name the token there; its documentation knows it",
        )
    return CrossFacts(
        start_token_id=start,
        forced_first_id=stated("forced_bos_token_id"),
        suppressed_ids=tuple(getattr(generation, "suppress_tokens", None) or ()),
        first_suppressed_ids=tuple(getattr(generation, "begin_suppress_tokens", None) or ()),
    )


def _notes(model: Any) -> list[str]:
    generation = getattr(model, "generation_config", None)
    said = {name: getattr(generation, name, None) for name in _IGNORED}
    given = [f"{name} {value}" for name, value in said.items() if value and (name, value) != ("num_beams", 1)]
    return [f"generation_config.json asks for {', '.join(given)}: optc does not follow it"] if given else []
