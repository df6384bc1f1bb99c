"""Jinja's sandbox with bounds: a template is code of whoever made the model, and could loop for ever or fill the memory.

The sandbox of Jinja keeps a template from objects that it was not given, and bounds `range` alone. Here every turn of a loop
and every call looks at the clock, and what makes texts or lists longer is counted before it is done: operators, methods of
texts, filters, what is written.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox
from jinja2.runtime import Context

SECONDS = 5.0
"""Of one rendering; templates take milliseconds for a long conversation."""
MOST_CHARACTERS = 1 << 27
"""Of all texts together that one rendering makes on its way, an element of a list counted as eight: a hundred times what fits
the longest contexts."""
_MOST_BITS = 1 << 12  # of a whole number
_ELEMENT = 8
_MOST_PARTS = 1 << 20  # of what a filter divides something into
_WIDTH = re.compile(r"\d+")
_NO_TEXT = """
    abs attr batch count d default dictsort first float groupby int items last length list map max min random reject
    rejectattr reverse round select selectattr slice sort sum unique
    """
_KEEPS = frozenset(_NO_TEXT.split())
"""Filters that make no text of what they are given."""
_REPEATS = frozenset(("expandtabs", "indent", "pprint", "tojson", "translate", "wordwrap", "xmlattr"))
"""Filters and methods that may put an argument at every element or character."""


class TooMuchError(jinja2.TemplateError):
    """A rendering that would take too much time or memory."""


class _Budget(threading.local):
    """What the rendering of this thread may still take; without one nothing is bounded."""

    def __init__(self) -> None:
        self.end, self.left = float("inf"), float("inf")

    @contextmanager
    def given(self) -> Iterator[None]:
        """For one rendering."""
        self.end, self.left = time.monotonic() + SECONDS, MOST_CHARACTERS
        try:
            yield
        finally:
            self.end = self.left = float("inf")

    def spend(self, characters: float) -> None:
        self.left -= max(0, characters)
        if self.left < 0:
            raise TooMuchError(f"it makes texts of more than {MOST_CHARACTERS} characters")

    def look_at_the_clock(self) -> None:
        if time.monotonic() > self.end:
            raise TooMuchError(f"it takes more than {SECONDS:g} s")

    def text_size(self, value: Any) -> float:
        """Characters of a value as text, about; no more is looked at than may be spent."""
        size, level = 0.0, [value]
        while level:
            inner: list[Any] = []
            for item in level:
                size += len(item) if isinstance(item, str | bytes) else _ELEMENT
                if isinstance(item, dict):
                    inner += [*item.keys(), *item.values()]
                elif isinstance(item, list | tuple | set | frozenset):
                    inner += item
                if size + _ELEMENT * len(inner) > self.left:
                    return float("inf")
            level = inner
        return size


_budget = _Budget()


def _joined(parts: Iterable[str]) -> str:
    found = []
    for part in parts:
        _budget.spend(len(part) + 1)
        found.append(part)
    return "".join(found)


def _length(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    return _ELEMENT * len(value) if isinstance(value, list | tuple | dict) else 0


def _largest(values: Iterable[Any]) -> int:
    """The largest number, or length of a text, among arguments."""
    return max(
        (abs(v) if isinstance(v, int) else len(v) for v in values if isinstance(v, int | str | bytes)), default=0
    )


def _format_size(form: Any, values: Any) -> float:
    """Characters that a format with its values can give: each width in it, each number that may be one, each value."""
    text = form.decode("latin1") if isinstance(form, bytes) else form
    widths = sum(int(digits[:18]) for digits in _WIDTH.findall(text))
    fields = text.count("{") + text.count("%")
    given_widths = _largest(values if isinstance(values, tuple) else (values,)) if "*" in text or "{" in text else 0
    return len(text) + widths + fields * (given_widths + _budget.text_size(values))


def _repeated(size: float, arguments: Iterable[Any]) -> float:
    """Characters where an argument may stand at every character."""
    return (size + 1) * (_largest(arguments) + 1)


def _size(name: str, value: Any, arguments: Sequence[Any]) -> float:
    """Characters, about, that a method of a text or a filter makes of a value.

    Args:
        name: of either; they are called the same.
    """
    size = _budget.text_size(value)
    if name in ("format", "format_map"):
        return size + _format_size(value if isinstance(value, str | bytes) else "", tuple(arguments))
    if name == "replace" and isinstance(value, str) and len(arguments) > 1:
        old, new = map(str, arguments[:2])
        return size + (value.count(old) if old else len(value) + 1) * len(new)
    if name == "join":
        return size + len(value) * _largest(arguments)
    if name in _REPEATS:
        tables = [item for table in arguments if isinstance(table, dict) for item in table.values()]
        return _repeated(size, (*arguments, *tables))
    return size + _largest(arguments)


def _bounded_method(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a text, counted; anything else as it is."""
    owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if not isinstance(owner, str | bytes):
        return method

    def call(*arguments: Any, **named: Any) -> Any:
        if name == "join" and arguments:
            items = list(arguments[0])
            _budget.spend(_size(name, items, [owner]))
            return method(items)
        _budget.spend(_size(name, owner, [*arguments, *named.values()]))
        return method(*arguments, **named)

    return call


