"""An open artifact of an encoder or a plain module: called with tensors, or an encoder with texts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from optc.compiler.artifact.manifest import Manifest
from optc.compiler.diagnostics import InputError, UsageError
from optc.compiler.ir.contract import Contract, Input
from optc.compiler.notebook import html_table
from optc.runtime.generation.tokenizer import Tokenizer

Array = npt.NDArray[Any]
Call = Callable[..., Sequence[Array]]
"""An engine: the inputs of a contract in order, as contiguous arrays, to its outputs in order."""

_NUMPY_LACKS = dict.fromkeys(("bfloat16", "float8_e4m3fn", "float8_e5m2"), "float32")
"""Types of inputs that arrays cannot have -> the type in which they are given."""


class TensorModel:
    """What `load` opens where an artifact does not generate text.

    Attributes:
        inputs, outputs: names, in order.
    """

    def __init__(self, manifest: Manifest, call: Call, tokenizer: Tokenizer | None) -> None:
        self.manifest, self.tokenizer = manifest, tokenizer
        self.inputs = [spec.name for spec in manifest.contract.inputs]
        self.outputs = [spec.name for spec in manifest.contract.outputs]
        self._call = call

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Run on one tensor for each input, in order or by name: NumPy arrays, torch tensors, or nested lists.

        An encoder takes texts as well, one or a list: they are encoded, padded on the right and masked.

        Returns:
            The output, or a tuple of them; tensors of torch where an input was one, else NumPy arrays.

        Raises:
            InputError: names the input that is missing, or that has another type or shape.
        """
        if len(inputs) == 1 and not named and _is_text(inputs[0]):
            outputs = self.run(self.encode(inputs[0]))
        else:
            outputs = self.run(self._by_name(inputs, named))
        found = [outputs[name] for name in self.outputs]
        torch = sys.modules.get("torch")
        if torch is not None and any(isinstance(item, torch.Tensor) for item in (*inputs, *named.values())):
            found = [torch.from_numpy(array) for array in found]
        return found[0] if len(found) == 1 else tuple(found)

    def run(self, named: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name, of inputs by name.

        Raises:
            InputError: as a call.
        """
        arrays = checked_inputs(self.manifest.contract, named)
        return dict(zip(self.outputs, self._call(*arrays), strict=True))

    def encode(self, texts: str | Sequence[str]) -> dict[str, Array]:
        """The inputs of an encoder for one text or several: int64 [texts, longest], padded on the right with 0.

        Raises:
            InputError: no encoder, no tokenizer, no text or an empty one; a text that is longer than the context.
        """
        return padded(self.manifest.contract, self.tokens([texts] if isinstance(texts, str) else texts))

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts.

        Raises:
            InputError: as `encode`.
        """
        if all(spec.role != "input_ids" for spec in self.manifest.contract.inputs):
            raise InputError("the model takes no text", remedy=f"give its inputs: {', '.join(self.inputs)}")
        if self.tokenizer is None:
            raise InputError("the model has no tokenizer", remedy=f"give token ids: {', '.join(self.inputs)}")
        rows = [self.tokenizer.encode(text) for text in texts]
        if not rows or not all(rows):
            raise InputError("an empty text", remedy="give texts of at least one token")
        check_lengths(rows, self.manifest.contract)
        return rows

    def embed(
        self,
        texts: str | Sequence[str],
        *,
        prompt_name: str | None = None,
        truncate: bool = False,
        batch_tokens: int = 4096,
    ) -> Array:
        """Embeddings of texts; see `EmbeddingModel.embed`.

        Raises:
            InputError: the model gives none.
        """
        encoder = self.manifest.contract.kind == "encoder"
        raise InputError(
            "the model gives no embeddings",
            why=f"its outputs are {', '.join(self.outputs)}",
            remedy="compile it with --pooling mean, cls or lasttoken" if encoder else "call it with its inputs",
        )

    def close(self) -> None:
        """Nothing is held open."""

    def __repr__(self) -> str:
        inputs = ", ".join(f"{spec.name} {spec.dtype}{list(spec.dims)}" for spec in self.manifest.contract.inputs)
        return f"TensorModel({self.manifest.target}: {inputs} -> {', '.join(self.outputs)})"

    def _repr_html_(self) -> str:
        contract = self.manifest.contract
        rows = [("input", spec.name, str(spec.dtype), str(list(spec.dims))) for spec in contract.inputs]
        rows += [("output", spec.name, str(spec.role), "") for spec in contract.outputs]
        heading = f"TensorModel({self.manifest.target}, {self.manifest.weight_bytes / 1e6:.2f} MB)"
        return html_table(heading, ("", "name", "type", "axes"), rows)

    def _by_name(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Array]:
        if len(inputs) > len(self.inputs):
            raise UsageError(f"{len(inputs)} inputs were given, the model takes {len(self.inputs)}", remedy=repr(self))
        first = dict(zip(self.inputs, inputs, strict=False))
        twice = sorted(set(first) & set(named))
        if twice:
            raise UsageError(f"the input '{twice[0]}' was given twice", remedy="give it once")
        return {name: as_array(value) for name, value in {**first, **named}.items()}


def checked_inputs(contract: Contract, named: Mapping[str, Array]) -> list[Array]:
    """The inputs of a contract in order, each as it must be.

    Raises:
        InputError: names the input that is missing or unknown, or that has another type or shape.
    """
    names, sizes = [spec.name for spec in contract.inputs], dict[str, int]()
    arrays = [_checked(spec, named.get(spec.name), sizes) for spec in contract.inputs]
    unknown = sorted(set(named) - set(names))
    if unknown:
        raise InputError(f"the model has no input '{unknown[0]}'", remedy=f"its inputs are {', '.join(names)}")
    return arrays


def padded(contract: Contract, rows: Sequence[Sequence[int]]) -> dict[str, Array]:
    """The inputs of an encoder for rows of token ids: int64 [rows, longest], padded on the right with 0."""
    lengths = np.array([len(row) for row in rows])
    ids = np.zeros((len(rows), int(lengths.max())), np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
    made = {"input_ids": ids, "token_type_ids": np.zeros_like(ids)}
    made["attention_mask"] = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
    return {spec.name: made[spec.role] for spec in contract.inputs if spec.role in made}


def check_lengths(rows: Sequence[Sequence[int]], contract: Contract) -> None:
    """Hold rows of token ids to the context.

    Raises:
        InputError: one is longer.
    """
    longest, limit = max(map(len, rows)), contract.model.context_length
    if limit and longest > limit:
        raise InputError(f"a text has {longest} tokens, the context holds {limit}", remedy="cut it")


def as_array(value: Any) -> Array:
    """A tensor of torch, an array or nested lists, as an array."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return np.asarray(value.float() if value.dtype is torch.bfloat16 else value)
    return np.asarray(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(item, str) for item in value)
    )


def _checked(spec: Input, array: Array | None, sizes: dict[str, int]) -> Array:
    """An input that fits its spec: contiguous, of its type, with its sizes, equal names being equal sizes.

    Python's numbers have no types of their own, so that int64 and float64 are taken for other whole and real numbers
    where nothing is lost by it.
    """
    wanted = f"{spec.dtype} {list(spec.dims)}"
    if array is None:
        raise InputError(f"the input '{spec.name}' is missing", remedy=f"give {wanted}")
    kind = np.dtype(_NUMPY_LACKS.get(spec.dtype, spec.dtype))
    cast = array.astype(kind) if array.dtype.kind == kind.kind or array.dtype == kind else None
    if cast is not None and array.dtype.kind in "iu" and not np.array_equal(cast, array):
        cast = None
    fits = cast is not None and array.ndim == len(spec.dims)
    for dim, size in zip(spec.dims, array.shape, strict=False):
        fits = fits and size == (sizes.setdefault(dim, size) if isinstance(dim, str) else dim)
    if not fits or cast is None:
        where = f" with {sizes}" if sizes else ""
        raise InputError(
            f"the input '{spec.name}' is {array.dtype} {list(array.shape)}",
            why=f"the model takes {wanted}{where}",
            remedy=f"give {wanted}",
        )
    return np.ascontiguousarray(cast)
