"""Which weights of a model are linears, seen from its modules."""

from __future__ import annotations

import torch
from torch import nn

from optc.compiler.analysis.module_linears import expert_stacks


def test_stacks_of_experts_are_not_what_a_vision_tower_learns() -> None:
    model = nn.Module()
    model.experts = nn.Parameter(torch.zeros(4, 6, 8))
    model.class_token = nn.Parameter(torch.zeros(1, 1, 8))
    model.positions = nn.Parameter(torch.zeros(1, 10, 8))
    model.linear = nn.Linear(8, 6)
    assert expert_stacks(model) == {"experts": (4, 6, 8)}
