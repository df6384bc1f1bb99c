#!/usr/bin/env python3
"""Build model.plan of this folder with the TensorRT that is installed here.

    python build_plan.py [FOLDER] [--output PATH] [--runtime auto|tensorrt|rtx] [--arch sm80,sm89] [--all-tactics] [--json]

Needs Python 3.8 or newer and one of the packages tensorrt (8.6, 10, 11) and tensorrt_rtx; nothing else. Reads
engine.json and model.onnx, compares the parsed network with what engine.json says it must hold, builds, and writes the
plan's name, size and sha256 into engine.json. optc runs this file in a process of its own when it compiles.

Exit codes: 0 built, 2 usage, 3 no such folder, 4 this machine cannot build it, 7 the network is not the program's,
8 out of memory or disk, 1 anything else. With --json the result, or the error, is one JSON object on stdout.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # its own folder comes first: a file of an artifact would be taken for a module of Python's
    _HERE = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [item for item in sys.path if os.path.realpath(item) != _HERE]

import argparse
import collections
import contextlib
import ctypes
import errno
import glob
import hashlib
import importlib
import json
import mmap
import time
from typing import Any, Iterator  # noqa: UP035  (Python 3.8)

FORMAT = 1
PACKAGES = {"tensorrt": ("tensorrt",), "rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
NAMES = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
FIRST_VERSIONS = {"fused": (10, 15), "basic": (8, 6)}
"""The first version of standard TensorRT that parses each op set."""


class BuildError(Exception):
    """What is wrong, why, and what to do; `code` is the exit code."""

    def __init__(self, what: str, why: object = "", remedy: str = "", code: int = 4) -> None:
        super().__init__(what)
        self.what, self.why, self.remedy, self.code = what, str(why), remedy, code

    def to_dict(self) -> dict[str, Any]:
        return {"error": self.what, "why": self.why, "remedy": self.remedy, "code": self.code}


# -- the package ------------------------------------------------------------------------------


def load(runtime: str) -> tuple[Any, str]:
    """(the module, "tensorrt" or "rtx") of the first package of a runtime that is installed here."""
    kinds = ("tensorrt", "rtx") if runtime == "auto" else (runtime,)
    for kind in kinds:
        for name in PACKAGES[kind]:
            try:
                return importlib.import_module(name), kind
            except ImportError:
                continue
    wanted = " nor ".join(NAMES[kind] for kind in kinds)
    raise BuildError(
        "TensorRT is not installed: no package " + wanted,
        remedy='on a device with an NVIDIA GPU install tensorrt; for TensorRT for RTX: pip install "optc[trt]"',
    )


def version_of(trt: Any) -> tuple[int, int]:
    """(major, minor) of a TensorRT module."""
    parts = trt.__version__.split(".")
    return int(parts[0]), int(parts[1])


def check_version(trt: Any, kind: str, ops: str) -> None:
    """TensorRT for RTX parses both op sets, the standard one from some version on."""
    need = FIRST_VERSIONS[ops]
    if kind == "tensorrt" and version_of(trt) < need:
        raise BuildError(
            f"TensorRT {trt.__version__} does not parse the op set '{ops}', which needs {need[0]}.{need[1]}",
            remedy="compile with --trt-ops basic" if ops == "fused" else "install a newer TensorRT",
        )


def make_logger(trt: Any) -> Any:
    """A logger that keeps what went wrong."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

        def why(self) -> str:
            quiet = [text for text in self.errors if "cudaError 35" not in text]  # no driver: not needed by RTX
            return " | ".join(text.strip() for text in (quiet or self.errors)[-4:])[-2000:]

    return Log()


# -- the network ------------------------------------------------------------------------------


