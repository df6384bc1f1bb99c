"""The text of an answer, token by token: it is what decoding all tokens gives, cut before the first stop string."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_server import example_tokenizer

from optc.runtime.generation.tokenizer import Tokenizer
from optc.runtime.serving.text import AnswerText, StopStrings

texts = cache(example_tokenizer)


def first_stop(text: str, stops: list[str]) -> str:
    """The same, by looking at the whole text."""
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


@given(st.lists(st.text("ab", max_size=5), max_size=30), st.lists(st.text("ab", min_size=1, max_size=6), max_size=4))
def test_stop_strings_of_any_pieces(pieces: list[str], stops: list[str]) -> None:
    stream, found, late = StopStrings(stops), "", ""
    for piece in pieces:
        found += stream.push(piece)
        assert "".join(pieces).startswith(found)
        late = late or (found if stream.found else "")
    ended = stream.found
    found += stream.push("", last=True)
    assert ended is None or found == late  # nothing follows a stop string
    whole = "".join(pieces)
    # A stop string counts when its last character comes: of two that overlap, the one that is complete first.
    ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
    seen = ""
    for piece in pieces:
        seen += piece
        if ends and len(seen) >= min(ends):
            break
    assert found == first_stop(seen if ends else whole, stops)


@pytest.mark.parametrize("stops", [[], ["sea, and"], ["é"], ["\n\n", " x"]])
def test_the_text_of_tokens(stops: list[str]) -> None:
    tokenizer: Tokenizer = texts()
    text = "The old man looked at the séa, 日本 and 🎉 the sea, and x"
    tokens = tokenizer.encode(text, special=False)
    for size in (1, 3, 50):
        answer, found = AnswerText(tokenizer, [1], stops), ""
        given = [tokens[i : i + size] for i in range(0, len(tokens), size)]
        for index, some in enumerate(given):
            piece, used = answer.push(some, last=index == len(given) - 1)
            found += piece
            assert "\ufffd" not in piece
            if answer.stop:
                assert used <= len(some)
                break
            assert used == len(some)
        assert found == first_stop(text, stops)


def test_tokens_that_end_an_answer_are_not_text() -> None:
    tokenizer = texts()
    tokens = tokenizer.encode("The sea", special=False)
    answer = AnswerText(tokenizer, [tokens[-1]], [])
    assert answer.push(tokens, last=True) == (tokenizer.decode(tokens[:-1]), len(tokens))


def test_half_a_character_at_the_end() -> None:
    tokenizer = texts()
    tokens = tokenizer.encode("ab🎉", special=False)[:-1]
    answer = AnswerText(tokenizer, [], ["zz"])
    assert "".join(answer.push([token], last=False)[0] for token in tokens) == "ab"
    assert answer.push([], last=True)[0] == tokenizer.decode(tokens)[2:]