def _bounded_filter(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is counted."""
    first = int(hasattr(inner, "jinja_pass_arg"))  # of its arguments that the template gives

    @functools.wraps(inner)
    def call(*arguments: Any, **named: Any) -> Any:
        _budget.look_at_the_clock()
        before, value, rest = arguments[:first], arguments[first], arguments[first + 1 :]
        value = list(value) if name == "join" and not hasattr(value, "__len__") else value
        given = [*rest, *named.values()]
        if name not in _KEEPS:
            _budget.spend(_size(name, value, given))
        elif _largest(item for item in given if isinstance(item, int)) > _MOST_PARTS:
            raise TooMuchError(f"the filter {name} is given a number beyond {_MOST_PARTS}")
        found = inner(*before, value, *rest, **named)
        _budget.spend(_length(found))
        return found

    return call


@jinja2.pass_context
def _turns(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    """The items of a loop."""
    for item in items:
        _budget.look_at_the_clock()
        yield item


class _Generator(jinja2.compiler.CodeGenerator):
    """Code in which `~` is counted."""

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: Any) -> None:  # noqa: N802 (Jinja's name)
        self.write("environment.concatenated((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Template(jinja2.Template):
    """A template each rendering of which is bounded."""

    def render(self, *values: Any, **named: Any) -> str:
        with _budget.given():
            return super().render(*values, **named)


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox with bounds, for `from_string` and `render`."""

    code_generator_class = _Generator
    template_class = _Template
    intercepted_binops = frozenset(("+", "*", "%", "**"))
    concat = staticmethod(_joined)

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_written, **options)
        self.filters = {name: _bounded_filter(name, inner) for name, inner in self.filters.items()}
        self.filters["turns"] = _turns
        self.globals.pop("lipsum")  # makes texts of any length, which no model's template wants

    def from_string(self, *source: Any, **options: Any) -> jinja2.Template:
        """A template; what is constant in it is computed here, within the bounds of a rendering."""
        with _budget.given():
            return super().from_string(*source, **options)

    def variables(self, source: str) -> set[str]:
        """Names that a template reads and does not set; what is constant is computed here too."""
        with _budget.given():
            return jinja2.meta.find_undeclared_variables(self.parse(source))

    def add_filter(self, name: str, inner: Callable[..., Any], *, repeats: bool = False) -> None:
        """One more filter, counted as all are.

        Args:
            repeats: it may put an argument at every character.
        """
        bounded = _bounded_filter(name, inner)

        def call(value: Any, *arguments: Any, **named: Any) -> Any:
            _budget.spend(_repeated(_budget.text_size(value), (*arguments, *named.values())))
            return bounded(value, *arguments, **named)

        self.filters[name] = call if repeats else bounded

    @staticmethod
    def concatenated(parts: tuple[Any, ...]) -> str:
        """What `~` makes of its operands."""
        return _joined(str(_written(part)) for part in parts)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(jinja2.nodes.For):
            loop.iter = jinja2.nodes.Filter(loop.iter, "turns", [], [], None, None, lineno=loop.lineno)
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic of a template."""
        whole = isinstance(left, int) and isinstance(right, int)
        if operator == "%" and isinstance(left, str | bytes):
            _budget.spend(_format_size(left, right))
        elif operator == "+":
            _budget.spend(_length(left) + _length(right))
        elif operator == "*" and not whole:
            _budget.spend(_times(left, right))
        elif whole and operator in ("*", "**"):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MOST_BITS:
                raise TooMuchError(f"it computes with numbers of more than {_MOST_BITS} bits")
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The sandbox's own formatting, which is no method of the text."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def call(*arguments: Any, **named: Any) -> str:
            _budget.spend(_format_size(value.__self__, (*arguments, *named.values())))
            return wrapped(*arguments, **named)

        return call

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (as Jinja has it)
        """A call of a template."""
        _budget.look_at_the_clock()
        if not __self.is_safe_callable(__obj):
            raise jinja2.sandbox.SecurityError(f"{__obj!r} is not safely callable")
        found = super().call(__context, _bounded_method(__obj), *args, **kwargs)
        _budget.spend(_length(found))
        return found


def _times(left: Any, right: Any) -> float:
    sequence, count = (right, left) if isinstance(left, int) else (left, right)
    return _length(sequence) * max(0, count) if isinstance(count, int) else 0


def _written(value: Any) -> Any:
    """What is written, before it is made text."""
    if not isinstance(value, str):
        _budget.spend(_budget.text_size(value))
    return value
