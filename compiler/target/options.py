"""What a compile is asked for, as typed structs, and what a target gets of it with nothing left open.

A field's type holds its bounds and its help (`msgspec.Meta`). Command-line flags, the keys of recipes, `optc targets`
and the tables in the docs are made of these fields; nothing else lists them. A field's name is its key and, with
hyphens, its flag; names are unique among all structs of a request, and two targets may share one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from optc.compiler.diagnostics import UsageError
from optc.compiler.formats.group_sizes import GroupSize

ComputeType = Literal["fp32", "bf16", "fp16"]

MaxSeqLen = Annotated[
    int,
    Meta(
        ge=1,
        description="Capacity of a static KV cache, in tokens.",
        extra={"default": "the model's context, at most 2048"},
    ),
]


def head_bits(plain: int, left: str) -> Meta:
    """What is known about the option of a target for the embedding and the head; `plain` bits leave the tensors as `left` says."""
    return Meta(
        description="Bits of the embedding and the head, which share one tensor where the model ties them; "
        f"{plain} leaves them in {left}.",
        extra={"default": f"8 with --quant, else {plain}"},
    )


class QuantRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How weights (and activations) are quantized; None takes the method's or the target's own."""

    quant: Annotated[str, Meta(description="Quantization method: rtn, gptq, awq, ...; see optc targets.")] | None = None
    bits: (
        Annotated[int, Meta(ge=2, le=8, description="Bits per weight.", extra={"default": "4, or the method's own"})]
        | None
    ) = None
    average_bits: (
        Annotated[
            float,
            Meta(ge=2, le=8, description="Mean bits per weight for --quant auto.", extra={"default": "4"}),
        ]
        | None
    ) = None
    group_size: (
        Annotated[
            Annotated[int, Meta(ge=0, le=1 << 20)] | Literal["auto"],
            Meta(
                description="Weights per scale; 0 is one scale per row; auto takes for each linear the largest, up to 128, "
                "that divides it and that the target runs, and leaves a linear as it is that none divides.",
                extra={
                    "default": "the largest of 128, 64, 32 that divides every linear",
                    "metavar": "INTEGER|auto",
                    "expected": "an integer from 0 to 1048576, or auto",
                },
            ),
        ]
        | None
    ) = None
    symmetric: (
        Annotated[
            bool,
            Meta(
                description="Without or with zero points.",
                extra={"negation": "asymmetric", "default": "symmetric"},
            ),
        ]
        | None
    ) = None
    ignore: Annotated[
        tuple[str, ...],
        Meta(
            description="Leave weights of this name unquantized (repeatable), e.g. '*.down_proj.*'.",
            extra={"metavar": "PATTERN"},
        ),
    ] = ()


def _read_layers(value: Any) -> tuple[int, ...]:
    """Numbers of layers: "2,4,5" or a list."""
    items = [item.strip() for item in value.split(",")] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not items:
        raise TypeError
    found = tuple(item if isinstance(item, int) and not isinstance(item, bool) else int(str(item)) for item in items)
    if min(found) < 0 or max(found) >= 1 << 16:
        raise TypeError
    return found


NO_CACHE = "none"
"""The kind of KV cache of a decoder that computes the whole text for each token."""


class CacheRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The KV cache of a decoder."""

    kv_cache: (
        Annotated[
            Literal["static", "paged", "none"],
            Meta(
                description="Kind of KV cache; none computes the whole text again for each token.",
                extra={"default": "the target's first"},
            ),
        ]
        | None
    ) = None


class DraftingRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a program gives beside its logits for speculative decoding, and the base of a model that drafts."""

    medusa: (
        Annotated[
            Path,
            Meta(
                description="With a paged cache: folder of Medusa heads that were trained for this model; the program drafts "
                "by itself.",
                extra={"metavar": "FOLDER"},
            ),
        ]
        | None
    ) = None
    base: (
        Annotated[
            Path,
            Meta(
                description="Of a draft model (EAGLE-3): folder of the model that it drafts for, whose embedding it shares."
            ),
        ]
        | None
    ) = None
    expose_hidden: Annotated[
        tuple[int, ...],
        Meta(
            description="With a paged cache: layers whose inputs the program gives beside the logits, for a draft model that "
            "reads them (EAGLE-3); counted from 0.",
            extra={
                "read": _read_layers,
                "joined": True,
                "metavar": "N,N,N",
                "expected": "numbers of layers, as text with commas or a list",
            },
        ),
    ] = ()


class TargetOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of a target's own options; each target that has some declares a subclass. This one has none.

    Attributes:
        target: the target's name.
    """

    target: ClassVar[str] = ""

    def check(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            UsageError: names the flag.
        """


class DraftedOptions(TargetOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the options of targets whose artifacts may hold another model, which drafts for the model."""

    speculative: (
        Annotated[
            Literal["draft", "eagle3"],
            Meta(
                description="Compile into the artifact what drafts for the model: a smaller model (draft), or a layer that reads "
                "the model's hidden states (eagle3). It needs --draft, and a paged cache, which is then the default."
            ),
        ]
        | None
    ) = None
    draft: (
        Annotated[
            Path,
            Meta(
                description="With --speculative: folder of the model that drafts, with the same tokenizer.",
                extra={"metavar": "FOLDER"},
            ),
        ]
        | None
    ) = None

    def check(self) -> None:
        """See `TargetOptions`."""
        if self.speculative is not None and self.draft is None:
            raise UsageError(
                f"--speculative {self.speculative} needs the model that drafts", remedy="give --draft FOLDER"
            )
        if self.draft is not None and self.speculative is None:
            raise UsageError("--draft has no effect without --speculative", remedy="add --speculative draft, or eagle3")


class Drafted(NamedTuple):
    """The method by which another model in the artifact drafts, and its folder."""

    method: Literal["draft", "eagle3"]
    folder: Path


def drafted_by(own: TargetOptions) -> Drafted | None:
    """What a target's own options put beside the model; None without one that drafts."""
    if not isinstance(own, DraftedOptions) or own.speculative is None or own.draft is None:
        return None
    return Drafted(own.speculative, own.draft)


class Quantization(msgspec.Struct, frozen=True, kw_only=True):
    """A chosen quantization.

    Attributes:
        method: name of a method (`targets/methods.py`).
        bits: per weight; None where the method chooses them for each linear.
        average_bits: the mean that such a method keeps; None for other methods.
        group_size: weights per scale, 0 for a row; several, of which each linear gets the first that divides it. None:
            the method has blocks of its own, or, before the model is read, the largest of the default sizes that
            divides every linear (`optc.resolving.settled`).
        symmetric: without zero points.
        ignore: patterns of weights that stay as they are.
    """

    method: str
    bits: int | None
    average_bits: float | None = None
    group_size: GroupSize = None
    symmetric: bool = True
    ignore: tuple[str, ...] = ()


OwnT = TypeVar("OwnT", bound=TargetOptions)


class CompileOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a target's recipe gets: dtype, quantization, cache and the target's own options, all chosen.

    Attributes:
        dtype: fp32, bf16 or fp16.
        quantization: None compiles the weights as they are.
        kv_cache: None for targets whose engine has caches of its own; `NO_CACHE` where the program is to have none.
        expose_hidden: layers whose inputs a paged program gives beside the logits.
        medusa: folder of heads, see `DraftingRequest`; `medusa_weights` is the sha256 of what it holds.
        own: an instance of the target's `options`.
    """

    dtype: str
    quantization: Quantization | None = None
    kv_cache: str | None = None
    expose_hidden: tuple[int, ...] = ()
    medusa: Path | None = None
    medusa_weights: str = ""
    own: TargetOptions = TargetOptions()

    def of(self, cls: type[OwnT]) -> OwnT:
        """The target's own options, which are of type `cls`."""
        assert isinstance(self.own, cls), (self.own, cls)
        return self.own
