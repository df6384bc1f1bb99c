"""The engines that artifacts are for: what opens one, which of its files, and where it runs, once for all.

`load`, `bundle`, `check` and the manifest's reader ask here. Sessions and programs of bundles lie on higher floors: an
engine names them as "module:object", which is imported when it is asked for, so that no engine pulls in another's
packages. Packages may add engines by entry points of the group `optc.engines`, each an `Engine`.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from optc.compiler.artifact.engine_facts import (
    ExecutorchFacts,
    Facts,
    FolderFacts,
    Needs,
    OnnxFacts,
    PackageFacts,
    PackageNeeds,
    PlanFacts,
    ProgramFacts,
    read_facts,
)
from optc.compiler.diagnostics import ArtifactError
from optc.compiler.plugins import plugins

ENTRY_POINTS = "optc.engines"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What runs artifacts of a kind.

    Attributes:
        name: as manifests have it.
        session: "module:function" of (folder, manifest, SessionOptions) -> Session.
        runner: "module:function" of (folder, manifest) -> a function of a program's inputs, flat tensors, to its outputs:
            what was written, without a session, for the check before an artifact is published; or a text that says why
            this machine cannot open it. None where exporters themselves open what they wrote.
        caller: "module:function" of (folder, manifest, SessionOptions) -> a function of the inputs of an encoder or a
            module, as contiguous arrays in order, to its outputs; None where optc has no way to call such artifacts.
        follows_program: the runner takes the device of the program that it is compared with, and runs there.
        package: the installed distribution that the runner calls, whose version the check records; "" for none.
        opens_instead: what the runner opens where that is not what users run; "" where it is. A runner that opens one or
            the other, by what the machine has, says it itself: in an attribute of this name.
        device: where it runs, which is where a check of a host looks for memory; "target": as the target says.
        check: "module:function" of (folder, manifest), which refuses files that no engine may open, their hashes being
            right; None where the session's own reader does that.
        bundle: "module:object", the `BundleEngine` with its C++ program; None where there is none.
        facts, needs: the types of `engine_info` and of the manifest's `needs`.
        files: keys of `engine_info` that name files which the engine opens; a value may be null.
        native: those of them that hold machine code.
        has_threads: the number of a session's threads can be chosen.
        eager: it is no engine of optc's: the session captures a model folder and runs its graph, slowly, and is opened
            only where that is asked for.
    """

    name: str
    session: str
    runner: str | None = None
    caller: str | None = None
    package: str = ""
    opens_instead: str = ""
    device: Literal["target", "cpu", "cuda"] = "target"
    check: str | None = None
    bundle: str | None = None
    facts: type[Facts] = Facts
    needs: type[Needs] = Needs
    files: tuple[str, ...] = ()
    native: tuple[str, ...] = ()
    has_threads: bool = True
    eager: bool = False
    follows_program: bool = False

    def open_session(self, *arguments: Any) -> Any:
        """Call what `session` names."""
        return _resolve(self.session)(*arguments)

    def open_runner(self, *arguments: Any) -> Any:
        """Call what `runner` names."""
        assert self.runner is not None
        return _resolve(self.runner)(*arguments)

    def open_caller(self, *arguments: Any) -> Any:
        """Call what `caller` names."""
        assert self.caller is not None
        return _resolve(self.caller)(*arguments)

    def check_opened(self, *arguments: Any) -> None:
        """Call what `check` names."""
        if self.check is not None:
            _resolve(self.check)(*arguments)

    def bundle_engine(self) -> Any | None:
        """What `bundle` names, or None."""
        return None if self.bundle is None else _resolve(self.bundle)

    def native_code(self, info: Mapping[str, Any]) -> tuple[str, ...]:
        """Paths of the files that hold machine code."""
        return tuple(path for key, path in self.opened_files(info).items() if key in self.native)

    def native_code_of(self, infos: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
        """The same of all programs of an artifact."""
        return tuple(dict.fromkeys(path for info in infos for path in self.native_code(info)))

    def opened_files(self, info: Mapping[str, Any]) -> dict[str, str]:
        """Key of `engine_info` -> path, of the files that the engine opens."""
        return {key: str(info[key]) for key in self.files if info.get(key) is not None}


ONNX = Engine(
    name="onnx",
    session="optc.runtime.sessions.onnx_artifact:open_artifact",
    runner="optc.runtime.sessions.onnx_artifact:open_runner",
    caller="optc.runtime.sessions.onnx_artifact:open_caller",
    package="onnxruntime",
    check="optc.runtime.sessions.onnx_artifact:check_files",
    bundle="optc.exporters.bundle.engines:GENAI",
    facts=OnnxFacts,
    files=("model", "first"),
)
ONNX_CUDA = Engine(
    name="onnx-cuda",
    session="optc.runtime.sessions.onnx_artifact:open_artifact",
    runner="optc.runtime.sessions.onnx_artifact:open_cuda_runner",
    caller="optc.runtime.sessions.onnx_artifact:open_caller",
    package="onnxruntime",
    device="cuda",
    check="optc.runtime.sessions.onnx_artifact:check_files",
    facts=OnnxFacts,
    files=("model",),
    has_threads=False,
)
"""ONNX Runtime's CUDA provider, which the distribution onnxruntime-gpu has."""
AOTINDUCTOR = Engine(
    name="aotinductor",
    session="optc.runtime.sessions.package:open_artifact",
    runner="optc.runtime.sessions.package:open_runner",
    caller="optc.runtime.sessions.package:open_caller",
    package="torch",
    check="optc.runtime.sessions.package:check_files",
    bundle="optc.exporters.bundle.engines:AOTINDUCTOR",
    facts=PackageFacts,
    needs=PackageNeeds,
    files=("model", "weights", "library", "runner"),
    native=("model", "library"),
)
CUDA = Engine(
    name="cuda",
    session="optc.runtime.sessions.cuda:open_artifact",
    device="cuda",
    facts=ProgramFacts,
    files=("graph", "weights", "constants"),
    has_threads=False,
)
"""A saved program, run by torch with own kernels; its decode steps are captured in CUDA graphs."""
TENSORRT = Engine(
    name="tensorrt",
    session="optc.runtime.sessions.trt:open_artifact",
    runner="optc.runtime.sessions.onnx_artifact:open_runner",
    package="onnxruntime",
    opens_instead="the plan's ONNX graph in ONNX Runtime on the CPU, not the plan",
    device="cuda",
    facts=PlanFacts,
    files=("model", "data", "engine", "plan"),
    native=("plan",),
    has_threads=False,
)
EXECUTORCH = Engine(
    name="executorch",
    session="optc.runtime.sessions.executorch:open_artifact",
    device="cpu",
    facts=ExecutorchFacts,
    files=("model",),
    native=("model",),
)
HUGGINGFACE = Engine(
    name="huggingface",
    session="optc.runtime.sessions.model_folder:open_artifact",
    runner="optc.runtime.sessions.model_folder:open_runner",
    package="transformers",
    device="cpu",
    facts=FolderFacts,
    eager=True,
    follows_program=True,
)
"""A model folder: transformers, vLLM or SGLang run it, on whatever device they find."""


@lru_cache(maxsize=1)
def engines() -> Mapping[str, Engine]:
    """Every engine by name, those of other packages among them."""
    found = {engine.name: engine for engine in (ONNX, ONNX_CUDA, AOTINDUCTOR, CUDA, TENSORRT, EXECUTORCH, HUGGINGFACE)}
    for engine in plugins(ENTRY_POINTS, "an Engine", lambda item: item if isinstance(item, Engine) else None):
        found.setdefault(engine.name, engine)
    return found


def find_engine(name: str, where: str) -> Engine:
    """The engine of a manifest.

    Raises:
        ArtifactError: there is none of this name.
    """
    engine = engines().get(name)
    if engine is None:
        raise ArtifactError(
            "the artifact is for an engine that this version of optc does not know",
            where=where,
            why=f"its engine is {name[:80]!r}; known are {', '.join(sorted(engines()))}",
            remedy="install the package that adds the engine, or use the optc that wrote the artifact",
        )
    return engine


def check_facts(
    engine: Engine, info: Mapping[str, Any], needs: Mapping[str, Any], listed: Collection[str], where: str
) -> None:
    """Refuse an artifact whose facts are not of their types, or whose engine would open what its manifest does not list.

    Args:
        info: `engine_info`. needs: of the manifest. listed: paths of its files.

    Raises:
        ArtifactError: names the key, or the file.
    """
    read_facts(engine.facts, info, f"{where}: engine_info")
    read_facts(engine.needs, needs, f"{where}: needs")
    for key, path in engine.opened_files(info).items():
        if path not in listed:
            raise ArtifactError(
                "the engine would open a file that the manifest does not list",
                where=where,
                why=f"'{key}' is {path[:80]!r}",
                remedy="compile the model again",
            )


def _resolve(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
