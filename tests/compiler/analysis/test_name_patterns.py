"""Which weights a pattern names."""

from __future__ import annotations

import time

import pytest

from optc.compiler.analysis.name_patterns import check_patterns, fits
from optc.compiler.bounded_regex import LONGEST, SECONDS, begins_with
from optc.compiler.diagnostics import NoMatchError, UsageError

UP, HEAD = "model.layers.0.mlp.up_proj.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("pattern", "fitting"),
    [
        ("*.up_proj.*", [UP]),
        ("model.layers.0.mlp.up_proj.weight", [UP]),
        ("model.layers.0.mlp.up_proj", [UP]),
        ("up_proj", [UP]),
        ("*_proj", [UP]),
        ("lm_head", [HEAD]),
        ("re:.*up_proj", [UP]),
        ("re:.*lm_head$", [HEAD]),
        (r"re:model\.layers\.\d+\.", [UP]),
        ("re:layers", []),
        ("mlp", []),
        ("proj", []),
        ("", []),
    ],
)
def test_what_people_write(pattern: str, fitting: list[str]) -> None:
    """Patterns of this project, of llm-compressor, AutoAWQ and GPTQModel."""
    assert [name for name in (UP, HEAD) if fits(name, pattern)] == fitting


@pytest.mark.parametrize(
    ("pattern", "why"), [("re:(", "it is no regular expression"), (f"re:{'a' * 2000}", "2000 characters")]
)
def test_what_is_no_expression_is_named(pattern: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        check_patterns("ignore", [pattern], [UP])


def test_nearest_names_are_told() -> None:
    with pytest.raises(NoMatchError, match=f"names look like {UP}"):
        check_patterns("ignore", ["model.layers.0.mlp.upp_proj.weight"], [HEAD, UP])


def test_a_last_part_that_is_nearly_one_is_told() -> None:
    for pattern in (UP.split(".")[-2].replace("_", ""), "re:.*upproj"):
        with pytest.raises(NoMatchError, match=f"names look like {UP}"):
            check_patterns("ignore", [pattern], [HEAD, UP])


def test_time_is_bounded() -> None:
    begin = time.perf_counter()
    with pytest.raises(ValueError, match="it takes longer than"):
        begins_with("(a|aa)+$", "a" * 60 + "b")
    assert time.perf_counter() - begin < 20 * SECONDS
    assert begins_with("a" * LONGEST, "a" * LONGEST)
