"""Code that files name: none of it is run, imported or unpacked outside its folder."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hf_folders import source
from transformers.integrations import hub_kernels

import optc
from optc.cli import evaluate
from optc.compiler.artifact.folder import finish, verify
from optc.compiler.artifact.genai_config import check_genai_config
from optc.compiler.capture.loading import load_model, meta_model
from optc.compiler.diagnostics import ArtifactError
from optc.compiler.model_folder.checkpoint import check_folder
from optc.exporters.onnx.genai import genai_config
from optc.exporters.trt import build_plan
from optc.runtime.carried import check_device, pt2_runner, run_trt
from optc.runtime.generation.template_sandbox import TooMuchError
from optc.runtime.measuring.task_code import named_code
from optc.runtime.measuring.tasks import _sandbox_templates

REPOSITORY = "someone/kernels"


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_experts_implementation"])
def test_a_config_does_not_choose_what_computes(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would load kernels from a repository of that name."""
    asked: list[object] = []
    monkeypatch.setattr(hub_kernels, "load_and_register_attn_kernel", lambda *args, **_: asked.append(args))
    folder = tmp_path / "model"
    shutil.copytree(source("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: REPOSITORY}))
    made = meta_model(check_folder(folder))
    assert REPOSITORY not in (made.config._attn_implementation, made.config._experts_implementation)
    model, _ = load_model(folder, dtype=torch.float32, attention="eager")
    assert model.config._attn_implementation == "eager"
    assert not asked


def test_a_package_that_an_artifact_needs_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for `a.b` imports `a`."""
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    machine = check_device.Machine()
    assert machine.package("planted.inner") is None
    assert machine.package("planted") == "of unknown version"
    assert machine.package("../planted") is None


SCRIPTS = (check_device.__file__, pt2_runner.__file__, run_trt.__file__, build_plan.__file__)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: Path(path).stem)
def test_a_file_of_an_artifact_is_no_module_of_its_scripts(script: str, tmp_path: Path) -> None:
    """Python puts the folder of a script before all others."""
    path = shutil.copy(script, tmp_path / "script.py")
    (tmp_path / "manifest.json").write_text("{}")
    for name in ("argparse", "json", "typing", "ctypes", "hashlib", "re", "torch", "numpy", "tokenizers"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write('{name} ')")
    for command in ([path, "-h"], ["script.py", "-h"]):  # without packages: none is needed to see what is taken
        subprocess.run([sys.executable, "-S", *command], cwd=tmp_path, capture_output=True, check=False, timeout=60)
    assert not (tmp_path / "ran").exists()


def test_a_file_of_the_current_folder_is_no_module_of_optc(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('imported')")
    sources = str(Path(optc.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "optc", "--version"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": sources},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout.split()[0]) == (0, "optc,"), done.stderr


def archive(path: Path, *members: tuple[str, bytes], link: bool = False) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members:
            member = zipfile.ZipInfo(name)
            member.external_attr = (stat.S_IFLNK | 0o777) << 16 if link else 0o600 << 16
            file.writestr(member, data, zipfile.ZIP_DEFLATED)
    return path


@pytest.mark.parametrize("name", ["model/../../evil", "/etc/evil", "..\\evil", "C:/evil", "model/../evil"])
def test_members_of_a_package_stay_inside(name: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "model.pt2", ("model/good", b"1"), (name, b"2"))
    with pytest.raises(pt2_runner.ArchiveError, match="leads out of its folder"):
        pt2_runner.check_archive(path)


def test_links_bombs_and_noise_are_no_packages(tmp_path: Path) -> None:
    with pytest.raises(pt2_runner.ArchiveError, match="leads out of its folder"):
        pt2_runner.check_archive(archive(tmp_path / "link", ("model/link", b"/etc/passwd"), link=True))
    with pytest.raises(pt2_runner.ArchiveError, match="bytes would be unpacked to 33554432"):
        pt2_runner.check_archive(archive(tmp_path / "bomb", ("model/zeros", bytes(32 << 20))))
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = archive(tmp_path / "twice", ("model/a", b"1"), ("model/a", b"2"))
    with pytest.raises(pt2_runner.ArchiveError, match="some of them twice"):
        pt2_runner.check_archive(twice)
    (tmp_path / "noise").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(pt2_runner.ArchiveError, match="no archive"):
        pt2_runner.check_archive(tmp_path / "noise")
    pt2_runner.check_archive(archive(tmp_path / "good", ("data/aotinductor/model/a.so", b"1")))


def test_such_a_package_is_a_damaged_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from artifacts import make_manifest

    from optc.runtime.sessions import package
    from optc.runtime.sessions.session import SessionOptions

    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    archive(tmp_path / "model.pt2", ("../evil", b"2"))
    info = {"model": "model.pt2", "library": "", "inputs": [], "outputs": [], "constants": {}, "weights": "w"}
    monkeypatch.setattr(pt2_runner, "check_host", lambda needs: None)
    manifest = make_manifest(engine="aotinductor", engine_info=info)
    with pytest.raises(ArtifactError, match="must not be unpacked"):
        package.open_artifact(tmp_path, manifest, SessionOptions())
    assert not (tmp_path.parent / "evil").exists()


GENAI_EDITS: dict[str, tuple[Any, str]] = {
    "a library of operators": (
        lambda c: c["model"]["decoder"]["session_options"].update(custom_ops_library="evil.so"),
        "unknown field `custom_ops_library`",
    ),
    "an execution provider": (
        lambda c: c["model"]["decoder"]["session_options"].update(provider_options=[{"evil": {}}]),
        "unknown field `evil`",
    ),
    "an option of a provider": (
        lambda c: c["model"]["decoder"]["session_options"].update(
            provider_options=[{"cuda": {"user_compute_stream": "1"}}]
        ),
        "unknown field `user_compute_stream`",
    ),
    "another graph": (
        lambda c: c["model"]["decoder"].update(filename="../evil.onnx"),
        "'../evil.onnx', not the artifact's",
    ),
    "another model": (lambda c: c["model"].update(vision={"filename": "evil.onnx"}), "unknown field `vision`"),
    "another input": (lambda c: c["model"]["decoder"]["inputs"].update(input_ids="x"), "Invalid enum value 'x'"),
}


@pytest.mark.parametrize("edit", GENAI_EDITS)
def test_what_genai_reads_is_what_is_written(edit: str, tmp_path: Path) -> None:
    """An artifact whose manifest was sealed again."""
    from artifacts import make_manifest
    from stages import captured

    change, why = GENAI_EDITS[edit]
    config = msgspec.to_builtins(genai_config(captured("llama").contract, "model.onnx"))
    manifest = make_manifest(engine_info={"model": "model.onnx"})
    path = tmp_path / "genai_config.json"
    path.write_text(json.dumps(config))
    finish(tmp_path, manifest)
    verify(tmp_path)
    change(config)
    path.write_text(json.dumps(config))
    finish(tmp_path, manifest)
    with pytest.raises(ArtifactError, match="is not one that optc writes") as caught:
        verify(tmp_path)
    assert why in str(caught.value.why)


def test_a_key_of_genai_twice(tmp_path: Path) -> None:
    """Which of the two an engine takes is not for us to guess."""
    from stages import captured

    text = msgspec.json.encode(genai_config(captured("llama").contract, "model.onnx"))
    twice = text.replace(b'"filename":', b'"filename":"../evil.onnx","filename":', 1)
    assert twice != text
    (tmp_path / "genai_config.json").write_bytes(twice)
    with pytest.raises(ArtifactError, match="is not one that optc writes") as caught:
        check_genai_config(tmp_path, "model.onnx")
    assert caught.value.why == "the key 'filename' stands twice"


def test_templates_of_tasks_reach_no_objects_of_python() -> None:
    from jinja2.exceptions import SecurityError
    from lm_eval import utils

    _sandbox_templates()
    assert utils.apply_template("{{ text|regex_replace('a', 'b') }}\n", {"text": "aa"}) == "bb\n"
    with pytest.raises(SecurityError):
        utils.apply_template("{{ ''.__class__.__mro__[1].__subclasses__() }}", {})
    for endless in ("{{ q.ljust(10 ** 10) }}", "{{ 'a' * 10 ** 10 }}", "{{ q | regex_replace('', q * 9) }}"):
        with pytest.raises(TooMuchError):
            utils.apply_template(endless, {"q": "x" * 9999})


TASKS: dict[str, tuple[str, list[str]]] = {
    "none": ("task: a\ndoc_to_text: '{{ q }} !function x'\n", []),
    "one": ("doc_to_text: !function utils.text\n", ["utils.text"]),
    "in a list": ("metric_list:\n  - metric: !function os.system\n", ["os.system"]),
    "the tag in full": ("doc_to_text: !<!function> os.system\n", ["os.system"]),
    "the tag by a handle": ("%TAG !e! !func\n---\ndoc_to_text: !e!tion os.system\n", ["os.system"]),
    "as a key": ("? !function os.system\n: 1\n", ["os.system"]),
    "behind an alias": ("a: &a {b: !function os.system}\nc: *a\n", ["os.system"]),
    "included": ("include: more\n", ["os.popen"]),
    "included in a list": ("include: [none.yaml, ./more]\n", ["os.popen"]),
    "included by a merge": ("<<: {include: more}\n", ["os.popen"]),
    "includes itself": ("include: [task.yaml, more]\n", ["os.popen"]),
    "no YAML": ("a: [\n", []),
    "nested without end": ("a: " + "[" * 5000, []),
}


@pytest.mark.parametrize("case", TASKS)
def test_code_of_tasks_is_named(case: str, tmp_path: Path) -> None:
    text, expected = TASKS[case]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "task.yaml").write_text(text)
    (tmp_path / "tasks" / "more").write_text("process_docs: !function os.popen\n")
    for path in (tmp_path / "tasks", tmp_path / "tasks" / "task.yaml"):
        assert [name.partition(" ")[0] for name in named_code([path])] == expected


def test_code_of_tasks_is_said_before_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "task.yaml").write_text("doc_to_text: !function os.system\n")
    said: list[str] = []
    monkeypatch.setattr(
        "optc.runtime.measuring.tasks.run_tasks", lambda *_, **options: said.append(capsys.readouterr().err) or {}
    )
    evaluate._run_tasks(None, [str(tmp_path / "task.yaml"), "hellaswag"], evaluate.EvalOptions())  # type: ignore[arg-type]
    assert said == [f"the task runs code: os.system ({tmp_path / 'task.yaml'})\n"]


def test_engines_leave_nothing_in_the_home(tmp_path: Path) -> None:
    """ONNX Runtime would keep a database of what it was asked to do, and send it."""
    pytest.importorskip("onnxruntime")
    code = "import optc, onnx, onnxruntime as ort; from onnx import helper as h, TensorProto as t; g = h.make_graph("
    code += "[h.make_node('Identity', ['x'], ['y'])], 'g', [h.make_tensor_value_info('x', t.FLOAT, [1])], "
    code += (
        "[h.make_tensor_value_info('y', t.FLOAT, [1])]); m = h.make_model(g, opset_imports=[h.make_opsetid('', 20)]); "
    )
    code += "m.ir_version = 10; ort.InferenceSession(m.SerializeToString(), providers=['CPUExecutionProvider'])"
    given = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "ORT_"))}
    given |= {"HOME": str(tmp_path), "PYTHONPATH": str(Path(optc.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], env=given, check=True, timeout=120)
    assert list(tmp_path.iterdir()) == []
