"""optc bundle: the C++ programs are compiled here and decode the tokens that optc run gives."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import pytest
from artifacts import make_artifact, make_manifest
from once import example_artifact, short_artifact

import optc
from optc.cli.main import main
from optc.compiler.artifact.engines import Engine
from optc.compiler.artifact.folder import read_manifest, verify
from optc.compiler.diagnostics import ArtifactError, InputError, TargetError
from optc.compiler.ir.contract import AttentionFacts, Contract, KVCache
from optc.compiler.kernels.cpu.toolchain import find_compiler
from optc.exporters.bundle import write_bundle
from optc.exporters.bundle.header import genai_header, quoted

PROMPT = [0, 493, 718, 435, 875, 360, 263, 1597, 14, 283]
NEW = 64
needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake, which is not installed")


@dataclass(frozen=True)
class Built:
    """A bundle and its program, compiled with warnings as errors."""

    artifact: Path
    bundle: Path
    program: Path

    def run(self, *flags: str, model: Path | None = None, env: dict[str, str] | None = None, stdin: str = "") -> Any:
        command = [str(self.program), "--model", str(model or self.bundle), *flags]
        return subprocess.run(command, capture_output=True, text=True, env=env or {}, input=stdin, check=False)

    def tokens(self, prompt: Sequence[int], **options: Any) -> list[int]:
        found = self.run("--prompt-tokens", ",".join(map(str, prompt)), "--threads", "1", **options)
        assert found.returncode == 0, found.stderr
        return [int(item) for item in found.stdout.split(",")]


def build(artifact: Path, place: Path, *flags: str, configured: bool = True) -> Built:
    """Write the bundle of an artifact and compile its program as the command says, outside of the bundle."""
    found = write_bundle(artifact, place / "bundle")
    variables = [f"-D{name}={value}" for name, value in found.variables.items() if configured]
    configure = [
        "cmake",
        "-S",
        place / "bundle",
        "-B",
        place / "build",
        *variables,
        "-DCMAKE_CXX_FLAGS=-Werror",
        *flags,
    ]
    for command in (configure, ["cmake", "--build", place / "build"]):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return Built(artifact, place / "bundle", place / "build" / "decode")


# -- onnx-cpu ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def onnx() -> Path:
    """The example model for onnx-cpu."""
    pytest.importorskip("onnxruntime_genai")
    return example_artifact("onnx-cpu")


@pytest.fixture(scope="module")
def genai(onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(onnx, tmp_path_factory.mktemp("genai"), configured=False)


@pytest.fixture(scope="module")
def whole(onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same bundle with the libraries in it."""
    return write_bundle(onnx, tmp_path_factory.mktemp("whole") / "bundle", with_libraries=True).folder


def expected(artifact: Path, prompt: Sequence[int], new: int = NEW) -> list[int]:
    model = optc.load(artifact, threads=1)
    tokens = model.generate(list(prompt), max_new_tokens=new).tokens
    model.close()
    return [int(token) for token in tokens]


@needs_cmake
@pytest.mark.slow
def test_genai_program_gives_the_tokens_of_optc_run(genai: Built, whole: Path, onnx: Path) -> None:
    """With the libraries in the bundle, and without any environment."""
    wanted = expected(onnx, PROMPT)
    assert len(wanted) == NEW
    assert genai.tokens(PROMPT, model=whole) == wanted


@needs_cmake
def test_genai_libraries_are_found_by_the_loader(genai: Built, whole: Path, onnx: Path) -> None:
    wanted = expected(onnx, PROMPT[:3], 4)
    environment = {"LD_LIBRARY_PATH": str(whole / "lib")}
    found = genai.run("--prompt-file", "-", "--max-new-tokens", "4", env=environment, stdin="0 493\n718\n")
    assert found.stdout == ",".join(map(str, wanted)) + "\n"


@needs_cmake
def test_missing_libraries_are_named(genai: Built) -> None:
    found = genai.run("--prompt-tokens", "5")
    assert found.returncode == 4
    assert "cannot load libonnxruntime.so.1" in found.stderr
    assert str(genai.bundle / "lib" / "libonnxruntime.so.1") in found.stderr


