"""What only a process of the command line does: it imports less, and ends without taking down what it made."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from optc.cli.lean_imports import absent, from_the_last_list

_COMMAND = """
import atexit, sys, threading, time
from optc.cli import main

class Held:
    def __del__(self):
        print("taken down")

held = Held()

def run():
    atexit.register(lambda: print("exit handler"))
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    print("out", end="")
    sys.exit({code!r})

main.main = run
main.script()
"""


@pytest.mark.parametrize(
    ("code", "returned", "out"),
    [
        (3, 3, "outthread\nexit handler\n"),
        (0, 0, "outthread\nexit handler\n"),
        ("what went wrong", 1, "outthread\nexit handler\ntaken down\n"),  # Python itself says it, and ends as ever
    ],
)
def test_a_command_ends_behind_its_threads_and_exit_handlers(code: int | str, returned: int, out: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _COMMAND.format(code=code)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (returned, out)
    assert done.stderr == ("" if isinstance(code, int) else f"{code}\n")


def test_a_package_is_absent_for_a_while() -> None:
    sys.modules.pop("this", None)
    with absent("this", "json"):
        assert importlib.util.find_spec("this") is None
        assert importlib.util.find_spec("json") is not None  # imported already
        with pytest.raises(ImportError):
            importlib.import_module("this")
    assert importlib.util.find_spec("this") is not None
    with pytest.raises(ZeroDivisionError), absent("this"):
        _ = 1 / 0
    assert "this" not in sys.modules


def test_modules_of_transformers_are_listed_as_it_lists_them() -> None:
    from transformers.utils import import_utils

    quick = from_the_last_list(import_utils.fetch__all__)
    files = sorted((Path(import_utils.__file__).parents[1] / "models" / "auto").glob("*.py"))
    files += sorted((Path(import_utils.__file__).parents[1] / "models" / "llama").glob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in files]
    texts += ["", "x = 1", "__all__ = ['a']", "__all__ = []\n__all__ = [\n    'b',\n]\n", "def f():\n    __all__ = 1"]
    assert [quick(text) for text in texts] == [import_utils.fetch__all__(text) for text in texts]
    assert any("LlamaForCausalLM" in quick(text) for text in texts)


_ONE_COMMAND = """
import gc
from optc.cli import garbage

def rests():
    with garbage.uncollected():
        assert not gc.isenabled()
    return not gc.isenabled()

before = rests()
garbage.leave_to_the_end()
print(before, rests())
"""


def test_the_collector_of_a_process_of_one_command_rests_to_the_end() -> None:
    """Elsewhere it comes back."""
    done = subprocess.run([sys.executable, "-c", _ONE_COMMAND], capture_output=True, text=True, check=True)
    assert done.stdout == "False True\n"
