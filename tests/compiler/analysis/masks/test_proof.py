"""Proofs of masks: what is proved is exactly what the mask does, and what is not says why."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import msgspec
import pytest
import torch
from masks import ADDITIVE, Maker, Places, random_mask
from torch import Tensor

from optc.compiler.analysis.aliases import Storage
from optc.compiler.analysis.masks.elements import BATCH, HEAD, KEY, QUERY, UnprovenError, shape_of
from optc.compiler.analysis.masks.proof import MaskProver, ProvedMask, Term
from optc.compiler.capture import capture_module
from optc.compiler.ir.program import Program

SHAPES = ((1, 1), (2, 5), (3, 11))


class _Masks(torch.nn.Module):
    """Computes masks from `pad` bool [B, S] and `positions` int64 [B, S]; weights serve as masks, too."""

    def __init__(self, makers: Sequence[Callable[..., Tensor]]) -> None:
        super().__init__()
        self.makers = makers
        self.register_buffer("triangle", torch.ones(1, 1, 64, 64).tril())
        self.register_buffer("band", torch.ones(64, 64).triu(-3).tril().bool())
        self.register_buffer("places", torch.arange(64))
        self.register_buffer("holed", torch.ones(64, 64).tril() * (torch.arange(64 * 64).view(64, 64) != 195))
        generator = torch.Generator().manual_seed(0)
        self.learned = torch.nn.Parameter(torch.randn(64, 64, generator=generator))

    def forward(self, pad: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        places = Places.of(pad)
        return tuple(make(places, self, positions) for make in self.makers)


def _program(makers: Sequence[Callable[..., Tensor]], *, length: int | None = None) -> Program:
    """A program of these masks, of one length or of any."""
    size = length or 7
    pad, positions = torch.ones((2, size), dtype=torch.bool), torch.arange(size)[None].repeat(2, 1)
    axes = {0: "batch"} if length else {0: "batch", 1: "seq"}
    return capture_module(
        _Masks(makers).eval(),
        (pad, positions),
        input_names=("pad", "positions"),
        dynamic={"pad": axes, "positions": axes},
        prove=False,  # one of the masks is random
    )


def _proofs(program: Program) -> list[ProvedMask | str]:
    """What is proved of each output of a program taken as a mask, or why it is not."""
    prover = MaskProver(program, Storage(program.graph))
    batch, length = shape_of(program.user_inputs()[0])
    extents = {BATCH: batch, HEAD: 2, QUERY: length, KEY: length}
    output = program.graph.output_node()
    found: list[ProvedMask | str] = []
    for node in output.args[0]:
        kind = "keep" if node.meta["val"].dtype == torch.bool else "add"
        try:
            found.append(prover.prove([Term(node, kind, output)], extents))
        except UnprovenError as error:
            found.append(str(error))
    return found


def _expected(proved: ProvedMask, pad: Tensor) -> Tensor:
    """bool [B, 1, S, S] of what was proved; all padding in these tests is `pad` or its opposite."""
    places = Places.of(pad)
    distance = (places.key - places.query)[None, None]
    keep = torch.ones_like(distance, dtype=torch.bool)
    keep = keep & (distance <= 0) if proved.causal else keep
    keep = keep & (distance > -proved.window) if proved.window else keep
    for item in proved.padding:
        plane = pad if item.leaf.node.name == "pad" else ~pad
        assert item.leaf.node.name in ("pad", *_NEGATIONS)
        keep = keep & (plane if item.keep else ~plane)[:, None, None, :]
    return keep


_NEGATIONS = ("bitwise_not",)


def _pad(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch * 31 + length)
    return torch.rand((batch, length), generator=generator) < 0.7


def _check_exact(program: Program, proofs: Sequence[ProvedMask | str]) -> None:
    """Every proved mask does what its proof says, at several shapes."""
    for batch, length in SHAPES:
        pad = _pad(batch, length)
        masks = program(pad, torch.arange(length)[None].repeat(batch, 1))
        for mask, proved in zip(masks, proofs, strict=True):
            if isinstance(proved, ProvedMask):
                keep = mask if mask.dtype == torch.bool else mask > -1e4
                shape = (batch, 1, length, length)
                assert torch.equal(keep.expand(shape), _expected(proved, pad).expand(shape)), proved


@pytest.mark.parametrize("seed", [0, 1])
def test_random_masks_are_proved_exactly_or_not_at_all(seed: int) -> None:
    source = random.Random(seed)
    plain = [random_mask(source) for _ in range(40)]

    def added(number: int, maker: Maker) -> Callable[..., Tensor]:
        return lambda places, *_: ADDITIVE[number % len(ADDITIVE)](maker(places))

    makers = [lambda places, *_, maker=maker: maker(places) for maker in plain]
    makers += [added(number, maker) for number, maker in enumerate(plain[:15])]
    program = _program(makers)
    proofs = _proofs(program)
    _check_exact(program, proofs)
    proved = [item for item in proofs if isinstance(item, ProvedMask)]
    assert 8 <= len(proved) <= 40
    assert len({(item.causal, item.window > 0, bool(item.padding)) for item in proved}) >= 4


def _negative(keep: Tensor) -> Tensor:
    return torch.where(keep, 0.0, torch.finfo(torch.float32).min)


PROVED: dict[str, tuple[Callable[..., Tensor], tuple[bool, int, int]]] = {
    "nothing masked": (lambda p, m, i: p.key >= 0, (False, 0, 0)),
    "causal": (lambda p, m, i: p.key <= p.query, (True, 0, 0)),
    "causal, the other way round": (lambda p, m, i: ~(p.query < p.key), (True, 0, 0)),
    "causal by difference": (lambda p, m, i: (p.query - p.key) >= 0, (True, 0, 0)),
    "causal, shifted": (lambda p, m, i: p.key < p.query + 1, (True, 0, 0)),
    "causal, doubled": (lambda p, m, i: 2 * p.key <= 2 * p.query + 1, (True, 0, 0)),
    "causal with a redundant bound": (
        lambda p, m, i: (p.key <= p.query) & (p.key <= p.query + 3),
        (True, 0, 0),
    ),
    "causal from a union": (lambda p, m, i: (p.key < p.query) | (p.key == p.query), (True, 0, 0)),
    "window": (lambda p, m, i: (p.key <= p.query) & (p.key > p.query - 4), (True, 4, 0)),
    "window of one": (lambda p, m, i: p.key == p.query, (True, 1, 0)),
    "window without causality": (lambda p, m, i: p.key >= p.query - 2, (False, 3, 0)),
    "padding": (lambda p, m, i: p.pad[:, None, None, :], (False, 0, 1)),
    "padding, negated": (lambda p, m, i: ~p.pad[:, None, None, :], (False, 0, 1)),
    "causal, window and padding": (
        lambda p, m, i: (p.key <= p.query) & (p.key > p.query - 4) & p.pad[:, None, None, :],
        (True, 4, 1),
    ),
    "by arithmetic": (lambda p, m, i: (1.0 - (p.key <= p.query).float()) * -1e9, (True, 0, 0)),
    "by padding arithmetic": (lambda p, m, i: (1 - p.pad[:, None, None, :].long()) * -10000, (False, 0, 1)),
    "sum of masks": (
        lambda p, m, i: _negative(p.key <= p.query) + _negative(p.pad[:, None, None, :]),
        (True, 0, 1),
    ),
    "full and triu": (
        lambda p, m, i: torch.full((p.pad.shape[1], p.pad.shape[1]), float("-inf")).triu(1),
        (True, 0, 0),
    ),
    "in place": (
        lambda p, m, i: torch.zeros(p.pad.shape[1], p.pad.shape[1]).masked_fill_(p.key > p.query, -1e9),
        (True, 0, 0),
    ),
    "permuted and reshaped": (
        lambda p, m, i: (p.query <= p.key).permute(1, 0)[None].reshape(1, 1, *(p.query >= p.key).shape),
        (True, 0, 0),
    ),
    "permuted out of order": (lambda p, m, i: p.pad[:, :, None, None].permute(0, 2, 3, 1), (False, 0, 1)),
    "merged with the heads and split again": (
        lambda p, m, i: (
            p.pad[:, None, None, :].expand(-1, 2, -1, -1).reshape(-1, 1, p.pad.shape[1]) & (p.key <= p.query)
        ).view(p.pad.shape[0], 2, p.pad.shape[1], -1)[:, :1],
        (True, 0, 1),
    ),
    "indexed": (
        lambda p, m, i: torch.arange(p.pad.shape[1])[p.query] >= torch.arange(p.pad.shape[1])[p.key],
        (True, 0, 0),
    ),
}


def test_masks_that_models_use_are_proved() -> None:
    program = _program([maker for maker, _ in PROVED.values()])
    proofs = _proofs(program)
    summary = {
        name: (proof.causal, proof.window, len(proof.padding)) if isinstance(proof, ProvedMask) else proof
        for name, proof in zip(PROVED, proofs, strict=True)
    }
    assert summary == {name: expected for name, (_, expected) in PROVED.items()}
    _check_exact(program, proofs)


def test_weights_serve_as_masks_by_their_values() -> None:
    makers = [
        lambda p, m, i: m.triangle[:, :, :9, :9] != 0,
        lambda p, m, i: m.band[:9, :9],
        lambda p, m, i: m.places[:9][None] <= m.places[3:12][:, None] - 3,
    ]
    makers += [lambda p, m, i: m.learned[:9, :9], lambda p, m, i: m.holed[:9, :9] != 0]
    *proofs, learned, holed = _proofs(_program(makers, length=9))
    assert learned == "the weight learned is not a bound on k - q"
    assert holed == "the weight holed is not a bound on k - q"
    assert proofs == [ProvedMask(causal=True), ProvedMask(causal=True, window=4), ProvedMask(causal=True)]


def test_a_weight_that_is_written_is_no_constant() -> None:
    def turned(places: Places, module: _Masks, _: Tensor) -> Tensor:
        mask = module.band[:9, :9].clone()
        module.band.logical_not_()
        return mask

    assert _proofs(_program([turned], length=9)) == ["the weight band is written"]


def _written_through_a_view(places: Places, *_: object) -> Tensor:
    mask = _negative(places.key <= places.query)
    mask[:, 0] = 0.0
    return mask


def _written_and_viewed(places: Places, *_: object) -> Tensor:
    return _written_through_a_view(places)[None, None]


def _written_later(places: Places, *_: object) -> Tensor:
    mask = places.key <= places.query
    mask.logical_or_(places.key == 0)
    return mask


def _alibi(places: Places, *_: object) -> Tensor:
    slopes = torch.tensor([0.5, 0.25])[:, None, None]
    return slopes * (places.key - places.query)


UNPROVED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "one key too many": (
        lambda p, m, i: p.key <= p.query + 1,
        "it keeps keys up to k = q +1, not up to k = q",
    ),
    "one key too few": (lambda p, m, i: p.key < p.query, "it keeps keys up to k = q -1, not up to k = q"),
    "anti-causal": (
        lambda p, m, i: p.key > p.query,
        "it keeps keys from k = q +1 on, which is not a window",
    ),
    "all but itself": (
        lambda p, m, i: p.key != p.query,
        "it leaves a gap between the keys that it keeps",
    ),
    "nothing kept": (lambda p, m, i: (p.key < p.query) & (p.key > p.query), "everything is masked"),
    "a fixed prefix": (lambda p, m, i: (p.key <= p.query) | (p.key < 3), "k < 3 is not a bound on k - q"),
    "a dilated window": (
        lambda p, m, i: (p.query - p.key) % 2 == 0,
        "remainder (aten.remainder.Scalar) is not supported",
    ),
    "padding of queries": (lambda p, m, i: p.pad[:, None, :, None], "it depends on pad[b, q], an input"),
    "padding or causal": (
        lambda p, m, i: (p.key <= p.query) | p.pad[:, None, None, :],
        "the parts pad[b, k] are not a conjunction",
    ),
    "a random mask": (
        lambda p, m, i: torch.rand(p.pad.shape[1], p.pad.shape[1]) > 0.5,
        "rand (aten.rand.default) is not supported",
    ),
    "ALiBi": (_alibi, "the weight lifted_tensor_0 is not a bound on k - q"),
    "a slope": (
        lambda p, m, i: (p.key - p.query) * 1.0,
        "mul_1 adds k - q, which varies with the position",
    ),
    "a bias": (
        lambda p, m, i: torch.where(p.key <= p.query, 0.0, -8.0),
        "where adds -8 to a score",
    ),
    "zero times infinity": (
        lambda p, m, i: (p.key > p.query).float() * float("-inf"),
        "mul_2 adds nan to a score",
    ),
    "written through a view": (_written_through_a_view, "fill_ overwrites where_1"),
    "written before it is viewed": (
        _written_and_viewed,
        "fill__1 overwrites where_2 before unsqueeze_8 reads it",
    ),
    "positions of the user": (
        lambda p, m, i: i[:, None, None, :] <= i[:, None, :, None],
        "it depends on positions[b, k], an input",
    ),
    "positions in half precision": (
        lambda p, m, i: p.key.half() <= p.query.half(),
        "to_1 has positions in float16, which rounds",
    ),
}


def test_other_masks_are_named() -> None:
    proofs = _proofs(_program([maker for maker, _ in UNPROVED.values()]))
    assert dict(zip(UNPROVED, proofs, strict=True)) == {name: text for name, (_, text) in UNPROVED.items()}


def test_a_mask_that_is_changed_in_place_is_read_as_changed() -> None:
    program = _program([_written_later])
    assert _proofs(program) == ["k == 0 is not a bound on k - q"]


def _ruled(program: Program, rule: bool) -> Program:
    inputs = [
        msgspec.structs.replace(spec, role="position_ids" if spec.name == "positions" else spec.role)
        for spec in program.contract.inputs
    ]
    return program.with_contract(inputs=tuple(inputs), position_rule=rule)


def test_positions_count_up_only_under_the_position_rule() -> None:
    program = _program([lambda p, m, i: i[:, None, None, :] <= i[:, None, :, None]])
    assert _proofs(_ruled(program, True)) == [ProvedMask(causal=True)]
    assert _proofs(_ruled(program, False)) == ["it depends on positions[b, k], an input"]


def test_packed_sequences_are_one_sequence_under_the_position_rule() -> None:
    """transformers tells packed sequences by jumps of the positions: there are none under the rule."""

    def packed(places: Places, _: object, positions: Tensor) -> Tensor:
        jumps = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1
        group = jumps.cumsum(-1)
        return (group[:, None, :, None] == group[:, None, None, :]) & (places.key <= places.query)

    program = _program([packed])
    assert _proofs(_ruled(program, True)) == [ProvedMask(causal=True)]
    assert _proofs(_ruled(program, False)) == ["it depends on positions[b, i], an input"]


def test_queries_count_from_the_end_of_the_keys() -> None:
    """S queries behind T - S older keys: the diagonal of the last query and the last key counts."""

    class Bottom(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            ones = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
            return ones.tril(k.shape[1] - q.shape[1]), ones.tril()

    program = capture_module(
        Bottom(),
        (torch.zeros(2, 3), torch.zeros(2, 5)),
        dynamic={"input_0": {0: "b", 1: "s"}, "input_1": {0: "b", 1: "t"}},
    )
    prover = MaskProver(program, Storage(program.graph))
    (batch, queries), (_, keys) = (shape_of(node) for node in program.user_inputs())
    extents = {BATCH: batch, HEAD: 2, QUERY: queries, KEY: keys}
    output = program.graph.output_node()
    bottom, top = output.args[0]
    assert prover.prove([Term(bottom, "keep", output)], extents) == ProvedMask(causal=True)
    with pytest.raises(UnprovenError, match=r"is not a bound on k - q$"):
        prover.prove([Term(top, "keep", output)], extents)
    with pytest.raises(UnprovenError, match=r"^is_causal aligns the first of s\d+ queries with the first of s\d+ keys"):
        prover.prove([], extents, is_causal=True)
