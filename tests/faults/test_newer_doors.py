"""Files that later commands read: the state of a search, drafts of another machine, stages in a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from artifacts import make_artifact, make_manifest
from command_line import optc

from optc import searching
from optc.cli import own_process
from optc.compiler.artifact.folder import rewrite
from optc.compiler.diagnostics import ArtifactError, InputError
from optc.compiler.ir.contract import Contract, Input, Output
from optc.exporters.reports.report import write_report
from optc.request import from_python
from optc.runtime.sessions.session import SessionOptions

TRIED = {"name": "rtn-4", "outcome": "made", "size": 10}
SEARCHES: dict[str, bytes] = {
    "empty": b"",
    "bad UTF-8": b'{"key": "\xff", "tried": {}}',
    "nested without end": b'{"key": "k", "tried": {"a": ' + b"[" * 100_000,
    "a number of 5000 digits": json.dumps({"key": "k", "tried": {}}).encode()[:-2] + b'{"a":' + b"9" * 5000 + b"}}",
    "no tries": b'{"key": "k"}',
    "larger than any": b" " * ((1 << 20) + 1),
    **{
        f"a try of the name {name!r}": json.dumps({"key": "k", "tried": {name: TRIED}}).encode()
        for name in ("../victim", "/victim", "..", ".", "", "a/b", "a\n", "A", "x" * 65)
    },
    "another name inside": json.dumps({"key": "k", "tried": {"rtn-4": {**TRIED, "name": "../victim"}}}).encode(),
}


def opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The search of a folder, whatever its key depends on."""
    monkeypatch.setattr(searching._Search, "_key", lambda self: "k")
    (folder.parent / "text").write_text("a")
    request = from_python("onnx-cpu")
    return searching._Search(folder, request, folder, folder.parent / "text", searching.Limits(), None, 0)


@pytest.mark.parametrize("case", SEARCHES)
def test_searches(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of tries that are not among the best are removed: a name must not lead out of the search."""
    for name in ("out", "victim"):
        (tmp_path / name).mkdir()
    (tmp_path / "out" / "search.json").write_bytes(SEARCHES[case])
    with pytest.raises(InputError) as caught:
        opened(tmp_path / "out", monkeypatch).remove_all_but(set())
    assert caught.value.where == str(tmp_path / "out" / "search.json")
    assert (tmp_path / "victim").is_dir()


def test_names_of_all_tries_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name, _ in searching.names_of(from_python("vllm"), (), (2, 3, 4, 8))]
    assert len(names) > 15
    (tmp_path / "out" / "rtn-4").mkdir(parents=True)
    tried = {name: {**TRIED, "name": name} for name in names}
    (tmp_path / "out" / "search.json").write_text(json.dumps({"key": "k", "tried": tried}))
    search = opened(tmp_path / "out", monkeypatch)
    assert list(search.state.tried) == names
    search.remove_all_but(set(names) - {"rtn-4"})
    assert not (tmp_path / "out" / "rtn-4").exists()


@pytest.mark.parametrize(
    "command",
    [["run", "--prompt", "x"], ["bench", "--text", "text"]],
    ids=["run", "bench"],
)
def test_a_draft_of_another_machine_runs_in_the_own_process_too(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[Path]] = []

    def leave(artifacts: list[Path]) -> None:
        asked.append(artifacts)
        raise SystemExit(0)

    for module in ("run", "bench_speculative"):
        monkeypatch.setattr(f"optc.cli.{module}.leave_to_own_process", leave)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("a")
    assert optc(command[0], "a", *command[1:], "--speculative", "draft", "--draft", "b", "--trust") == 0
    assert asked == [[Path("a"), Path("b")]]


def test_one_of_two_artifacts_of_another_machine_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        make_artifact(tmp_path / name)
    forked: list[bool] = []
    monkeypatch.setattr(own_process.os, "fork", lambda: forked.append(True) or 0)
    monkeypatch.setattr(own_process, "_end_with", lambda parent: None)
    monkeypatch.setattr(own_process, "_is_made_here", lambda artifact: artifact.name == "a")
    own_process.leave_to_own_process([tmp_path / "a"])
    assert not forked
    own_process.leave_to_own_process([tmp_path / "a", tmp_path / "b"])
    assert forked == [True]


def test_a_stage_that_is_no_text_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    make_artifact(tmp_path / "a")
    rewrite(tmp_path / "a", _with_stage, replaces=("ir/00-capture.txt", "report.html"))
    assert "&lt;b&gt;\ufffd" in (tmp_path / "a" / "report.html").read_text(encoding="utf-8")


def _with_stage(directory: Path, manifest: Any) -> Any:
    (directory / "ir").mkdir(exist_ok=True)
    (directory / "ir" / "00-capture.txt").write_bytes(b"<b>\xff")
    write_report(directory, manifest)
    return manifest


@pytest.mark.parametrize(("inputs", "output"), [(["x"], "z"), (["x", "y"], "other")], ids=["input", "output"])
def test_a_contract_of_another_graph(
    inputs: list[str], output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest that was sealed again, with an input or an output that the graph has not."""
    helper = pytest.importorskip("onnx.helper")
    from optc.runtime.sessions import onnx_artifact

    x, y, z = (helper.make_tensor_value_info(name, 1, [2]) for name in "xyz")
    graph = helper.make_graph([helper.make_node("Add", ["x", "y"], ["z"])], "g", [x, y], [z])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    monkeypatch.setattr(onnx_artifact, "check_cpu", lambda needs: None)
    contract = Contract(
        kind="module",
        inputs=tuple(Input(name=name, role="input", dtype="float32", dims=(2,)) for name in inputs),
        outputs=(Output(name=output, role="output"),),
    )
    manifest = make_manifest(engine_info={"model": "model.onnx"}, contract=contract)
    with pytest.raises(ArtifactError, match="the manifest's contract is not the graph's"):
        onnx_artifact.open_caller(tmp_path, manifest, SessionOptions(threads=1))
