"""Programs on other devices, and how exact a device's matrix products are."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.diagnostics import TargetError, UsageError
from optc.compiler.ir.lazy_weights import materialized
from optc.compiler.ir.program import Program
from optc.compiler.ir.saved.tensors import memory_of
from optc.compiler.settings.device import DEVICE_PATTERN
from optc.compiler.settings.fields import check_type


def program_device(program: Program) -> torch.device:
    """The device of a program's weights; the CPU for a program without any."""
    exported = program.exported
    tables = (exported.state_dict, exported.constants)
    tensors = (value for table in tables for value in table.values() if isinstance(value, Tensor))
    return next((value.device for value in tensors), torch.device("cpu"))


def choose_device(name: str) -> torch.device:
    """cpu, cuda, cuda:N, or auto (cuda where there is one) as a device of this machine.

    Raises:
        UsageError: another name, or no text.
        TargetError: CUDA is asked for, and there is none here or fewer devices.
    """
    check_type("device", name, str, "cpu, cuda, cuda:N or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, colon, index = name.partition(":")
    if re.match(DEVICE_PATTERN, name) is None:
        raise UsageError(f"unknown device '{name}'", remedy="use cpu, cuda, cuda:N or auto")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        raise TargetError(
            f"--device {name} needs a CUDA device, and there is none here",
            why="torch finds no GPU or no driver" if built else "this torch was built without CUDA",
            remedy="use --device cpu" + ("" if built else ", or install a torch with CUDA"),
        )
    count = torch.cuda.device_count()
    if int(index or 0) >= count:
        raise TargetError(
            f"--device {name} does not exist",
            why=f"this machine has {count} CUDA device(s), counted from 0",
            remedy=f"use cuda:{count - 1} or less",
        )
    return torch.device("cuda", int(index) if colon else torch.cuda.current_device())


def has_room(device: torch.device, nbytes: int) -> bool:
    """Whether a device has memory for so many bytes more; of the CPU, and of devices that do not tell, it is believed."""
    if device.type != "cuda":
        return True
    free = torch.cuda.mem_get_info(device)[0]
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # the allocator's own, in pieces
    return nbytes < free + kept // 2


def to_device(program: Program, device: torch.device) -> Program:
    """A program with the same graph on another device: weights are copied, calls that name a device name the new one.

    Passes then run there: calibration of a large model on a GPU, for one. A program that is there is returned as it is.
    """
    if program_device(program) == device:
        return program
    moved = program.clone()
    if device.type != "cpu":
        moved.work_file = None  # what passes make stays on the device
    exported = moved.exported
    tables = (exported.state_dict, exported.constants)
    made: dict[object, Tensor] = {}  # what is one tensor (a tied weight) stays one
    for table in tables:
        for name, value in list(table.items()):
            if not isinstance(value, Tensor):
                continue
            place = memory_of(value)
            copy = made.get(place)
            if copy is None:
                copy = materialized(value.detach()).to(device)
                made.update({place: copy} if place is not None else {})
            is_parameter = isinstance(value, torch.nn.Parameter)
            table[name] = torch.nn.Parameter(copy, requires_grad=False) if is_parameter else copy
    for node in exported.graph.nodes:
        node.args = torch.fx.node.map_aggregate(node.args, lambda item: _moved(item, device))
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, lambda item: _moved(item, device))
        _move_meta(node, device)
    return moved.changed()


def _moved(item: object, device: torch.device) -> object:
    return device if isinstance(item, torch.device) else item


def _move_meta(node: Node, device: torch.device) -> None:
    value = node.meta.get("val")
    if value is not None:
        node.meta["val"] = torch.utils._pytree.tree_map_only(Tensor, lambda item: item.to(device), value)


@contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """Random numbers begin alike each time; those of the CPU go on behind it as if nothing had drawn.

    torch.manual_seed also notes a call for every kind of device that is not in use yet, with the stack that it comes from:
    a millisecond, and memory that stays. Programs on the CPU need none of it.
    """
    with torch.random.fork_rng(devices=[]):
        (torch.default_generator if device.type == "cpu" else torch).manual_seed(0)
        yield


@contextmanager
def tensor_float_32() -> Iterator[None]:
    """Let float32 matrix products on CUDA use TF32 (10 bits of mantissa, float32 sums).

    Products of numbers that came from bfloat16 or float16 are exact in it.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def onednn_products() -> Iterator[None]:
    """Let float32 matrix products on the CPU go to oneDNN where it keeps float32's precision.

    torch gives them to MKL, which uses AVX-512 on one make of CPU only: 100 against 220 GFLOP/s on one core of an EPYC.
    The switch permits oneDNN to round factors to bfloat16, which it does where a CPU multiplies these in units of their
    own; so one product is looked at first, and MKL stays where it is not exact.
    """
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16" if _onednn_is_exact() else before
    try:
        yield
    finally:
        setting.fp32_precision = before


@functools.cache
def _onednn_is_exact() -> bool:
    """Whether oneDNN's products have the error of float32, 1e-6 here; of bfloat16 it is 2e-3."""
    if not torch.backends.mkldnn.is_available():
        return False
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 1024, generator=generator) for _ in range(2))
    exact = left.double() @ right.double().t()
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        found = left @ right.t()
    finally:
        setting.fp32_precision = before
    return float((found - exact).norm() / exact.norm()) < 1e-5