@needs_cmake
@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ((), 2, "give --prompt-tokens or --prompt-file, once"),
        (("--prompt-tokens", "5", "--prompt-file", "-"), 2, "once"),
        (("--prompt-tokens",), 2, "--prompt-tokens needs a value"),
        (("--prompt-tokens", "5", "--beam", "2"), 2, "unknown option '--beam'"),
        (("--prompt-tokens", "5", "--max-new-tokens", "0"), 2, "--max-new-tokens must be 1 or more"),
        (("--prompt-tokens", "5", "--max-new-tokens", "many"), 2, "--max-new-tokens 'many' is not an integer"),
        (("--prompt-tokens", ""), 3, "the prompt is empty"),
        (("--prompt-tokens", "5,six"), 3, "token id 'six' is not an integer"),
        (("--prompt-tokens", "5,8192"), 3, "token id 8192 is outside the vocabulary, 0 to 8191"),
        (("--prompt-tokens", "-1"), 3, "token id -1 is outside the vocabulary"),
        (("--prompt-tokens", "99999999999999999999"), 3, "is not an integer"),
        (("--prompt-file", "/nowhere/ids"), 3, "cannot read /nowhere/ids"),
        (("--prompt-tokens", ",".join(["5"] * 2049)), 3, "a prompt of 2049 tokens does not fit the context of 2048"),
    ],
)
def test_bad_input_of_the_program(genai: Built, flags: tuple[str, ...], code: int, message: str) -> None:
    found = genai.run(*flags)
    assert found.returncode == code
    assert message in found.stderr
    assert found.stdout == ""


@needs_cmake
def test_the_program_says_where_it_looked_for_the_model(genai: Built, tmp_path: Path) -> None:
    found = genai.run("--prompt-tokens", "5", model=tmp_path)
    assert (found.returncode, found.stdout) == (3, "")
    assert f"there is no model.onnx in '{tmp_path}': name the bundle with --model" in found.stderr


@needs_cmake
def test_a_damaged_model_is_an_error_of_the_program(genai: Built, whole: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(whole, tmp_path / "broken"))
    (broken / "genai_config.json").write_text("{")
    found = genai.run("--prompt-tokens", "5", model=broken)
    assert (found.returncode, found.stdout) == (7, "")
    (broken / "model.onnx").write_bytes(b"no graph")
    shutil.copyfile(whole / "genai_config.json", broken / "genai_config.json")
    found = genai.run("--prompt-tokens", "5", model=broken)
    assert (found.returncode, found.stdout) == (4, "")
    assert "loading the model" in found.stderr


def test_a_bundle_is_an_artifact_with_its_checksums(whole: Path, onnx: Path) -> None:
    manifest, source = verify(whole), read_manifest(onnx)
    paths = {entry.path for entry in manifest.files}
    assert {
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
        "genai_config.json",
        "CMakeLists.txt",
        "README.txt",
        "SHA256SUMS",
        "program/main.cpp",
        "program/host.cpp",
        "program/decode.h",
        "program/genai.cpp",
        "program/model.h",
        "lib/libonnxruntime.so.1",
        "lib/libonnxruntime-genai.so",
    } <= paths
    assert not [path for path in paths if path.startswith("ir/") or path == "report.html"]
    facts = manifest.engine_info["bundle"]
    assert facts["engine"] == "genai"
    assert facts["libraries"] == ["lib/libonnxruntime.so.1", "lib/libonnxruntime-genai.so"]
    assert manifest.contract == source.contract
    rows = dict(line.split("  ", 1)[::-1] for line in (whole / "SHA256SUMS").read_text().splitlines())
    assert set(rows) == paths - {"SHA256SUMS"}
    for path, digest in rows.items():
        assert hashlib.sha256((whole / path).read_bytes()).hexdigest() == digest
    assert expected(whole, PROMPT, 4) == expected(onnx, PROMPT, 4)