def parse(trt: Any, builder: Any, log: Any, model: str) -> tuple[Any, Any]:
    """The network of an ONNX file, and the parser, which must live as long."""
    flags = 0
    known = trt.NetworkDefinitionCreationFlag
    if version_of(trt)[0] < 10 and hasattr(known, "EXPLICIT_BATCH"):
        flags = 1 << int(known.EXPLICIT_BATCH)
    elif hasattr(known, "STRONGLY_TYPED"):
        flags = 1 << int(known.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(model):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        why = "; ".join(f"{item.desc().strip()} (node {item.node()})" for item in errors[:4])
        raise BuildError("TensorRT's parser refuses the model", why or log.why(), code=4)
    return network, parser


def layers(network: Any) -> Iterator[tuple[str, Any]]:
    """(name of the type, layer) of every layer."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        yield str(layer.type).rsplit(".", 1)[-1], layer


def attentions(trt: Any, network: Any) -> Iterator[Any]:
    """Every IAttention of a network; none where TensorRT has no such layer."""
    if not hasattr(trt, "IAttentionInputLayer"):
        return
    for kind, layer in layers(network):
        if kind == "ATTENTION_INPUT":
            layer.__class__ = trt.IAttentionInputLayer
            yield layer.attention


def dtype_name(dtype: object) -> str:
    """HALF, FLOAT, INT32 ... of a TensorRT data type."""
    return str(dtype).rsplit(".", 1)[-1].upper()


def summarize(network: Any) -> dict[str, Any]:
    """What a network holds, in the terms of engine.json's "network"."""
    kinds: collections.Counter[str] = collections.Counter()
    codes: collections.Counter[str] = collections.Counter()
    for kind, layer in layers(network):
        kinds[kind] += 1
        if kind == "DEQUANTIZE":
            codes[dtype_name(layer.get_input(0).dtype)] += 1
    return {
        "attention": kinds["ATTENTION_INPUT"],
        "kv_updates": kinds["KV_CACHE_UPDATE"],
        "rotary": kinds["ROTARY_EMBEDDING"],
        "softmax": kinds["SOFTMAX"],
        "scatter": kinds["SCATTER"],
        "quantize": kinds["QUANTIZE"],
        "dequantize": dict(codes),
    }


def check_network(trt: Any, network: Any, facts: dict[str, Any]) -> dict[str, Any]:
    """Compare a parsed network with the program; raises BuildError (7) with every difference."""
    found = summarize(network)
    counted = version_of(trt)[0] < 10  # chooses types itself: the number of layers is what it can be held to
    wrong = [
        f"{name}: {found[name]}, the program has {wanted}"
        for name, wanted in sorted(facts["network"].items())
        if found[name] != wanted
        and not (counted and name == "dequantize" and sum(found[name].values()) == sum(wanted.values()))
    ]
    for number, attention in enumerate(attentions(trt, network)):
        where = f"attention {number} ({attention.name})"
        if hasattr(attention, "causal_kind"):
            if dtype_name(attention.causal_kind) != "NONE":
                wrong.append(f"{where}: causal kind {dtype_name(attention.causal_kind)}, not NONE")
        elif attention.causal:
            wrong.append(f"{where}: causal by itself, not by its mask")
        if attention.mask is None:
            wrong.append(f"{where}: no mask attached")
        elif dtype_name(attention.mask.dtype) != "BOOL":
            wrong.append(f"{where}: a mask of {dtype_name(attention.mask.dtype)}, not of bools")
        if getattr(attention, "key_value_lengths", None) is not None:
            wrong.append(f"{where}: lengths beside the mask")
    for count, get, table in (
        (network.num_inputs, network.get_input, facts["inputs"]),
        (network.num_outputs, network.get_output, facts["outputs"]),
    ):
        names = [get(index).name for index in range(count)]
        if names != list(table):
            wrong.append(f"tensors {names}, not {list(table)}")
    if wrong:
        raise BuildError(
            "the parsed network is not the program that was compiled",
            "; ".join(wrong[:8]),
            "report a bug with the folder",
            code=7,
        )
    return found


# -- configuration ----------------------------------------------------------------------------


def set_architectures(trt: Any, config: Any, kind: str, architectures: list[str] | None) -> None:
    """Compute capabilities of a plan of TensorRT for RTX; none of them leaves it portable."""
    if not architectures:
        return
    if kind != "rtx":
        raise BuildError("standard TensorRT builds for the GPU that is present", remedy="leave the architectures out")
    known = trt.ComputeCapability.__members__
    for name in architectures:
        if name.upper() not in known:
            taken = ", ".join(sorted(item.lower() for item in known if item.startswith("SM")))
            raise BuildError(f"TensorRT for RTX does not support the architecture {name}", remedy="it takes " + taken)
    config.num_compute_capabilities = len(architectures)
    for index, name in enumerate(architectures):
        config.set_compute_capability(known[name.upper()], index)


def add_profiles(builder: Any, network: Any, config: Any, facts: dict[str, Any]) -> None:
    """One optimization profile for each of engine.json's, over every input."""
    for row in facts["profiles"]:
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            name = network.get_input(index).name
            dims = facts["inputs"][name]["dims"]
            shapes = [tuple(item if isinstance(item, int) else row[item][end] for item in dims) for end in range(3)]
            profile.set_shape(name, *shapes)
        if config.add_optimization_profile(profile) < 0:
            raise BuildError("TensorRT does not take the profile '{}'".format(row["name"]), json.dumps(row))


def set_precision(trt: Any, network: Any, config: Any, facts: dict[str, Any], all_tactics: bool) -> None:
    """Types of TensorRT before 10, which chooses them itself within what is allowed."""
    flag = trt.BuilderFlag
    if hasattr(flag, "TF32"):
        config.clear_flag(flag.TF32)  # float32 is to be float32
    if version_of(trt)[0] >= 10 or not hasattr(flag, "FP16"):
        return
    if facts["dtype"] == "fp16":
        config.set_flag(flag.FP16)
        config.set_flag(flag.PREFER_PRECISION_CONSTRAINTS)
        for kind, layer in layers(network):
            fixed = kind in ("REDUCE", "UNARY", "ELEMENTWISE", "SOFTMAX")
            if fixed and layer.get_output(0).dtype == trt.float32:
                layer.precision = trt.float32
                layer.set_output_type(0, trt.float32)
    if facts["network"]["quantize"]:
        config.set_flag(flag.INT8)
    if not all_tactics:  # cuBLAS and cuDNN need not be there
        own = (trt.TacticSource.EDGE_MASK_CONVOLUTIONS, trt.TacticSource.JIT_CONVOLUTIONS)
        config.set_tactic_sources(sum(1 << int(item) for item in own))


# -- building ---------------------------------------------------------------------------------


def write_plan(trt: Any, builder: Any, network: Any, config: Any, path: str) -> tuple[int, str] | None:
    """Build into a file, streamed where the API can; (bytes, sha256), or None where the build failed."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        if hasattr(builder, "build_serialized_network_to_stream"):

            class Writer(trt.IStreamWriter):
                def __init__(self) -> None:
                    trt.IStreamWriter.__init__(self)
                    self.size = 0
                    self.error: OSError | None = None

                def write(self, data: Any) -> int:
                    data = bytes(data)
                    try:
                        file.write(data)
                    except OSError as error:  # an exception must not cross into the builder
                        self.error = error
                        return 0
                    digest.update(data)
                    self.size += len(data)
                    return len(data)

            writer = Writer()
            done = builder.build_serialized_network_to_stream(network, config, writer)
            if writer.error is not None:
                raise writer.error
            return (writer.size, digest.hexdigest()) if done and writer.size else None
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            return None
        view = memoryview(plan)
        file.write(view)
        digest.update(view)
        size = view.nbytes
    return size, digest.hexdigest()


def check_names(path: str, facts: dict[str, Any]) -> None:
    """Every input and output must be named in a plan; without a driver it cannot be opened to ask it."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        names = [*facts["inputs"], *facts["outputs"]]
        missing = [name for name in names if plan.find(name.encode()) < 0]
    if missing:
        raise BuildError("the plan does not name its tensors", ", ".join(missing[:8]), code=7)


@contextlib.contextmanager
def new_files(*names: str) -> Iterator[list[str]]:
    """Temporary paths that get their names, one right after the other, when the block ends well; else nothing is left.

    What killed runs left is removed first. A kill between two of the names leaves a folder that `optc verify` refuses,
    until this has run again.
    """
    for name in names:
        remove_left(name)
    temporary = [f"{name}.tmp-{os.getpid()}" for name in names]
    try:
        yield temporary
        made = [index for index, path in enumerate(temporary) if os.path.exists(path)]
        for index in made:
            with open(temporary[index], "rb+") as file:
                os.fsync(file.fileno())
        for index in made:
            os.replace(temporary[index], names[index])
    finally:
        for path in temporary:
            if os.path.exists(path):
                os.remove(path)


def remove_left(name: str) -> None:
    """Remove what builds that were killed left under temporary names."""
    for path in glob.glob(f"{glob.escape(name)}.tmp-*"):
        pid = path.rpartition("-")[2]
        if pid.isdigit() and not is_running(int(pid)):
            with contextlib.suppress(OSError):  # Windows keeps what a running process has open
                os.remove(path)


def is_running(pid: int) -> bool:
    """Whether there is such a process; on Windows, where asking would end it, never."""
    if os.name == "nt":
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def make_builder(trt: Any, log: Any) -> Any:
    """TensorRT's builder."""
    try:
        return trt.Builder(log)
    except TypeError as error:  # what pybind makes of a null pointer
        raise BuildError(
            "TensorRT cannot start here", log.why() or error, "it needs an NVIDIA GPU and its driver"
        ) from error


def write_some_plan(
    trt: Any, builder: Any, network: Any, config: Any, path: str, log: Any, held: dict[str, Any]
) -> tuple[tuple[int, str], str]:
    """Build into a file, with dedicated kernels for attention where there are any; ((bytes, sha256), which kernels)."""
    for attempt in ["dedicated kernels", "decomposed"] if held["attention"] else [""]:
        log.errors.clear()
        for attention in attentions(trt, network) if attempt else ():
            attention.decomposable = attempt == "decomposed"
        done = write_plan(trt, builder, network, config, path)
        if done:
            return done, attempt
        if "decomposable" not in log.why():
            break
    raise BuildError("TensorRT could not build the plan", log.why(), code=4)


def build(
    folder: str,
    output: str | None = None,
    runtime: str = "auto",
    architectures: list[str] | None = None,
    all_tactics: bool = False,
    opt_level: int | None = None,
) -> dict[str, Any]:
    """Build the plan of a folder; the fields of engine.json that it fills. The folder's own plan is noted in its files.

    Args:
        opt_level: 0 builds fastest, 5 searches longest; None is TensorRT's default.

    Raises:
        BuildError: see its exit codes in the module's text.
    """
    facts = read_facts(folder)
    trt, kind = load(runtime)
    check_version(trt, kind, facts["ops"])
    begin, log = time.time(), make_logger(trt)
    builder = make_builder(trt, log)
    network, parser = parse(trt, builder, log, os.path.join(folder, "model.onnx"))
    held = check_network(trt, network, facts)
    config = builder.create_builder_config()
    set_architectures(trt, config, kind, architectures)
    set_precision(trt, network, config, facts, all_tactics)
    if opt_level is not None:
        config.builder_optimization_level = opt_level
    add_profiles(builder, network, config, facts)
    own = () if output else tuple(os.path.join(folder, name) for name in ("engine.json", "manifest.json"))
    name = output or os.path.join(folder, "model.plan")
    with new_files(name, *own) as parts:
        written, attempt = write_some_plan(trt, builder, network, config, parts[0], log, held)
        if kind == "rtx":  # a plan of the others can be opened here, and run_trt.py asks it
            check_names(parts[0], facts)
        del parser
        built = {
            "runtime": NAMES[kind],
            "runtime_version": trt.__version__,
            "plan": os.path.basename(name),
            "plan_bytes": written[0],
            "plan_sha256": written[1],
            "compute_capabilities": (architectures or "portable") if kind == "rtx" else gpu_architectures(),
            "attention_kernels": attempt or None,
            "network_found": held,
            "build_seconds": round(time.time() - begin, 3),
            "build_peak_bytes": peak_bytes(),
        }
        if own:
            record(folder, facts, built, parts)
    return built


def gpu_architectures() -> list[str] | None:
    """The compute capability of the first GPU, as in engine.json; None where the driver does not say."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return None
    device, numbers = ctypes.c_int(0), []
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for attribute in (75, 76):  # major and minor
        number = ctypes.c_int(0)
        if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
            return None
        numbers.append(number.value)
    return [f"sm{numbers[0]}{numbers[1]}"]


def peak_bytes() -> int | None:
    """The most memory that this program has held, or None where the system does not say.

    Not ru_maxrss: that counts what the parent held when it started this process.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None


def read_facts(folder: str) -> dict[str, Any]:
    """engine.json of a folder."""
    path = os.path.join(folder, "engine.json")
    try:
        with open(path, encoding="utf-8") as file:
            facts = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise BuildError(
            "the folder has no readable engine.json", error, "give the folder that optc wrote", 3
        ) from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise BuildError("engine.json has a different format", path, "use the build_plan.py beside it", 3)
    return facts


def record(folder: str, facts: dict[str, Any], built: dict[str, Any], parts: list[str]) -> None:
    """Write what was built into engine.json, and into manifest.json where optc has written one.

    Args:
        parts: temporary paths of the plan, which is there, engine.json and manifest.json.
    """
    timing = ("build_seconds", "build_peak_bytes")  # not facts of the plan
    text = json.dumps({**facts, **{key: value for key, value in built.items() if key not in timing}}, indent=2)
    write_text(parts[1], text + "\n")
    if os.path.exists(os.path.join(folder, "manifest.json")):
        write_text(parts[2], resealed(folder, built, parts))


def resealed(folder: str, built: dict[str, Any], parts: list[str]) -> str:
    """The manifest that names the files as they will be: its last field is the sha256 of its text with that one empty."""
    with open(os.path.join(folder, "manifest.json"), encoding="utf-8") as file:
        manifest = json.load(file)
    entries = {entry["path"]: entry for entry in manifest["files"]}
    for name, part in ((built["plan"], parts[0]), ("engine.json", parts[1])):
        entries[name] = {"path": name, **file_facts(part)}
    manifest["files"] = [entries[name] for name in sorted(entries)]
    manifest["programs"]["model"]["engine_info"].update(built)
    needs = {key: value for key, value in manifest["needs"].items() if key not in NAMES.values()}
    needs[built["runtime"]] = f"=={built['runtime_version']}"
    if built["compute_capabilities"] is not None:
        given = built["compute_capabilities"]
        needs["compute_capabilities"] = [given] if isinstance(given, str) else given
    manifest["needs"] = needs
    manifest["native_code"], manifest["made_here"] = [built["plan"]], ""  # the mark was of the artifact without a plan
    del manifest["self_sha256"]
    empty = json.dumps({**manifest, "self_sha256": ""}, indent=2, ensure_ascii=False) + "\n"
    seal = hashlib.sha256(empty.encode()).hexdigest()
    return json.dumps({**manifest, "self_sha256": seal}, indent=2, ensure_ascii=False) + "\n"


def file_facts(path: str) -> dict[str, Any]:
    """Size and sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return {"size": os.path.getsize(path), "sha256": digest.hexdigest()}


def write_text(path: str, text: str) -> None:
    """Write a file of text."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default=os.path.dirname(os.path.abspath(__file__)))
    parser.add_argument("--output", help="the plan's file, which engine.json then does not name; default: model.plan")
    parser.add_argument("--runtime", choices=("auto", *PACKAGES), default="auto")
    parser.add_argument("--arch", help="sm80,sm89,...: compute capabilities (TensorRT for RTX); default: portable")
    parser.add_argument("--all-tactics", action="store_true", help="TensorRT 8: cuBLAS's and cuDNN's kernels too")
    parser.add_argument("--opt-level", type=int, choices=range(6), help="0 builds fastest, 5 searches longest")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    architectures = None if given.arch in (None, "portable") else given.arch.split(",")
    try:
        built = build(given.folder, given.output, given.runtime, architectures, given.all_tactics, given.opt_level)
    except BuildError as error:
        return fail(error, given.json)
    except MemoryError as error:
        return fail(BuildError("out of memory while building the plan", error, code=8), given.json)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return fail(BuildError("the plan cannot be written", error, code=8 if full else 3), given.json)
    if given.json:
        print(json.dumps(built))
    else:
        size = built["plan_bytes"] / 1e6
        print(
            "{}: {:.1f} MB, {:.1f} s, sha256 {}".format(
                built["plan"], size, built["build_seconds"], built["plan_sha256"]
            )
        )
    return 0


def fail(error: BuildError, as_json: bool) -> int:
    """Say what went wrong; the exit code."""
    if as_json:
        print(json.dumps(error.to_dict()))
    text = error.what + "".join(f"\n  {k}: {v}" for k, v in (("why", error.why), ("remedy", error.remedy)) if v)
    print("error: " + text, file=sys.stderr)
    return error.code


if __name__ == "__main__":
    sys.exit(main())
