"""Options of the targets that are model folders: vllm and trtllm."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from optc.compiler.diagnostics import UsageError
from optc.compiler.target.options import TargetOptions

NGRAM, DRAFT, EAGLE3 = "ngram", "draft:", "eagle3:"


class DraftingServer(TargetOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the options of folders whose server is told how to draft."""

    speculative: (
        Annotated[
            str,
            Meta(
                description="Speculative decoding in the serving options: by n-grams of the text, by a smaller model's folder, "
                "or by a draft model of EAGLE-3, which is written into the folder.",
                extra={"metavar": "ngram|draft:DIR|eagle3:DIR"},
            ),
        ]
        | None
    ) = None
    draft_tokens: (
        Annotated[
            int, Meta(ge=1, description="Tokens drafted in each step.", extra={"default": "4; eagle3 the model's"})
        ]
        | None
    ) = None

    @property
    def carried(self) -> Path | None:
        """The folder of a draft model that is to be written into the artifact."""
        named = self.speculative is not None and self.speculative.startswith(EAGLE3)
        return Path((self.speculative or "").removeprefix(EAGLE3)) if named else None

    def check(self) -> None:
        """See `TargetOptions`."""
        method = self.speculative
        if method is None and self.draft_tokens is not None:
            raise UsageError("--draft-tokens has no effect without --speculative", remedy="add --speculative ngram")
        if method is not None and method != NGRAM and not method.startswith((DRAFT, EAGLE3)):
            raise UsageError(
                f"unknown speculative decoding '{method}'", remedy="use --speculative ngram, draft:DIR or eagle3:DIR"
            )
        if method in (DRAFT, EAGLE3):
            raise UsageError(f"--speculative {method} names no model", remedy=f"use {method}DIR")


class FolderOptions(DraftingServer, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of the target vllm. No layout is compressed-tensors; a given one is refused where nothing is quantized."""

    target: ClassVar[str] = "vllm"

    layout: (
        Annotated[
            Literal["compressed-tensors", "awq", "gptq", "fp8"],
            Meta(
                description="Form of quantized weights in a model folder.",
                extra={"default": "compressed-tensors"},
            ),
        ]
        | None
    ) = None
    kv_cache_dtype: Annotated[
        Literal["auto", "fp8", "int8"],
        Meta(
            description="fp8 or int8: calibrated scales of keys and values for caches in 8 bits; auto: the compute type."
        ),
    ] = "auto"


class ServeOptions(DraftingServer, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of the target trtllm: what its server is told. None leaves the choice to the server."""

    target: ClassVar[str] = "trtllm"

    max_seq_len: (
        Annotated[
            int,
            Meta(
                ge=1,
                description="Longest sequence of the server, in tokens.",
                extra={"default": "the model's context"},
            ),
        ]
        | None
    ) = None
    max_batch: (
        Annotated[
            int,
            Meta(ge=1, description="Requests that a server runs together.", extra={"default": "the server's"}),
        ]
        | None
    ) = None
    max_num_tokens: (
        Annotated[
            int,
            Meta(ge=1, description="Tokens that a server runs together.", extra={"default": "the server's"}),
        ]
        | None
    ) = None
    kv_cache_dtype: Annotated[
        Literal["auto", "fp8"],
        Meta(description="fp8: keys and values in 8 bits, calibrated; auto: the compute type."),
    ] = "auto"

    def check(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            UsageError: names the flag.
        """
        super().check()
        batch, tokens = self.max_batch, self.max_num_tokens
        if batch is not None and tokens is not None and tokens < batch:
            raise UsageError(
                f"--max-num-tokens {tokens} is less than --max-batch {batch}",
                why="each request of a batch runs one token at least",
                remedy=f"use {batch} or more",
            )
