"""What the calibrated weight quantizers share: the walk over the model, records, and continuing after a kill.

The program is run once over the calibration sequences, from the input of one group of linears to the next; each
group is rounded with the statistics of its input and its rounded weights are what later groups see.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import msgspec
import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.linears import Linear
from optc.compiler.analysis.name_patterns import fits
from optc.compiler.diagnostics import UsageError
from optc.compiler.formats.group_sizes import GroupSize, check_bits, check_sizes
from optc.compiler.formats.integer import check_finite_weight
from optc.compiler.ir.contract import WeightQuantization
from optc.compiler.ir.program import Program
from optc.compiler.pipeline.quantization_summary import linear_record
from optc.compiler.rewriting.budget import Budget
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult
from optc.compiler.rewriting.quantization_record import LinearRecord
from optc.passes.quantization.arithmetic.budgets import weight_budget
from optc.passes.quantization.arithmetic.experts import FEW, RoutedTokens
from optc.passes.quantization.arithmetic.gptq import output_energy, relative
from optc.passes.quantization.arithmetic.grid import Grid, full_range
from optc.passes.quantization.arithmetic.groups import (
    Group,
    gram_matrix,
    input_groups,
    weight_label,
    weight_rows,
)
from optc.passes.quantization.arithmetic.ranges import calibration_feed
from optc.passes.quantization.arithmetic.selection import (
    Selection,
    quantize_selected,
    replace_weight,
    select_in_groups,
    weight_name,
)
from optc.passes.quantization.arithmetic.store import Entry, GroupStore
from optc.passes.quantization.arithmetic.stream import Stream

_ERROR_ROWS = 512
"""Outputs over which a record's errors are taken, evenly spaced: over all of them they would take as long as GPTQ."""


@dataclass(frozen=True)
class Statistics:
    """What is known of a group's input.

    Attributes:
        gram: [K, K] float32, the mean of x x^T over the calibration rows.
        rows: how many rows.
        drift: [K, K] float32, the mean of (x0 - x) x^T, with x0 the input in the unquantized model; None when it was
            not asked for.
    """

    gram: Tensor
    rows: int
    drift: Tensor | None = None


