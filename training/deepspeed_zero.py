"""ZeRO 1, 2 and 3 by DeepSpeed (extra `deepspeed`): Rajbhandari et al. 2019, https://arxiv.org/abs/1910.02054.

DeepSpeed's engine owns the backward pass, clipping and the step. `connect` takes the model and its optimizer and
returns the engine to call and an optimizer whose `step` is the engine's, so a training loop looks the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from optc.compiler.diagnostics import UsageError
from optc.training.parallel import ParallelConfig


def check_deepspeed() -> Any:
    """The deepspeed module.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import deepspeed
    except ImportError as error:
        raise UsageError(
            "parallel.kind deepspeed needs DeepSpeed",
            why=str(error),
            remedy="pip install 'optc[deepspeed]', or use zero1 (ZeRO-1) or fsdp (ZeRO-2 and ZeRO-3: "
            "parallel.reshard_after_forward=false and true)",
        ) from error
    return deepspeed


class EngineOptimizer(torch.optim.Optimizer):
    """Presents a DeepSpeed engine as the optimizer that it wraps: same groups; `step` clips and updates.

    Attributes:
        grad_norm: L2 norm of the last step's gradient over all ranks, before clipping; None before the first step.
    """

    def __init__(self, engine: Any) -> None:
        # No super().__init__: groups and state are the engine's own, not copies.
        self.engine = engine
        self.defaults = engine.optimizer.optimizer.defaults
        self.grad_norm: float | None = None
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups that the engine steps; their `lr` may be set."""
        groups: list[dict[str, Any]] = self.engine.optimizer.param_groups
        return groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """This rank's part of the state, by flat shard."""
        return self.engine.optimizer.optimizer.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Clip by the limit given to `connect`, update, and clear the gradients."""
        assert closure is None
        self.engine.step()
        self.grad_norm = float(self.engine.get_global_grad_norm())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients that the engine has not cleared."""
        self.engine.zero_grad()


def connect(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: ParallelConfig, *, clip_norm: float = 0.0
) -> tuple[nn.Module, EngineOptimizer]:
    """Hand the model and its optimizer to DeepSpeed; fp32. Call it in a process group.

    Returns the engine, which is called in the model's place, and the optimizer to step after `backward`.

    Args:
        clip_norm: largest L2 norm of the gradient; 0 does not clip.

    Raises:
        UsageError: DeepSpeed is not installed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = check_deepspeed()
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # used for logs only: micro-batches end where `backward` says
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 40,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine, EngineOptimizer(engine)


def backward(engine: Any, loss: Tensor, *, last: bool) -> None:
    """Backpropagate a micro-batch's share of the loss; gradients are reduced over ranks with the last one."""
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss, scale_wrt_gas=False)


def gather_state(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The model's state dict with whole tensors on the CPU, whatever the stage. A collective: every rank calls it.

    Args:
        keep: collect them on this rank (a tied weight is one tensor under its names); False only takes part.
    """
    deepspeed = check_deepspeed()
    items = model.state_dict(keep_vars=True)
    found: dict[int, Tensor] = {}
    for item in {id(item): item for item in items.values()}.values():
        with deepspeed.zero.GatheredParameters([item]):  # of stage 3; does nothing for whole tensors
            if keep:
                found[id(item)] = item.detach().to("cpu", copy=True)
    return {name: found[id(item)] for name, item in items.items()} if keep else {}
