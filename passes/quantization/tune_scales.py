"""dequantize(codes, scale)  ->  dequantize(codes, scale'), scales trained against the unquantized model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optc.compiler.analysis.dataflow import is_tensor, value_of
from optc.compiler.analysis.linears import weight_calls
from optc.compiler.diagnostics import InputError, UsageError
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import set_weight
from optc.compiler.rewriting.budget import Budget
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult
from optc.passes.quantization.arithmetic.budgets import weight_budget
from optc.passes.quantization.arithmetic.differentiable import Differentiable
from optc.passes.quantization.arithmetic.grid import storable
from optc.passes.quantization.arithmetic.ranges import calibration_tokens


@dataclass(frozen=True, kw_only=True)
class TuneScales(Pass):
    """dequantize(codes, scale)  ->  dequantize(codes, scale'), norms and biases likewise

    Codes stay; scales, and with `vectors` the weights of norms and the biases, are trained end to end to give the
    unquantized model's distribution over the next token: KL(model || quantized) on the calibration sequences, by
    Adam with a cosine schedule. Training the step sizes alone after a block-wise rounding is the second phase of
    EfficientQAT (Chen et al. 2024, https://arxiv.org/abs/2407.11062).

    Attributes:
        epochs: times that each calibration sequence is read.
        batch_tokens: tokens per step.
        learning_rate: of the logarithm of the scales, at the start.
        vectors: train norm weights and biases too (relative step 1/4).
    """

    name: ClassVar[str] = "tune-scales"
    lossy: ClassVar[bool] = True
    restores: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True

    epochs: int = 4
    batch_tokens: int = 2048
    learning_rate: float = 5e-4
    vectors: bool = True

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_tokens < 1 or not self.learning_rate > 0:
            raise UsageError("epochs, batch_tokens and learning_rate must be positive", remedy="give numbers above 0")

    def budget(self, before: Program) -> Budget:
        """Codes stay, so the numbers move by less than rounding moved them."""
        return weight_budget(min((entry.bits for entry in before.contract.quantization.values()), default=8))

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Train in a clone of `program`.

        Raises:
            InputError: no calibration tokens, or a loss that is not finite.
        """
        names = _scale_names(program)
        if not names:
            return PassResult(program, 0, 0)
        if context.calibration is None or context.reference is None:
            raise InputError(
                "pass 'tune-scales' needs calibration tokens and the unquantized program",
                remedy="run it in a Pipeline after a quantization, with --calibration FILE",
            )
        vectors = _vector_names(program) if self.vectors else []
        trainer = _Trainer(self, program, context, names, vectors)
        first, last = trainer.train(calibration_tokens(self.name, context))
        edited = program.clone()
        for name, value in trainer.values().items():
            set_weight(edited, name, value.to(edited.weight(name).dtype))
        note = f"KL to the unquantized model on calibration text: {first:.4f} before, {last:.4f} at the end of training"
        return PassResult(edited.changed(), len(names), len(names), notes=(note,))


class _Trainer:
    """Scales as scale0 * exp(t), vectors as they are."""

    def __init__(
        self,
        options: TuneScales,
        program: Program,
        context: PassContext,
        scales: list[str],
        vectors: list[str],
    ) -> None:
        assert context.reference is not None
        self.options, self.context = options, context
        self.start = {name: program.weight(name).detach().float() for name in scales}
        self.logs = {name: torch.zeros_like(value).requires_grad_() for name, value in self.start.items()}
        self.types = {name: program.weight(name).dtype for name in scales + vectors}
        self.vectors = {name: program.weight(name).detach().float().clone().requires_grad_() for name in vectors}
        self.student, self.teacher = Differentiable(program), Differentiable(context.reference)

    def train(self, tokens: Tensor) -> tuple[float, float]:
        """Run all steps; mean KL per token before training and over the last epoch."""
        options = self.options
        groups = [{"params": list(self.logs.values()), "lr": options.learning_rate}]
        if self.vectors:
            groups.append({"params": list(self.vectors.values()), "lr": options.learning_rate / 4})
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        batches = list(self._batches(tokens))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / len(batches))))
        )
        losses: list[float] = []
        for number, batch in enumerate(batches):
            if self.context.progress:
                self.context.progress(number, len(batches), "training scales")
            optimizer.zero_grad(set_to_none=True)
            loss = self._loss(batch)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise InputError(
                    f"the loss became {value} while training scales",
                    where=f"step {number}",
                    remedy="use a smaller learning_rate, or leave tune-scales out",
                )
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(value)
        count = max(1, len(batches) // options.epochs)
        return losses[0], sum(losses[-count:]) / count

    def values(self) -> dict[str, Tensor]:
        """The trained values by weight name; scales as 16 bits hold them."""
        with torch.no_grad():
            scales = {name: storable(self.start[name] * torch.exp(log)) for name, log in self.logs.items()}
            return scales | {name: value.detach().clone() for name, value in self.vectors.items()}

    def _loss(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher(tokens).float().log_softmax(-1)
        self.student.weights = {
            name: (self.start[name] * torch.exp(log)).to(self.types[name]) for name, log in self.logs.items()
        } | {name: value.to(self.types[name]) for name, value in self.vectors.items()}
        found = self.student(tokens).float().log_softmax(-1)
        return torch.nn.functional.kl_div(found, target, log_target=True, reduction="sum") / tokens.numel()

    def _batches(self, tokens: Tensor) -> Iterator[Tensor]:
        """Each sequence once per epoch, in an order drawn with the context's seed."""
        size = max(1, self.options.batch_tokens // tokens.shape[1])
        generator = torch.Generator().manual_seed(self.context.seed)
        for _ in range(self.options.epochs):
            order = torch.randperm(len(tokens), generator=generator)
            yield from tokens[order].split(size)


def _scale_names(program: Program) -> list[str]:
    """The scales of every dequantized weight that are weights themselves."""
    names = [program.weight_of(node.args[1]) for node in weight_calls(program)]
    return list(dict.fromkeys(name for name in names if name is not None))


def _vector_names(program: Program) -> list[str]:
    """Floating weights with one axis that the graph reads: norms and biases, not tables of frequencies."""
    parameters = set(program.exported.graph_signature.parameters)
    table = program.weight_names()
    found = [node for node in program.graph.nodes if node.name in table and is_tensor(node)]
    return [
        table[node.name]
        for node in found
        if table[node.name] in parameters and value_of(node).dim() == 1 and value_of(node).is_floating_point()
    ]
