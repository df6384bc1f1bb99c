"""What a step gives, in arrays: as objects, in parts, and over the wire."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from optc.runtime.serving.answers import Answers
from optc.runtime.serving.client import Channel, EngineClient
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.engine_process import Client, EngineServer
from optc.runtime.serving.paged_engine import PagedEngine
from optc.runtime.serving.plan import Chosen, Plan
from optc.runtime.serving.request import Answer, Generate
from optc.runtime.serving.rows import Kind, Rows
from optc.runtime.serving.wire import Frames, Given, decode_from_engine


def _answers() -> Answers:
    tokens, counts = np.array([5, 6, 7, 8], np.int32), np.array([1, 0, 3])
    return Answers(["a", "b", "c"], tokens, counts, [Answer(id="d", tokens=[9], finish="stop")])


def test_each_request_has_its_slice() -> None:
    found = _answers()
    rows = [("a", [5], None), ("b", [], None), ("c", [6, 7, 8], None), ("d", [9], "stop")]
    assert [(item.id, item.tokens, item.finish) for item in found] == rows
    assert (len(found), found[2].tokens, [item.id for item in found[1:]]) == (4, [6, 7, 8], ["b", "c", "d"])
    assert len(Answers.of([])) == 0


@pytest.mark.parametrize(("places", "tokens"), [([0, 1], [5]), ([2], [6, 7, 8]), ([], []), ([0, 1, 2], [5, 6, 7, 8])])
def test_a_part_has_the_tokens_of_its_requests(places: list[int], tokens: list[int]) -> None:
    found = _answers().only(places, [])
    assert (found.ids, found.tokens.tolist()) == ([["a", "b", "c"][place] for place in places], tokens)
    assert (int(found.counts.sum()), found.others) == (len(tokens), [])


def test_rows_tell_what_was_not_told() -> None:
    """By rows in any order; what was told before a row was lost is not told again."""
    rows = Rows(3, 16, 4)
    for name, known in (("a", 5), ("b", 7), ("c", 4)):
        row = rows.take(
            name, list(range(known)), end=9, stops=[], single=False, kind=Kind.GREEDY, told=known - 1, plain=name != "c"
        )
        rows.history[row, known] = 10 * (row + 1)
        rows.known[row] += row  # a has 1 new token, b 2, c 3: one was not told of each
    rows.history[2, 5] = 31
    tokens, counts = rows.tell(np.array([2, 0, 1]))
    assert (tokens.tolist(), counts.tolist()) == ([3, 30, 31, 4, 6, 20], [3, 1, 2])
    assert rows.tell(np.array([0, 1, 2]))[1].tolist() == [0, 0, 0]
    rows.give_back(0)
    assert rows.move(2) == 0
    assert (rows.names[0], int(rows.told[0]), bool(rows.plain[0])) == ("c", 6, False)


class Made:
    """A runner whose tokens count the steps."""

    ahead, most_steps, model_s = 1, 1, 0.0

    def __init__(self) -> None:
        self.plans: list[Plan] = []
        self.launched = 0

    def warm_up(self, most_tokens: int) -> None:
        return

    def launch(self, plan: Plan) -> None:
        self.plans.append(plan)

    def collect(self) -> Chosen:
        self.launched += 1
        return Chosen.one_each(self.plans.pop(0).rows * 100 + self.launched)


def _engine(rows: int, blocks: int) -> PagedEngine:
    model = SimpleNamespace(
        num_blocks=blocks, block_size=4, context_length=64, vocab_size=5000, on_device=True, chunk=64
    )
    options = EngineOptions(max_running=rows, token_budget=32)
    return PagedEngine(cast(Any, model), options, lambda *_: cast(Any, Made()))


def test_every_token_is_told_once_also_of_rows_that_give_way() -> None:
    """The pool holds half of what the requests want; tokens that come late, behind a row's loss, are told as well."""
    engine = _engine(4, 14)
    got: dict[str, list[int]] = {}
    for name in "abcd":
        engine.submit(
            Generate(id=name, prompt=[ord(name), 2, 3], max_new_tokens=20, logprobs=1 if name == "d" else None)
        )
    arrays = 0
    last: dict[str, Answer] = {}
    while not engine.idle:
        found = engine.step()
        arrays += len(found.ids)
        for answer in found:
            assert answer.id not in last, "an answer after the last"
            assert (answer.logprobs is not None) == (answer.id == "d")
            assert (answer.cached_tokens is not None) == (answer.id not in got)
            got.setdefault(answer.id, []).extend(answer.tokens)
            if answer.finish is not None:
                last[answer.id] = answer
    assert engine.metrics().preemptions > 0
    assert {name: len(tokens) for name, tokens in got.items()} == dict.fromkeys("abcd", 20)
    assert all(tokens == sorted(tokens, key=lambda token: token % 100) for tokens in got.values())
    assert {answer.finish for answer in last.values()} == {"length"}
    assert arrays > 40, "most answers are part of the arrays"


def test_clients_get_their_own_over_the_wire() -> None:
    """Of two clients; the requests of a third, which has gone, are nobody's."""
    engine = _engine(4, 60)
    server = EngineServer(engine, socket.socketpair()[0])
    ends = [socket.socketpair() for _ in range(2)]
    clients = [Client(end[0]) for end in ends]
    for client in clients:
        server._selector.register(client.socket, 1, client)
    readers = [EngineClient("", lambda info: None) for _ in clients]
    channels = {}
    for name, owner in (("a", 0), ("b", 1), ("c", 0)):
        request = Generate(id=name, prompt=[ord(name)], max_new_tokens=6)
        server._submit(clients[owner], request)
        channels[name] = readers[owner]._channels[name] = Channel(readers[owner], [request])
    engine.submit(Generate(id="nobody", prompt=[7], max_new_tokens=6))
    found: dict[str, tuple[list[int], str | None]] = {}
    frames = [Frames(), Frames()]
    while not engine.idle:
        server._give(engine.step())
        for (_, end), reader, held in zip(ends, readers, frames, strict=True):
            end.setblocking(False)
            try:
                data = end.recv(1 << 16)
            except BlockingIOError:
                continue
            for item in held.feed(data):
                message = decode_from_engine(item)
                assert isinstance(message, Given)
                assert all(channels[name]._client is reader for name in message.ids)
                reader._receive(message)
    for name, channel in channels.items():
        found[name] = (channel._pending[0].tokens, channel._pending[0].finish)
    alone = {name: [token // 100 for token in tokens] for name, (tokens, _) in found.items()}
    assert alone == {name: [row] * 6 for row, name in enumerate("abc")}
    assert [finish for _, finish in found.values()] == ["length"] * 3
    assert not server._owners
    assert not any(reader.open_requests for reader in readers)
