"""Private or changing torch APIs that optc relies on, for torch 2.11 to 2.13, in one file.

Everything here is a thin shim: what torch may rename or move is named once, so that a new torch
breaks (and is repaired) here.
"""

from __future__ import annotations

import functools
import io
import logging
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._export.serde.union import _Union
from torch._export.verifier import SpecViolationError
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

__all__ = [
    "SERDE_ERRORS",
    "SYMBOLIC_OPERATORS",
    "SpecViolationError",
    "aoti_compile",
    "aoti_constant_names",
    "aoti_errors",
    "aoti_limits",
    "decomposition",
    "deserialize_graph",
    "evaluate_size",
    "export_program",
    "functional_program",
    "has_inductor_march",
    "inductor_compile",
    "is_data_dependence",
    "is_data_symbol",
    "is_union",
    "listing_fake_tensors",
    "node_meta",
    "serialize_graph",
    "size_hint",
    "size_symbols",
    "static_shape",
    "symbolic_dispatch",
    "sympy_functions",
    "torch_dtype",
    "unflatten_inputs",
    "vector_flags",
]

# torchao, which ExecuTorch brings and transformers imports where it finds it, tries to load kernels for GPUs, and
# registers enums in a way that torch 2.13 warns of: neither is about the model at hand.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """`graph_schema` and `SCHEMA_MAJOR`, which saved programs alone need: a twelfth of what a plan imports beside torch."""
    if name == "graph_schema":
        return _serde_schema()
    if name == "SCHEMA_MAJOR":
        return _serde_schema().SCHEMA_VERSION[0]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _serde_schema() -> Any:
    """The classes of torch's schema of saved graphs."""
    from torch._export.serde import schema

    return schema


SYMBOLIC_OPERATORS: Mapping[str, Callable[..., Any]] = {
    f"{op.__module__}.{op.__name__}": op
    for op in (
        operator.add,
        operator.sub,
        operator.mul,
        operator.floordiv,
        operator.truediv,
        operator.mod,
        operator.pow,
        operator.neg,
        operator.pos,
        operator.and_,
        operator.or_,
        operator.lshift,
        operator.rshift,
        operator.eq,
        operator.ne,
        operator.lt,
        operator.le,
        operator.gt,
        operator.ge,
        math.trunc,
        torch.sym_not,
        torch.sym_int,
        torch.sym_float,
        torch.sym_ite,
        torch.sym_max,
        torch.sym_min,
        torch.sym_sqrt,
    )
}
"""Functions over sizes that an exported graph may call, by the name the graph file gives them."""

SERDE_ERRORS = (
    RuntimeError,  # with torch's SerializeError, RecursionError and NotImplementedError
    AssertionError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    SyntaxError,
    SpecViolationError,
)
"""What torch raises on a graph, or the file of one, that makes no sense to it."""


def sympy_functions() -> Any:
    """torch's functions over sizes, a module of sympy's functions; sympy is imported with it."""
    from torch.utils._sympy import functions

    return functions


def _serde() -> Any:
    """torch's serializer. Imported when it is used: it brings Dynamo, a second of `optc plan`'s three."""
    from torch._export.serde import serialize

    return serialize


def serialize_graph(exported: ExportedProgram) -> dict[str, Any]:
    """The graph, signature and shapes in torch's schema as JSON-able values; no tensor data, no guards.

    This is torch's ExportedProgramSerializer without its trial canonicalization, a third of its time.

    Raises:
        SERDE_ERRORS: torch's schema has no place for a node.
    """
    exported.validate()
    module = _serde().GraphModuleSerializer(exported.graph_signature, exported.module_call_graph)
    schema = _serde_schema()
    major, minor = schema.SCHEMA_VERSION
    program = schema.ExportedProgram(
        graph_module=module.serialize(exported.graph_module),
        opset_version={"aten": torch._C._get_max_operator_version()},
        range_constraints=_serde().serialize_range_constraints(exported.range_constraints),
        schema_version=schema.SchemaVersion(major=major, minor=minor),
        verifiers=[verifier.dialect for verifier in exported.verifiers],
        torch_version=str(torch.__version__),
    )
    plain: dict[str, Any] = _serde()._dataclass_to_dict(program)
    return plain


