"""Reads linears of bitsandbytes folders; the layout is described in `optc.compiler.formats.layouts.bitsandbytes`."""

from __future__ import annotations

import math

import msgspec
import torch
from torch import Tensor

from optc.compiler.diagnostics import InputError
from optc.compiler.formats.layouts.bitsandbytes import KINDS, STATE
from optc.compiler.formats.layouts.config import ConfigReader
from optc.compiler.formats.layouts.tensors import FLOATS, TensorReader
from optc.compiler.formats.layouts.weight import QuantizedWeight, Scheme, check_parts
from optc.compiler.formats.safetensors_header import shown

_MOST_STATE = 1 << 12
"""Bytes of a state; those that bitsandbytes writes have about 200."""
_VALUES, _NESTED_VALUES = 16, 256


class _State(msgspec.Struct, frozen=True):
    """What a state says of its weight; keys that are not here do not change its values."""

    quant_type: str
    blocksize: int
    shape: tuple[int, int]
    nested_blocksize: int = 0
    nested_offset: float = 0.0


class Bitsandbytes:
    """Reads the linears of one folder.

    Raises (all methods):
        InputError: weights in 8 bits, blocks that cross rows, or tensors that do not fit their state.
    """

    def __init__(self, config: ConfigReader, reader: TensorReader) -> None:
        self._reader = reader
        if not config.boolean("load_in_4bit", False):
            raise config.refusal("optc reads bitsandbytes' 4-bit weights alone, and 'load_in_4bit' is not set")
        kind = config.text("bnb_4bit_quant_type", KINDS[1])
        config.choice("bnb_4bit_quant_type", kind, KINDS)
        config.choice("bnb_4bit_quant_storage", config.text("bnb_4bit_quant_storage", "uint8"), ("uint8",))
        self._state_name = f"weight.{STATE}{kind}"
        self._kind = kind

    def modules(self) -> list[str]:
        """The linears that the files hold quantized."""
        last = f".{self._state_name}"
        return [name.removesuffix(last) for name in self._reader.tensors if name.endswith(last)]

    def parts(self, module: str) -> tuple[str, ...]:
        """The tensors of one linear's weight."""
        names = ["weight", "weight.absmax", "weight.quant_map", self._state_name]
        nested = ["weight.nested_absmax", "weight.nested_quant_map"]
        return tuple(
            f"{module}.{name}" for name in names + [name for name in nested if f"{module}.{name}" in self._reader]
        )

    def shape(self, module: str) -> tuple[int, int]:
        """[N, K] of one linear, as its state says it and its codes have it."""
        return self._state(module).shape

    def read(self, module: str) -> QuantizedWeight:
        """One linear's weight."""
        state = self._state(module)
        rows, columns = state.shape
        pairs = self._reader.read(f"{module}.weight", torch.uint8).reshape(-1)
        codes = torch.stack([pairs >> 4, pairs & 15], -1).reshape(rows, columns)
        scale = self._scales(module, state).reshape(rows, columns // state.blocksize)
        table = self._finite(f"{module}.weight.quant_map", _VALUES)
        scheme = Scheme(bits=4, group_size=state.blocksize, symmetric=False, format="nf4")
        return check_parts(QuantizedWeight(scheme, codes, scale, table=table), module)

    def key_values(self) -> None:
        """The layout has no scales of keys and values."""
        return

    def _scales(self, module: str, state: _State) -> Tensor:
        """By block, float32."""
        name = f"{module}.weight.absmax"
        blocks = math.prod(state.shape) // state.blocksize
        if not state.nested_blocksize:
            return self._finite(name, blocks)
        codes = self._reader.read(name, torch.uint8)
        if tuple(codes.shape) != (blocks,):
            raise self._reader.wrong_shape(name, f"found {list(codes.shape)}, expected {[blocks]}")
        outer = self._finite(f"{module}.weight.nested_absmax", -(-blocks // state.nested_blocksize))
        values = self._finite(f"{module}.weight.nested_quant_map", _NESTED_VALUES)[codes.long()]
        return values * outer.repeat_interleave(state.nested_blocksize)[:blocks] + state.nested_offset

    def _finite(self, name: str, count: int) -> Tensor:
        """A vector of so many finite numbers, float32."""
        value = self._reader.read(name, *FLOATS).float()
        if tuple(value.shape) != (count,):
            raise self._reader.wrong_shape(name, f"found {list(value.shape)}, expected {[count]}")
        if not bool(torch.isfinite(value).all()):
            raise self._unusable(name, "it holds a value that is not finite")
        return value

    def _state(self, module: str) -> _State:
        name = f"{module}.{self._state_name}"
        size = self._reader.shape(name)
        if len(size) != 1 or size[0] > _MOST_STATE:
            raise self._reader.wrong_shape(name, f"found {list(size)}, expected at most {_MOST_STATE} bytes")
        try:
            state = msgspec.json.decode(self._reader.read(name, torch.uint8).numpy().tobytes(), type=_State)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._unusable(name, str(error)) from error
        reason = _misfit(state, self._kind, math.prod(self._reader.shape(f"{module}.weight")))
        if reason:
            raise self._unusable(name, reason)
        return state

    def _unusable(self, name: str, why: str) -> InputError:
        return InputError(
            f"tensor '{shown(name)}' cannot be used",
            where=str(self._reader.folder / self._reader.tensors[name].file),
            why=why,
            remedy="use another copy of the model, or the unquantized one",
        )


def _misfit(state: _State, kind: str, stored: int) -> str:
    """What of a state contradicts the config, the number of stored bytes, or the canonical form; ''."""
    rows, columns = state.shape
    if state.quant_type != kind:
        return f"it is of type {state.quant_type[:20]}, and the config says {kind}"
    if rows <= 0 or columns <= 0 or rows * columns != 2 * stored:
        return f"its shape is {[rows, columns]}, and {stored} bytes hold {2 * stored} codes"
    if state.blocksize <= 0 or columns % state.blocksize:
        return f"its blocks of {state.blocksize} cross the rows of {columns} elements"
    if state.nested_blocksize < 0 or not math.isfinite(state.nested_offset):
        return "its second quantization has no blocks, or no finite offset"
    return ""
