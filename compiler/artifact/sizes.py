"""How many bytes a model takes on the disk, by parts: as written, and as predicted. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec

_Bytes = Annotated[int, msgspec.Meta(ge=0)]


class Sizes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bytes of the weights.

    Attributes:
        source: of the source model's weight files; None for a model in memory.
        before: of its tensors, by the parts that they are of ("embedding", "head", "linears", "rest"); empty where the
            files hold other tensors than the model does, as those of a quantized model.
        embedding: numbers or codes of the tables of tokens, with the head's where it is tied.
        head, linears: the same of the output head, and of all other linears.
        scales, zero_points: of codes, of any of these.
        rest: norms, biases, positions, and whatever else is written.
        draft: all weights of a smaller model that drafts, in the same artifact; `source` then counts both models' files.
        tied: the head's weight is the table of tokens.
    """

    source: _Bytes | None = None
    before: dict[str, _Bytes] = {}
    embedding: _Bytes = 0
    head: _Bytes = 0
    linears: _Bytes = 0
    scales: _Bytes = 0
    zero_points: _Bytes = 0
    rest: _Bytes = 0
    draft: _Bytes = 0
    tied: bool = False

    @property
    def total(self) -> int:
        """Bytes of all weights as written."""
        return sum(size for _, size in self.parts())

    @property
    def ratio(self) -> float | None:
        """Bytes as written per byte of the source."""
        return self.total / self.source if self.source else None

    def with_draft(self, draft: Sizes) -> Sizes:
        """The same with those of a model that drafts, as one part."""
        both = self.source is not None and draft.source is not None
        return msgspec.structs.replace(
            self,
            source=(self.source or 0) + (draft.source or 0) if both else None,
            before={**self.before, "draft": draft.source or 0} if both and self.before else {},
            draft=draft.total,
        )

    def parts(self) -> list[tuple[str, int]]:
        """(title, bytes) of each part."""
        return [(title, getattr(self, name)) for name, title in self.titles().items()]

    def titles(self) -> dict[str, str]:
        """Field -> what a part is called."""
        names = ("head", "linears", "scales", "zero_points", "rest")
        first = "embedding and head" if self.tied else "embedding"
        return {"embedding": first, **{name: name.replace("_", " ") for name in names}, "draft": "draft model"}

    def __str__(self) -> str:
        """One line for people."""
        before = "" if self.source is None else f"{megabytes(self.source)} -> "
        ratio = "" if self.ratio is None else f" ({self.ratio:.2f} x)"
        parts = ", ".join(f"{title} {megabytes(size)}" for title, size in self.parts() if size)
        return f"{before}{megabytes(self.total)}{ratio}: {parts or 'no weights'}"

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> Sizes:
        """The sizes in a dict as `to_dict` or a manifest has them."""
        return msgspec.convert({name: row[name] for name in cls.__struct_fields__ if name in row}, cls)

    def to_dict(self) -> dict[str, int | float | bool | None]:
        """The fields with `total` and `ratio`, for JSON."""
        ratio = None if self.ratio is None else round(self.ratio, 4)
        return {**msgspec.structs.asdict(self), "total": self.total, "ratio": ratio}


def megabytes(size: int) -> str:
    """A size for people: three digits at least."""
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.2f} kB"


def group_text(sizes: Sequence[int]) -> str:
    """Group sizes for people: "groups of 64 and of a row"."""
    return "groups of " + " and of ".join("a row" if size == 0 else str(size) for size in sizes)