def deserialize_graph(
    program: Any,
    state_dict: dict[str, Tensor],
    constants: dict[str, Tensor],
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None,
) -> ExportedProgram:
    """An ExportedProgram from a `graph_schema.ExportedProgram` and its tensors.

    The tensors must be given as dicts: torch would unpickle bytes.

    Raises:
        SERDE_ERRORS: the program is inconsistent.
    """
    assert isinstance(state_dict, dict) and isinstance(constants, dict)  # noqa: PT018
    assert example_inputs is None or isinstance(example_inputs, tuple)
    reader = _serde().ExportedProgramDeserializer()
    exported = reader.deserialize(program, state_dict, constants, example_inputs)
    _drop_unused_outputs(exported.graph)
    exported.graph_module.recompile()
    return exported


def _drop_unused_outputs(graph: torch.fx.Graph) -> None:
    """Erase the getitem nodes that torch invents for outputs that nothing reads."""
    for node in reversed(graph.nodes):
        if node.target is operator.getitem and not node.users:
            producer, index = node.args
            if node.name == f"{producer}_unused_{index}":
                graph.erase_node(node)


def unflatten_inputs(in_spec: str, leaves: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a call from its flat tensors. The spec must have been checked: torch imports
    modules that some specs name."""
    args, kwargs = pytree.tree_unflatten(list(leaves), pytree.treespec_loads(in_spec))
    return args, kwargs


def is_union(cls: type) -> bool:
    """Whether a class of `graph_schema` is one of its tagged unions."""
    return issubclass(cls, _Union)


def torch_dtype(scalar_type: Any) -> torch.dtype:
    """The dtype that a `graph_schema.ScalarType` stands for."""
    dtype: torch.dtype = _serde()._SERIALIZE_TO_TORCH_DTYPE[scalar_type]
    return dtype


def static_shape(sizes: Sequence[Any]) -> tuple[int, ...] | None:
    """The ints of a list of `graph_schema.SymInt`, None when one of them is symbolic."""
    values = [size.as_int for size in sizes if size.type == "as_int"]
    return tuple(values) if len(values) == len(sizes) else None


def symbolic_dispatch() -> AbstractContextManager[None]:
    """Lets composite operators (linear) see symbolic sizes in Python; torch 2.11's C++ ones refuse them."""
    from torch._dispatch.python import enable_python_dispatcher

    return enable_python_dispatcher()


def size_hint(size: torch.SymInt | int) -> int:
    """What a symbolic size is in the call that it was traced with, without fixing it."""
    return size if isinstance(size, int) else int(size.node.hint)


def size_symbols(size: torch.SymInt) -> dict[Any, int]:
    """The sympy symbols of a size, with what each is in the call that it was traced with."""
    env = size.node.shape_env
    known = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val
    return {symbol: int(known[symbol]) for symbol in size.node.expr.free_symbols if symbol in known}


@contextmanager
def listing_fake_tensors(function: Callable[[Tensor, Callable[[Tensor], Any]], Any]) -> Iterator[None]:
    """Let `function` answer `tolist` of fake tensors, which is a method of their own; it is given theirs too."""
    from torch._subclasses.fake_tensor import FakeTensor

    own = FakeTensor.tolist
    FakeTensor.tolist = lambda self: function(self, own)  # type: ignore[method-assign, arg-type]
    try:
        yield
    finally:
        FakeTensor.tolist = own  # type: ignore[method-assign]


@contextmanager
def node_meta(node: torch.fx.Node) -> Iterator[None]:
    """Within `torch.fx.traceback.preserve_node_meta`, nodes that are made get this one's metadata, as torch's interpreter
    gives it to them, but for the history of nodes behind it: nothing here reads that, and each copy of it is a deep one."""
    from torch.fx import traceback

    held = traceback.current_meta
    if traceback.has_preserved_node_meta() and node.meta:
        traceback.current_meta = {key: value for key, value in node.meta.items() if key != "from_node"}
    try:
        yield
    finally:
        traceback.current_meta = held


def is_data_dependence(error: BaseException | None) -> bool:
    """Whether torch.export failed at a decision that depends on data."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    return isinstance(error, GuardOnDataDependentSymNode)


def is_data_symbol(symbol: Any) -> bool:
    """Whether a symbol of a size's expression stands for a number that was read out of a tensor."""
    from torch.utils._sympy.symbol import SymT, symbol_is_type

    return bool(symbol_is_type(symbol, (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT)))


def evaluate_size(expression: Any, values: Mapping[Any, Any]) -> Any:
    """A sympy expression over sizes, with symbolic sizes or numbers in place of its symbols."""
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis

    return sympy_interp(PythonReferenceAnalysis, dict(values), expression)


def inductor_compile(
    module: torch.fx.GraphModule, fakes: Sequence[Tensor], configs: dict[str, Any]
) -> Callable[..., Sequence[Any]]:
    """Compile a graph with Inductor for this process.

    Args:
        module: flat tensors in, a tuple of tensors out; Inductor takes it over.
        fakes: its inputs, whose symbolic sizes stay so.
        configs: Inductor's settings, while it compiles.
    """
    from torch._inductor.compile_fx import compile_fx

    assert fakes, "the mode is read off a fake tensor"
    mode = fakes[0].fake_mode  # type: ignore[attr-defined]
    with torch._guards.tracing(torch._guards.TracingContext(mode)):
        compiled: Any = compile_fx(module, list(fakes), config_patches=configs)
    found: Callable[..., Sequence[Any]] = compiled
    return found


def has_inductor_march() -> bool:
    """Whether Inductor lets the `-march` of its C++ be chosen (torch 2.13)."""
    from torch._inductor import config

    return hasattr(config.cpp, "march")


def vector_flags() -> list[str]:
    """Compiler flags (`-mavx2`) of the vector instructions that Inductor generates on this machine."""
    from torch._inductor.cpu_vec_isa import invalid_vec_isa, pick_vec_isa

    chosen = pick_vec_isa()
    return [] if chosen == invalid_vec_isa else str(chosen.build_arch_flags()).split()


def export_program(
    module: torch.nn.Module, args: tuple[Any, ...], dynamic_shapes: Any, *, deferred: bool = False
) -> ExportedProgram:
    """torch.export in non-strict mode.

    Without the cache of fake tensors' dispatch: where sizes are symbols, looking a result up, and proving that it fits,
    takes longer than computing its shape again (a third of the whole export of a decoder).

    Args:
        deferred: conditions on sizes that torch cannot decide become asserts in the graph (`ir/deferred`).
    """
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        return torch.export.export(
            module,
            args,
            dynamic_shapes=dynamic_shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=deferred,
        )


def functional_program(exported: ExportedProgram) -> ExportedProgram:
    """The same program without in-place operators: torch's functionalization, and no other decomposition.

    Composite operators that may return views of their inputs become what they are made of.
    """
    return exported.run_decompositions({})


@functools.cache
def _export_decompositions() -> Any:
    """torch.export's table, which takes a tenth of a second to make."""
    return torch.export.default_decompositions()


def decomposition(op: torch._ops.OpOverload) -> Callable[..., Any] | None:
    """What computes an ATen operator by others: its own definition, torch.export's table, or torch's; else None."""
    if op._can_decompose():
        return op.decompose
    table = _export_decompositions()
    found: Callable[..., Any] | None = table[op] if op in table else torch._decomp.decomposition_table.get(op)
    return found


def aoti_compile(exported: ExportedProgram, configs: dict[str, Any]) -> bytes:
    """Compile a program into an AOTInductor package (`.pt2`); its bytes, as torch's own writer of files ends the process
    where a disk is full.

    Raises:
        aoti_errors(): the C++ compiler is missing or failed. aoti_limits(): Inductor cannot take the graph.
    """
    from torch import _inductor

    package = io.BytesIO()
    _inductor.aoti_compile_and_package(exported, package_path=package, inductor_configs=configs)
    return package.getvalue()


def aoti_errors() -> tuple[type[Exception], ...]:
    """What `aoti_compile` raises when the C++ compiler is missing or fails."""
    from torch._inductor import exc

    return (exc.CppCompileError, exc.InvalidCxxCompiler)


def aoti_limits() -> tuple[type[Exception], ...]:
    """What `aoti_compile` raises where Inductor cannot take a graph; its own errors hold another as `inner_exception`."""
    return (RuntimeError, AssertionError, ValueError, TypeError, LookupError, NotImplementedError)


def aoti_constant_names(path: str) -> list[str]:
    """Names of the constants that a package must be given before it runs."""
    loader = torch._C._aoti.AOTIModelPackageLoader(path, "model", False, 1, -1)
    return list(loader.get_constant_fqns())
