"""A chat over one cache says what a new session says of the whole conversation, and computes only what is new."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from once import example_artifact
from serving_server import TEMPLATE

from optc.compiler.diagnostics import InputError
from optc.runtime.generation.chat_template import ChatTemplate
from optc.runtime.generation.conversation import Conversation, StoppedError
from optc.runtime.sampling import Sampling
from optc.runtime.sessions.load import load
from optc.runtime.sessions.text_model import Model


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    found = load(example_artifact("onnx-cpu"), threads=1)
    yield found
    found.close()


@pytest.fixture
def chat(model: Model) -> Conversation:
    assert model.tokenizer is not None
    return Conversation(model.session, model.tokenizer, ChatTemplate(TEMPLATE, {}, "here"), model.stop_ids, "Be kind.")


def say(chat: Conversation, text: str, stop_after: int = 1000, **sampling: float) -> tuple[str, str | None]:
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == stop_after:
            raise StoppedError

    reason = chat.say(text, max_new_tokens=12, sampling=Sampling(**sampling), on_text=show)  # type: ignore[arg-type]
    return "".join(pieces), reason


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.3}])
def test_a_new_session_says_the_same(chat: Conversation, model: Model, sampling: dict[str, float]) -> None:
    assert model.tokenizer is not None
    first, reason = say(chat, "Hello", **sampling)
    assert reason == "length"
    begun = chat.computed
    second, _ = say(chat, "More", **sampling)
    text = f"system: Be kind.\nuser: Hello\nassistant: {first}\nuser: More\nassistant:"
    tokens = model.tokenizer.encode(text, special=False)
    assert chat.computed <= len(tokens) - begun + 1  # the answer is encoded anew, and may be divided otherwise
    assert model.generate(tokens, max_new_tokens=12, **sampling).text == second  # type: ignore[arg-type]


def test_an_answer_that_is_stopped(chat: Conversation, model: Model) -> None:
    assert model.tokenizer is not None
    first, reason = say(chat, "Hello", stop_after=5)
    assert reason is None
    second, _ = say(chat, "More")
    text = f"system: Be kind.\nuser: Hello\nassistant: {first}\nuser: More\nassistant:"
    assert model.generate(model.tokenizer.encode(text, special=False), max_new_tokens=12).text == second


def test_a_reset_and_a_chat_that_is_too_long(chat: Conversation) -> None:
    first = say(chat, "Hello")
    chat.reset()
    assert say(chat, "Hello") == first
    assert chat.computed == 1  # all of it was there already
    with pytest.raises(InputError, match="does not fit the context of 2048") as caught:
        say(chat, "sea " * 2100)
    assert caught.value.remedy == "/reset begins a new one"
    say(chat, "More")  # the chat goes on as if that had not been said
    assert chat.computed < 30