def test_the_command_says_how_to_build(onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bundle", str(onnx), "-o", str(tmp_path / "bundle"), "--json"])
    assert caught.value.code == 0
    result = json.loads(capsys.readouterr().out)
    assert result["libraries"] == []
    assert set(result["variables"]) == {"ONNXRUNTIME_LIBRARY", "GENAI_LIBRARY"}
    assert all(Path(value).is_file() for value in result["variables"].values())
    assert result["build"][0].startswith(f"cmake -S {tmp_path / 'bundle'} -B build -DONNXRUNTIME_LIBRARY=")
    readme = (tmp_path / "bundle" / "README.txt").read_text()
    assert "LlamaForCausalLM, compiled by optc for onnx-cpu" in readme
    assert "$" not in readme


# -- the command line of the programs, over an engine that counts --------------------------------

_COUNTING = """
#include "decode.h"
struct Counting final : optc::Decoder {
  explicit Counting(std::int64_t most) : left(most) {}
  std::int64_t advance(const optc::Tokens& tokens) override {
    left -= static_cast<std::int64_t>(tokens.size());
    if (left < 0) throw optc::Failure(optc::kOther, "too many tokens");
    return tokens.back() + 1;
  }
  std::int64_t left;
};
std::unique_ptr<optc::Decoder> optc::open_decoder(const Setup& setup) {
  return std::make_unique<Counting>(setup.capacity);
}
"""


SOURCES = Path(str(resources.files("optc.exporters.bundle"))) / "program"


def _compile(place: Path, *arguments: object) -> None:
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{place}", f"-I{SOURCES}"]
    subprocess.run([find_compiler(), *flags, *map(str, arguments)], check=True)


def _header(place: Path, **needs: Any) -> None:
    manifest = make_manifest(**_decoder(needs=needs))
    facts = {"vocab_size": 100, "context_length": 20, "eos_token_ids": (12,)}
    contract = msgspec.structs.replace(
        manifest.contract, model=msgspec.structs.replace(manifest.contract.model, **facts)
    )
    header = genai_header(manifest.with_program(contract=contract))
    if "machine" in needs:
        header = header.replace('kMachine = ""', f'kMachine = "{needs["machine"]}"')
    (place / "model.h").write_text(header)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The program but for the check of its host, over an engine whose next token is the last one plus one."""
    place = tmp_path_factory.mktemp("counting")
    _header(place)
    (place / "counting.cpp").write_text(_COUNTING)
    files = {"main": SOURCES / "main.cpp", "counting": place / "counting.cpp"}
    for name, file in files.items():
        _compile(place, "-c", file, "-o", place / f"{name}.o")
    return [place / f"{name}.o" for name in files]


def counting(parts: list[Path], place: Path, **needs: Any) -> Path:
    """The program for a host with `needs`."""
    _header(place, **needs)
    (place / "model.onnx").touch()
    _compile(place, SOURCES / "host.cpp", *parts, "-o", place / "decode")
    return place / "decode"


def test_where_decoding_ends(parts: list[Path], tmp_path: Path) -> None:
    """After --max-new-tokens, after an end-of-text token unless told otherwise, and with the context."""
    program = counting(parts, tmp_path)

    def run(*flags: str) -> str:
        found = subprocess.run([program, *flags], capture_output=True, text=True, check=True)
        return found.stdout

    assert run("--prompt-tokens", "3,4", "--max-new-tokens", "3") == "5,6,7\n"
    assert run("--prompt-tokens", "9,10") == "11,12\n"
    assert run("--prompt-tokens", "9,10", "--ignore-eos", "--max-new-tokens", "4") == "11,12,13,14\n"
    longest = ",".join(map(str, range(30, 49)))  # 20 - 19 = 1 place is left, and the token after it needs none
    assert run("--prompt-tokens", longest) == "49,50\n"
    assert run("--help").startswith("usage: decode (--prompt-tokens IDS | --prompt-file FILE)")


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").is_file(), reason="flags of x86 on Linux"
)
@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ({"machine": "s390x"}, "the model was compiled for s390x, this is x86_64"),
        (
            {"x86_flags_any": ["warp_drive"]},
            "the processor cannot multiply the model's 8-bit weights exactly",
        ),
    ],
)
def test_other_hosts_are_refused_by_the_program(
    parts: list[Path], tmp_path: Path, needs: dict[str, Any], message: str
) -> None:
    found = subprocess.run(
        [counting(parts, tmp_path, **needs), "--prompt-tokens", "5"], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout) == (4, "")
    assert message in found.stderr


# -- inductor-cpu -----------------------------------------------------------------------------


@needs_cmake
@pytest.mark.slow
def test_aotinductor_program_gives_the_tokens_of_optc_run(tmp_path: Path) -> None:
    """A small model with static caches; then a host without torch, and files that are not what they were."""
    artifact = short_artifact("inductor-cpu", kv_cache="static")
    built = build(artifact, tmp_path)
    wanted = expected(artifact, PROMPT)
    assert len(wanted) == NEW
    assert built.tokens(PROMPT) == wanted
    _aotinductor_faults(built, tmp_path)


def _aotinductor_faults(built: Built, place: Path) -> None:
    alone = place / "alone"
    alone.mkdir()
    shutil.copy(built.program, alone / "decode")
    found = Built(built.artifact, built.bundle, alone / "decode").run("--prompt-tokens", "5")
    assert (found.returncode, found.stdout) == (4, "")
    assert "cannot load the engine" in found.stderr
    for name in ("model.safetensors", "model.pt2"):
        broken = Path(shutil.copytree(built.bundle, place / f"broken-{name}"))
        data = (broken / name).read_bytes()
        (broken / name).write_bytes(data[:-1])
        found = built.run("--prompt-tokens", "5", model=broken)
        assert (found.returncode, found.stdout) == (7, "")
        assert f"{name} has {len(data) - 1} bytes, not {len(data)}" in found.stderr


@needs_cmake
@pytest.mark.slow
def test_aotinductor_program_with_the_op_library_and_paged_caches(tmp_path: Path) -> None:
    """The same sources as with static caches: not optimized, they take half the time to compile."""
    artifact = short_artifact("inductor-cpu", kv_cache="paged")
    built = build(artifact, tmp_path, "-DCMAKE_CXX_FLAGS_RELEASE=-O0")
    prompt = list(range(3, 40))
    assert built.tokens(prompt) == expected(artifact, prompt)


# -- faults -----------------------------------------------------------------------------------


def _decoder(**changes: Any) -> dict[str, Any]:
    layer = AttentionFacts(num_heads=4, num_kv_heads=2, head_dim=8, value_dim=8, scale=0.5, causal=True)
    contract = Contract(kind="decoder", inputs=(), outputs=(), layers=(layer,), kv_cache=KVCache(kind="linear"))
    return {
        "contract": contract,
        "engine_info": {"model": "model.onnx", "genai": True},
        "files": (),
        **changes,
    }


@pytest.fixture
def no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make_artifact` writes no ONNX graph; its check is tested by itself."""
    monkeypatch.setattr(Engine, "check_opened", lambda *arguments: None)


def test_a_graph_that_must_not_be_opened_is_not_bundled(tmp_path: Path) -> None:
    make_artifact(tmp_path / "artifact", **_decoder())
    with pytest.raises(ArtifactError, match="the ONNX model is damaged or not trusted"):
        write_bundle(tmp_path / "artifact", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_damaged_artifact_is_refused(tmp_path: Path) -> None:
    make_artifact(tmp_path / "artifact", **_decoder())
    (tmp_path / "artifact" / "model.onnx.data").write_bytes(b"other")
    with pytest.raises(ArtifactError, match=r"'model\.onnx\.data' has the wrong size"):
        write_bundle(tmp_path / "artifact", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.usefixtures("no_graph")
def test_an_existing_output_is_kept_without_force(tmp_path: Path) -> None:
    make_artifact(tmp_path / "artifact", **_decoder())
    first = write_bundle(tmp_path / "artifact", tmp_path / "bundle").manifest
    with pytest.raises(InputError, match="the output exists"):
        write_bundle(tmp_path / "artifact", tmp_path / "bundle")
    assert write_bundle(tmp_path / "artifact", tmp_path / "bundle", force=True).manifest == first
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(InputError, match="a folder that optc did not write"):
        write_bundle(tmp_path / "artifact", tmp_path / "mine", force=True)


@pytest.mark.usefixtures("no_graph")
def test_a_bundle_is_not_bundled_again(tmp_path: Path) -> None:
    make_artifact(tmp_path / "artifact", **_decoder())
    write_bundle(tmp_path / "artifact", tmp_path / "bundle")
    with pytest.raises(InputError, match="the artifact is already a bundle"):
        write_bundle(tmp_path / "bundle", tmp_path / "again")


@pytest.mark.usefixtures("no_graph")
def test_an_output_inside_the_artifact_is_refused(tmp_path: Path) -> None:
    make_artifact(tmp_path / "artifact", **_decoder())
    with pytest.raises(InputError, match="the output lies inside the artifact"):
        write_bundle(tmp_path / "artifact", tmp_path / "artifact" / "bundle")
    verify(tmp_path / "artifact")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"engine": "huggingface", "target": "vllm"},
            "no C\\+\\+ program for artifacts of the target 'vllm'",
        ),
        ({"engine": "executorch", "target": "executorch"}, "their engine is executorch"),
        (
            {"engine_info": {"model": "model.onnx", "genai": False}},
            "its layers differ in KV heads or head sizes",
        ),
    ],
)
def test_engines_without_a_program_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    make_artifact(tmp_path / "artifact", **_decoder(**changes))
    with pytest.raises(TargetError, match=message):
        write_bundle(tmp_path / "artifact", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.usefixtures("no_graph")
def test_libraries_that_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_artifact(tmp_path / "artifact", **_decoder())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TargetError, match=r'remedy: pip install "optc\[genai\]"'):
        write_bundle(tmp_path / "artifact", tmp_path / "bundle", with_libraries=True)
    assert write_bundle(tmp_path / "artifact", tmp_path / "bundle").variables == {}


def test_texts_become_literals() -> None:
    assert quoted('a"b\\c\n?é') == '"a\\042b\\134c\\012\\077\\303\\251"'


def test_the_header_holds_what_the_manifest_says() -> None:
    manifest = make_manifest(**_decoder(needs={"x86_flags_any": ["avx512_vnni", "avx_vnni"]}))
    model = msgspec.structs.replace(manifest.contract.model, vocab_size=9, context_length=7, eos_token_ids=(2, 3))
    manifest = manifest.with_program(contract=msgspec.structs.replace(manifest.contract, model=model))
    lines = genai_header(manifest).splitlines()
    assert "constexpr std::int64_t kVocabSize = 9;" in lines
    assert "constexpr std::int64_t kContextLength = 7;  // 0: not known" in lines
    assert "constexpr std::array<std::int64_t, 2> kEndOfText{{2, 3}};" in lines
    assert 'constexpr std::array<const char*, 2> kAnyFlag{{"avx512_vnni", "avx_vnni"}};' in lines
