"""The drafter of each method."""

from __future__ import annotations

from optc.runtime.speculative.drafter import Drafter
from optc.runtime.speculative.ngram import NgramDrafter
from optc.runtime.speculative.settings import Speculation
from optc.runtime.speculative.suffix import SuffixDrafter


def open_drafter(options: Speculation) -> Drafter:
    """What drafts by the method of these options."""
    if options.method == "ngram":
        return NgramDrafter()
    return SuffixDrafter()
