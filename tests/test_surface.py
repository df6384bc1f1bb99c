"""What `import optc` offers at a prompt."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from artifacts import make_manifest

import optc
from optc.compiler.artifact.sizes import Sizes
from optc.compiler.version import version


def test_names_are_listed_and_there() -> None:
    assert set(optc.__all__) <= set(dir(optc))
    assert {name for name in optc.__all__ if not hasattr(optc, name)} == set()
    assert optc.__version__ == version()
    assert "__version__" in dir(optc)
    with pytest.raises(AttributeError, match="module 'optc' has no attribute 'nothing'"):
        _ = optc.nothing


def test_a_result_fits_a_screen() -> None:
    manifest = msgspec.structs.replace(make_manifest(), sizes=Sizes(source=8_000_000, linears=2_000_000))
    lines = repr(optc.CompileResult(Path("out/model"), manifest)).splitlines()
    assert lines[0] == f"CompileResult(out/model: {manifest.target}, {manifest.seconds['total']:.1f} s"
    assert lines[1:] == ["  weights 8.00 MB -> 2.00 MB (0.25 x): linears 2.00 MB", "  since the capture: KL 2e-09)"]


def test_the_loader_of_packages_is_importable_where_scripts_know_it() -> None:
    from optc.runtime import pt2_runner
    from optc.runtime.carried.pt2_runner import open_folder

    assert pt2_runner.open_folder is open_folder
