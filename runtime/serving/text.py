"""The text of one answer: tokens in, pieces out, with stop strings that may begin in one token and end in another."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from optc.runtime.generation.tokenizer import TextStream, Tokenizer


def held_back(text: str, strings: Sequence[str], longest: int) -> int:
    """Length of the longest end of the text that one of the strings begins with, and is not yet whole.

    Args:
        longest: characters of the longest of the strings.
    """
    for length in range(min(longest - 1, len(text)), 0, -1):
        end = text[len(text) - length :]
        if any(string.startswith(end) for string in strings):
            return length
    return 0


class StopStrings:
    """Text that passes until one of several strings appears in it.

    What may be the beginning of one is held back until it is decided.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str, *, last: bool = False) -> str:
        """The text that is certain to stand before any stop string; `last` gives out what is held."""
        if self.found is not None:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        places = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if places:
            at, self.found = min(places)
            self._held = ""
            return text[:at]
        kept = 0 if last else held_back(text, self._stops, self._longest)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


class AnswerText:
    """Pieces of the text of one answer.

    Args:
        hidden: tokens that end the answer and are not part of its text.
        stops: strings that end it, not part of its text either.
    """

    def __init__(self, tokenizer: Tokenizer, hidden: Collection[int], stops: Sequence[str]) -> None:
        self._stream = TextStream(tokenizer)
        self._hidden = frozenset(hidden)
        self._stops = StopStrings(stops)

    @property
    def stop(self) -> str | None:
        """The stop string that was found; no text follows."""
        return self._stops.found

    def push(self, tokens: Sequence[int], *, last: bool) -> tuple[str, int]:
        """(text that these tokens complete, how many of them were used): fewer where a stop string was found."""
        pieces: list[str] = []
        for used, token in enumerate(tokens, 1):
            if token not in self._hidden:
                pieces.append(self._stops.push(self._stream.push(token)))
                if self._stops.found is not None:
                    return "".join(pieces), used
        if last:
            pieces.append(self._stops.push(self._stream.finish(), last=True))
        return "".join(pieces), len(tokens)
