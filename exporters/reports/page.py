"""How a page becomes a file: templates with everything escaped, and one style sheet inside; nothing is fetched."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jinja2

from optc.compiler.diagnostics import os_errors
from optc.exporters.reports import numbers

REPORT = "report.html"


@functools.cache
def _environment(package: str) -> jinja2.Environment:
    """Templates of a package, and the ones here, which it may include."""
    loaders = [jinja2.PackageLoader(name, "templates") for name in dict.fromkeys((package, __package__ or ""))]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=numbers.number, percent=numbers.percent, size=numbers.size, seconds=numbers.seconds, count=numbers.count
    )
    return environment


def render_page(package: str, template: str, **values: Any) -> str:
    """The text of a page.

    Args:
        package: whose `templates` hold the template.
        values: what it shows; texts in them are escaped.
    """
    return _environment(package).get_template(template).render(**values)


def write_page(directory: Path, package: str, template: str, **values: Any) -> None:
    """Write `report.html` into a folder.

    Args:
        package, template, values: see `render_page`.

    Raises:
        ResourceError, InputError: the file cannot be written.
    """
    text = render_page(package, template, **values)
    with os_errors("writing the report", str(directory / REPORT)):
        (directory / REPORT).write_text(text)
