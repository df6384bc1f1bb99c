"""Writers of artifacts, and of what is put into artifacts that are there already, for the campaign against the disk."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz.seeds import Seeds
from fuzz.writer import Kind, Writer, artifact_state, old_artifact, once, optc_code, run_optc

# -- exporters ---------------------------------------------------------------------------------------


def artifact_writer(seeds: Seeds, work: Path, model: Path, *target: str) -> Writer:
    """The last part of a compile: export, check, manifest, publishing."""
    import optc.api as api

    got = list[Any]()
    real = api.write_artifact
    api.write_artifact = lambda *given: (got.append(given), real(*given))[1]  # type: ignore[assignment]
    try:
        run_optc("compile", model, "--target", *target, "-o", work / "first" / "output", "--force")
    finally:
        api.write_artifact = real
    return Writer(lambda place: real(place, *got[0][1:]) and None, artifact_state, old_artifact(seeds))


def exporter(
    *target: str,
    computed: tuple[tuple[str, str], ...] = (),
    packages: tuple[str, ...] = (),
    model: Callable[[Seeds], Path] = Seeds.model,
) -> Kind:
    """The writer of a target's artifacts.

    Args:
        computed: functions that do not touch the disk, by module and name.
    """

    def make(seeds: Seeds, work: Path) -> Writer:
        for module, name in computed:
            once(module, name)
        return artifact_writer(seeds, work, model(seeds), *target)

    return Kind(make, packages)


def shard_writer(seeds: Seeds, work: Path) -> Writer:
    """A model folder of several files of weights with their index; weights wait in a work file as large ones do."""
    from optc.compiler.ir import stored_weights
    from optc.exporters.hf import export

    stored_weights._SPILLED_BYTES = 1 << 12
    export.write_shards = functools.partial(export.write_shards, limit=24_000)  # type: ignore[assignment]
    writer = artifact_writer(seeds, work, seeds.model(), "vllm")
    assert len(list((work / "first" / "output").glob("model-*.safetensors"))) > 1
    return writer


def quantize_writer(seeds: Seeds, work: Path) -> Writer:
    """`optc quantize --work-dir`: stages, rounded groups and the artifact; again goes on from what is there."""
    once("optc.api", "capture_resolved")  # half of the time
    calibration = ("--calibration", seeds.text(), "--calibration-samples", 2, "--calibration-seq-len", 32)
    words = ("quantize", seeds.model(), "--quant", "gptq", "--group-size", 32, *calibration, "--force")

    def write(place: Path) -> None:
        optc_code(*words, "-o", place, "--work-dir", place.parent / "work")

    run_optc(*words, "-o", work / "first" / "output", "--work-dir", work / "first" / "work")  # imports
    return Writer(write, artifact_state, old_artifact(seeds), kept=("work",))


# -- artifacts that are there already ----------------------------------------------------------------


def bundle_writer(seeds: Seeds, work: Path) -> Writer:
    """`optc bundle`."""
    artifact = seeds.compiled("target-onnx-cpu", "--target", "onnx-cpu")
    run_optc("bundle", artifact, "-o", work / "first", "--force")
    return Writer(
        lambda place: optc_code("bundle", artifact, "-o", place, "--force"), artifact_state, old_artifact(seeds)
    )


def sign_writer(seeds: Seeds, work: Path) -> Writer:
    """`optc sign`: the signature is in the artifact, which stays whole; it replaces that of another key."""
    from optc.compiler.artifact.folder import sign_artifact
    from optc.compiler.artifact.trust import SIGNATURE, new_keys

    old, key, other = work / "signed", work / "maker.pem", work / "other.pem"
    shutil.copytree(old_artifact(seeds), old)
    for path in (key, other):
        new_keys(path)
    sign_artifact(old, other)

    def state(folder: Path) -> str:
        return artifact_state(folder) + (folder / SIGNATURE).read_text()

    return Writer(lambda place: optc_code("sign", place, "--key", key), state, old)


def figures_writer(seeds: Seeds, work: Path) -> Writer:
    """`optc bench --save`: manifest and report are written again, everything else is shared with the old artifact."""
    from optc.cli.session_options import save_figures
    from optc.compiler.artifact.folder import verify

    del work

    def state(folder: Path) -> str:
        return json.dumps(verify(folder).speed)

    return Writer(lambda place: save_figures(place, speed={"tokens_per_s": 1.0}), state, old_artifact(seeds))


def plan_writer(seeds: Seeds, work: Path) -> Writer:
    """build_plan.py in an artifact of the target trt, on the device: the plan, what it says of it, and the manifest."""
    from types import SimpleNamespace

    from optc.exporters.trt import build_plan

    del work
    old = seeds.compiled("target-trt-none", "--target", "trt", "--trt-runtime", "none")
    builder = SimpleNamespace(
        build_serialized_network=lambda network, config: b"plan" * 5000, create_builder_config=SimpleNamespace
    )

    def some_plan(trt: Any, builder: Any, network: Any, config: Any, path: str, *more: Any) -> Any:
        return build_plan.write_plan(trt, builder, network, config, path), ""

    stand_ins: dict[str, Any] = {
        "gpu_architectures": lambda: ["sm90"],  # it asks the driver, which a fork must not where its parent has
        "load": lambda runtime: (SimpleNamespace(__version__="10.0.0"), "tensorrt"),
        "make_builder": lambda trt, log: builder,
        "parse": lambda *given: (None, None),
        "write_some_plan": some_plan,
    }
    for name in ("check_version", "make_logger", "check_network", "set_architectures", "set_precision", "add_profiles"):
        stand_ins[name] = lambda *given: None
    for name, stand_in in stand_ins.items():
        setattr(build_plan, name, stand_in)

    def write(place: Path) -> None:
        raise SystemExit(build_plan.main([str(place), "--json"]))

    return Writer(write, artifact_state, old, mended=True)
