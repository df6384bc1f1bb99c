"""What the graph alone cannot say: meanings of inputs, attention facts, cache layout, provenance."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from optc.compiler.ir.draft_tree import DraftTree

MOST = 1 << 62
"""The largest size and count: JSON has no bound, arrays and their products do."""
Count = Annotated[int, msgspec.Meta(ge=0, le=MOST)]
_TYPE = r"\A(bool|u?int(8|16|32|64)|b?float16|float(32|64)|complex(64|128)|float8_e4m3fn|float8_e5m2)\Z"
TypeName = Annotated[str, msgspec.Meta(pattern=_TYPE)]
"""What torch calls a type of elements: files are held to it, as engines look the name up."""

InputRole = Literal[
    "input_ids",
    "position_ids",
    "attention_mask",
    "token_type_ids",
    "slot_mapping",
    "block_tables",
    "context_lens",
    "cu_seqlens",
    "tree",
    "logits_indices",
    "logits_from_end",
    "past_lengths",
    "key_cache",
    "value_cache",
    "row_state",
    "base_states",
    "own_states",
    "encoder_states",
    "encoder_mask",
    "cross_keys",
    "cross_values",
    "input",
]
"""row_state: see `STATE_ROLE`. tree: which new tokens of its request each token sees; see `paged_tree_attention_`.

base_states and own_states: of a draft model, a row per token; see `DraftFacts`. encoder_states, encoder_mask, cross_keys
and cross_values: of a decoder that reads an encoder; see `CrossFacts`."""
OutputRole = Literal[
    "logits",
    "classes",
    "hidden",
    "embedding",
    "aux_hidden",
    "drafted",
    "key_cache",
    "value_cache",
    "row_state",
    "cross_keys",
    "cross_values",
    "output",
]
"""logits: over the vocabulary. classes: logits over few classes, per token or per sequence. hidden: of an encoder, or what
the head of a decoder reads. embedding: one vector per sequence, float32. aux_hidden: what some layers of a decoder read.
drafted: guesses of the tokens behind the next. cross_keys and cross_values: of an encoder, what a decoder's cross-attention reads of its states."""
CACHE_ROLES: tuple[Literal["key_cache"], Literal["value_cache"]] = ("key_cache", "value_cache")
"""Inputs that hold keys and values of earlier tokens, and outputs that hold those of the new ones too."""
STATE_ROLE: Literal["row_state"] = "row_state"
"""What a recurrent layer holds of a row's earlier tokens, [B, ...], of one size whatever their number. It is the state behind
all of them: a row cannot be taken back to fewer, only begun anew."""
HELD_ROLES = (*CACHE_ROLES, STATE_ROLE)
"""What a decoder with a linear cache keeps of a row's earlier tokens: goes in, and comes out for the next call."""
CROSS_ROLES: tuple[Literal["cross_keys"], Literal["cross_values"]] = ("cross_keys", "cross_values")
"""Keys and values of cross-attention, [B, H, T, D]: outputs of the encoder, inputs of the decoder, made once per request."""
Kind = Literal["decoder", "encoder", "module"]


class Input(msgspec.Struct, frozen=True, kw_only=True):
    """One graph input, in call order. `dims` holds an int or the name of a dynamic axis."""

    name: str
    role: InputRole
    dtype: TypeName
    dims: tuple[int | str, ...]


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """One graph output, in order.

    Attributes:
        layers: of hidden states, the layers whose inputs they are, side by side.
        columns: of guesses of tokens [rows, columns], else 0; with a `DraftTree` its ranks of each head, one head after the
            other.
    """

    name: str
    role: OutputRole
    layers: tuple[int, ...] = ()
    columns: int = 0


class AttentionFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One attention layer. `window` counts tokens including the query itself, `chunk` those of a chunk; 0 is none."""

    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    value_dim: Count
    scale: float
    causal: bool
    window: Count = 0
    softcap: float = 0.0
    sinks: bool = False
    chunk: Count = 0


class KVCache(msgspec.Struct, frozen=True, kw_only=True):
    """How the program keeps keys and values.

    none: the whole sequence is an input. linear: key/value caches [B, Hkv, P, D], either grown
    and returned (`in_place` False) or of fixed capacity and written in place. paged: one pool
    [num_blocks, block_size, Hkv, D] per layer for K and one for V, over a flattened token axis.

    `capacity` > 0: linear caches of that many tokens, taken and returned whole, written from `past_lengths` on.
    """

    kind: Literal["none", "linear", "paged"] = "none"
    in_place: bool = False
    block_size: Count = 0
    capacity: Count = 0


ActivationFormat = Literal["", "int8", "uint8", "fp8", "fp8-128", "nvfp4"]
"""uint8: with a zero point and one scale for the whole tensor, both fixed."""


class WeightQuantization(msgspec.Struct, frozen=True, kw_only=True):
    """How one linear's weight [N, K] is stored, and what its input is rounded to.

    `group_size` runs along K; 0 means per channel (fp8: or one scale for the whole weight). `activations` is ""
    when the input is not quantized.
    """

    method: str
    bits: int
    group_size: int
    symmetric: bool
    source: str
    format: str = "int"
    activations: ActivationFormat = ""


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Facts of the source model that runtimes ask for. Token ids may be absent."""

    model_type: str = ""
    architecture: str = ""
    vocab_size: Count = 0
    context_length: Count = 0
    hidden_size: Count = 0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None


class DraftFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a draft model that reads hidden states of a base was made for (EAGLE-3). Hashes are "" where none is known.

    Its input `base_states` holds hidden states of the base, side by side; 0 where there are none. `own_states` is its own
    output `hidden` of the token before; 0 where the base's are there.

    Attributes:
        boundaries: hidden states that are read: j is what enters layer j of the base.
        max_draft_tokens: in a row.
        base_config, base_weights, tokenizer: sha256 of the base's config.json, of its weights, of its tokenizer.json.
    """

    boundaries: tuple[int, ...]
    max_draft_tokens: int
    base_config: str = ""
    base_weights: str = ""
    tokenizer: str = ""


class EmbeddingFacts(msgspec.Struct, frozen=True, kw_only=True):
    """How texts become embeddings, of a program whose output is one.

    Attributes:
        size: numbers of an embedding.
        pooling: how hidden states of tokens become one vector, by sentence-transformers' names; several side by side.
        normalized: embeddings have length 1.
        lower_case: texts are lower-cased before they are encoded.
        prompts: what may be put before a text, by name ("query", "document"). default_prompt: the one that is put there
            unless another is asked for; None is no prompt.
    """

    size: Count
    pooling: tuple[str, ...]
    normalized: bool = False
    lower_case: bool = False
    prompts: dict[str, str] = {}
    default_prompt: str | None = None


class CrossFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What generating asks of a decoder that reads an encoder.

    Its linear caches hold as many tokens of each row, so that it takes no mask of its own: how many is their length.

    Attributes:
        start_token_id: what every answer begins with, and is not part of it.
        forced_first_id: the first token of every answer; None where the model chooses it.
        suppressed_ids: tokens that are never chosen. first_suppressed_ids: nor as the first.
    """

    start_token_id: Count
    forced_first_id: Count | None = None
    suppressed_ids: tuple[Count, ...] = ()
    first_suppressed_ids: tuple[Count, ...] = ()


class Contract(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a Program that is not its graph.

    `position_rule` records `position[b, i] = base[b] + i`: masks and caches are proved under it.
    `sources` maps each weight of the graph to the tensor names of the checkpoint it came from.
    `layers` has one entry per attention operator, in graph order.
    `draft` is None but for draft models that read a base, `embedding` but for encoders that give embeddings, `cross` but for
    decoders that read an encoder, `tree` but for programs that draft trees.
    """

    kind: Kind
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    position_rule: bool = False
    layers: tuple[AttentionFacts, ...] = ()
    kv_cache: KVCache = KVCache()
    model: ModelFacts = ModelFacts()
    sources: dict[str, tuple[str, ...]] = {}
    quantization: dict[str, WeightQuantization] = {}
    passes: tuple[str, ...] = ()
    draft: DraftFacts | None = None
    embedding: EmbeddingFacts | None = None
    cross: CrossFacts | None = None
    tree: DraftTree | None = None

    def input_index(self, role: InputRole) -> int | None:
        """Position of the first input with this role, or None."""
        return next((i for i, spec in enumerate(self.inputs) if spec.role == role), None)

    @property
    def holds_its_tree(self) -> bool:
        """Whether the tree is one of the guesses that the program gives, and the program takes trees; or there is none."""
        drafted = next((spec.columns for spec in self.outputs if spec.role == "drafted"), 0)
        return self.tree is None or (
            self.tree.heads * self.tree.ranks == drafted
            and bool(self.tree.nodes)
            and self.input_index("tree") is not None
        )

    @property
    def compared_as(self) -> OutputRole:
        """What runs are compared as: the role of the first output; "output", each by itself, of an encoder with several."""
        return "output" if self.answers > 1 else self.outputs[0].role

    @property
    def answers(self) -> int:
        """How many outputs answer a text, the first ones: of an encoder all but what a decoder reads, else one."""
        return sum(spec.role not in CROSS_ROLES for spec in self.outputs) if self.kind == "encoder" else 1

    @property
    def keeps_states(self) -> bool:
        """Whether rows have states beside keys and values; see `STATE_ROLE`."""
        return self.input_index(STATE_ROLE) is not None