@dataclass(frozen=True)
class Rounded:
    """A weight after rounding: codes float32 [N, K] of integers on a grid."""

    codes: Tensor
    grid: Grid
    damping: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class CalibratedPass(Pass):
    """Base of passes that round the weights of linears by what calibration says of their inputs.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: neighbours along K that share a scale; 0 is a whole row; None takes the largest of 128, 64 and 32
            that divides the K of every quantized linear. Of several each weight gets the first that divides its K, and
            one that none divides is left alone.
        symmetric: no zero point.
        ignore: patterns (`*.down_proj.*`) of weight names to leave alone.
        head: quantize the linear that makes the logits too.
        overrides: `PATTERN=BITS` for weights that get other bits; the first that fits counts.
    """

    lossy: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True
    method: ClassVar[str]

    bits: int = 4
    group_size: GroupSize = None
    symmetric: bool = True
    ignore: tuple[str, ...] = ()
    head: bool = False
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_sizes(self.group_size)
        for item in self.overrides:
            pattern, equals, bits = item.rpartition("=")
            if not (pattern and equals and bits.isdigit()):
                raise UsageError(f"cannot read the override '{item}'", remedy="write PATTERN=BITS")
            check_bits(int(bits))

    @abstractmethod
    def round_group(self, weight: Tensor, statistics: Statistics, bits: int, group_size: int, where: str) -> Rounded:
        """Round the stacked weights [N, K] of linears that read one input."""

    @property
    def follows_unquantized(self) -> bool:
        """Whether `round_group` needs `Statistics.drift`."""
        return False

    def budget(self, before: Program) -> Budget:
        return weight_budget(self.bits)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Quantize a clone of `program`.

        Raises:
            InputError: no calibration tokens, activations that are not finite (the layer is named), a group size that
                does not divide a K, a weight that is not finite.
        """
        selection = select_in_groups(program, self.ignore, self.head, self.group_size)
        if not selection.chosen:
            return PassResult(program, 0, len(selection.misses), selection.misses, selection.notes)
        calibration_feed(self.name, context)
        return _Run(self, program, context, selection).run()

    def bits_of(self, name: str) -> int:
        """The bits of a weight, overrides considered."""
        for item in self.overrides:
            pattern, _, bits = item.rpartition("=")
            if fits(name, pattern):
                return int(bits)
        return self.bits


class _Run:
    """One run over a program: the streams, what was rounded so far, the records."""

    def __init__(
        self,
        rewrite: CalibratedPass,
        program: Program,
        context: PassContext,
        selection: Selection,
    ) -> None:
        self.rewrite, self.program, self.context = rewrite, program, context
        self.selection = selection
        assert context.calibration is not None
        tokens = context.calibration.tokens
        self.values: dict[Node, Tensor] = {}
        self.stream = Stream(program, tokens, weights=self.values)
        self.clean = Stream(program, tokens) if rewrite.follows_unquantized else None
        self.records: list[LinearRecord] = []
        self.made: dict[str, Rounded] = {}
        self.routed = RoutedTokens()
        self.store = GroupStore.open(context.work_dir, self._key()) if context.work_dir else None

    def run(self) -> PassResult:
        groups = input_groups(self.selection.chosen)
        with torch.no_grad():
            for number, group in enumerate(groups):
                if self.context.progress:
                    label = weight_label(self.program, group.sites[0])
                    self.context.progress(number, len(groups), label)
                self._group(number, group)
        return self._result()

    def _key(self) -> str:
        calibration = self.context.calibration
        assert calibration is not None
        parts = (repr(self.rewrite), calibration.digest, self.program.fingerprint(), repr(self.selection.sizes))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _group(self, number: int, group: Group) -> None:
        """Round a group, or take what an earlier run stored."""
        sites = self._new_sites(group)
        stored = self.store.load(number) if self.store else None
        if stored is not None and len(stored) == len(sites):
            for site, (entry, codes, grid) in zip(sites, stored, strict=True):
                self._keep(site, Rounded(codes, grid, entry.damping, entry.note), entry.record)
            return
        begin = time.perf_counter()
        self.stream.advance(group.root)
        for site in sites:
            self.routed.look(self.stream, site)
        statistics = self._statistics(group)
        by_bits: dict[int, list[Linear]] = {}
        for site in sites:
            by_bits.setdefault(self.rewrite.bits_of(weight_label(self.program, site)), []).append(site)
        found: dict[Node, Rounded] = {}
        for bits, alike in by_bits.items():
            found |= self._stack(alike, statistics, bits)
        seconds = (time.perf_counter() - begin) / max(1, len(sites))
        kept: list[tuple[Entry, Tensor, Grid]] = []
        for site in sites:
            rounded = found[site.node]
            record = self._record(site, rounded, statistics, seconds)
            self._keep(site, rounded, record)
            kept.append((self._entry(rounded, record), rounded.codes, rounded.grid))
        if self.store:
            self.store.save(number, kept)

    def _new_sites(self, group: Group) -> list[Linear]:
        """The linears of a group whose weight was not rounded yet: one may be read by several."""
        table = {weight_label(self.program, site): site for site in reversed(group.sites)}
        return [site for label, site in reversed(table.items()) if label not in self.made]

    def _entry(self, rounded: Rounded, record: LinearRecord) -> Entry:
        grid = rounded.grid
        return Entry(
            bits=grid.bits,
            group_size=grid.group_size,
            symmetric=grid.symmetric,
            damping=rounded.damping,
            note=rounded.note,
            record=record,
        )

    def _statistics(self, group: Group) -> Statistics:
        gram, count = gram_matrix(self.stream, group)
        if self.clean is None:
            return Statistics(gram, count)
        self.clean.advance(group.root)
        return Statistics(gram, count, drift_matrix(self.clean, self.stream, group.root))

    def _stack(self, sites: list[Linear], statistics: Statistics, bits: int) -> dict[Node, Rounded]:
        """Round weights of one input together: they share the factorization."""
        weights = [weight_rows(self.program, site).float() for site in sites]
        name = weight_label(self.program, sites[0])
        for site, weight in zip(sites, weights, strict=True):
            check_finite_weight(*weight.aminmax(), where=weight_label(self.program, site))
        whole = self.rewrite.round_group(torch.cat(weights), statistics, bits, self.selection.sizes[name], name)
        counts = [len(weight) for weight in weights]
        parts = [tensor.split(counts) for tensor in (whole.codes, whole.grid.scale, whole.grid.zero)]
        return {
            site.node: dataclasses.replace(
                whole, codes=codes, grid=dataclasses.replace(whole.grid, scale=scale, zero=zero)
            )
            for site, codes, scale, zero in zip(sites, *parts, strict=True)
        }

    def _record(self, site: Linear, rounded: Rounded, statistics: Statistics, seconds: float) -> LinearRecord:
        weight, label = weight_rows(self.program, site).float(), weight_label(self.program, site)
        grid = rounded.grid
        plain = full_range(weight, grid.bits, grid.group_size, grid.symmetric)
        values = grid.values(rounded.codes)
        rows = slice(None, None, -(-len(weight) // _ERROR_ROWS))
        seen = weight[rows]
        near = dataclasses.replace(plain, scale=plain.scale[rows], zero=plain.zero[rows])
        candidates = (near.values(near.codes(seen)), values[rows])
        energy = output_energy(seen, statistics.gram)
        errors = [output_energy(seen - found, statistics.gram) for found in candidates]
        return linear_record(
            label,
            weight,
            values,
            grid.scale,
            method=self.rewrite.method,
            bits=grid.bits,
            group_size=self.selection.sizes[label],
            symmetric=grid.symmetric,
            error_rtn=relative((errors[0], energy)),
            error=relative((errors[1], energy)),
            clip=float((grid.scale / plain.scale).mean()),
            damping=rounded.damping,
            tokens=statistics.rows,
            seconds=seconds,
            note=rounded.note,
        )

    def _keep(self, site: Linear, rounded: Rounded, record: LinearRecord) -> None:
        """Let later groups see the rounded weight."""
        placeholder = site.placeholder
        assert placeholder is not None
        store, grid = self.program.stored, rounded.grid
        self.made[weight_label(self.program, site)] = dataclasses.replace(
            rounded,
            codes=store(rounded.codes.to(torch.uint8)),
            grid=dataclasses.replace(grid, scale=store(grid.scale), zero=store(grid.zero)),
        )
        self.records.append(record)
        name = self.program.weight_of(placeholder)
        assert name is not None
        old = self.values.get(placeholder)
        old = self.program.weight(name).detach() if old is None else old
        value = rounded.grid.values(rounded.codes).to(old.dtype)
        value = value.t().contiguous() if site.transposed else value
        if site.index is not None:
            stacked = old.clone()
            stacked[site.index] = value
            value = stacked
        self.values[placeholder] = value

    def _result(self) -> PassResult:
        def put(edited: Program, site: Linear) -> None:
            label = weight_label(edited, site)
            rounded = self.made[label]
            grid, source = rounded.grid, weight_name(edited, site)
            entry = WeightQuantization(
                method=self.rewrite.method,
                bits=grid.bits,
                group_size=self.selection.sizes[label],
                symmetric=grid.symmetric,
                source=source,
            )
            zero = None if grid.symmetric else grid.zero.to(torch.uint8)
            dtype = edited.weight(source).dtype
            replace_weight(edited, site, rounded.codes, grid.scale.to(dtype), zero, entry)

        records = self._with_routed_tokens()
        result = quantize_selected(self.program, self.selection, put, self._notes(records))
        return dataclasses.replace(result, linears=records)

    def _tokens(self) -> int:
        assert self.context.calibration is not None
        return self.context.calibration.tokens.numel()

    def _with_routed_tokens(self) -> tuple[LinearRecord, ...]:
        """The records, experts with the number of tokens that their router sent them."""
        sites = {weight_label(self.program, site): site for site in self.selection.chosen}
        counts = {record.name: self.routed.count(sites[record.name]) for record in self.records}
        return tuple(
            record if (count := counts[record.name]) is None else msgspec.structs.replace(record, tokens=count)
            for record in self.records
        )

    def _notes(self, records: Sequence[LinearRecord]) -> tuple[str, ...]:
        notes = []
        raised = [record.name for record in self.records if record.damping and record.damping > 0.011]
        if raised:
            notes.append(f"damping was raised for {len(raised)} linears, {raised[0]} among them")
        few = [record for record in records if record.tokens < min(FEW, self._tokens())]
        if few:
            least = min(few, key=lambda record: record.tokens)
            notes.append(f"{len(few)} experts saw fewer than {FEW} tokens; {least.name} saw {least.tokens}")
        notes.append(f"calibrated on {self.context.calibration!r}")
        return tuple(notes)


def drift_matrix(clean: Stream, stream: Stream, root: Node) -> Tensor:
    """[K, K], the mean of (x0 - x) x^T, with x0 the values of `root` in the unquantized model."""
    total: Tensor | None = None
    count = 0
    for x0, x in zip(clean.values(root), stream.values(root), strict=True):
        flat0, flat = (item.reshape(-1, item.shape[-1]).float() for item in (x0, x))
        product = (flat0 - flat).t() @ flat
        total = product if total is None else total.add_(product)
        count += len(flat)
    assert total is not None
    return total / max(count, 1)
