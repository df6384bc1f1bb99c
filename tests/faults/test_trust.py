"""Whose native code is run: made here, signed by a trusted key, or trusted by the user; and engines that die of a file."""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from artifacts import make_artifact
from command_line import optc

from optc.cli import own_process
from optc.compiler.artifact import folder as artifacts
from optc.compiler.artifact.folder import (
    check_trusted,
    finish,
    read_manifest,
    rewrite,
    sign_artifact,
    verify,
    write_folder,
)
from optc.compiler.artifact.manifest import is_made_here
from optc.compiler.artifact.trust import SIGNATURE, new_keys
from optc.compiler.diagnostics import ArtifactError, InputError, OptcError, ResourceError

NATIVE = {
    "engine": "executorch",
    "engine_info": {"model": "model.onnx", "context_length": 64, "chunk": 16, "vocab_size": 128},
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of one's own."""
    for variable in ("XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    return tmp_path / "home" / "optc"


def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From now on this is another machine."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "elsewhere"))


def test_made_here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_artifact(tmp_path / "a", **NATIVE)
    assert manifest.native_code == ("model.onnx",)
    assert (home / "machine.key").stat().st_mode & 0o777 == 0o600
    assert is_made_here(read_manifest(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    check_trusted(tmp_path / "copy", verify(tmp_path / "copy"), trust=False)
    elsewhere(monkeypatch, tmp_path)
    manifest = verify(tmp_path / "a")
    assert not is_made_here(manifest)
    with pytest.raises(ArtifactError, match="holds native code, and was not made on this machine") as caught:
        check_trusted(tmp_path / "a", manifest, trust=False)
    assert "--trust" in str(caught.value.remedy)
    check_trusted(tmp_path / "a", manifest, trust=True)


def test_what_is_changed_and_sealed_again_is_not_made_here(home: Path, tmp_path: Path) -> None:
    manifest = make_artifact(tmp_path / "a", **NATIVE)
    (tmp_path / "a" / "model.onnx").write_bytes(b"evil")
    mark = manifest.made_here
    forged = finish(tmp_path / "a", manifest, made_here=False)
    assert forged.made_here == ""
    text = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert text["made_here"] == ""
    from fuzz.readers import sealed

    (tmp_path / "a" / "manifest.json").write_bytes(sealed(json.dumps({**text, "made_here": mark}).encode()))
    found = verify(tmp_path / "a")
    assert found.made_here == mark
    assert not is_made_here(found)
    with pytest.raises(ArtifactError, match="not made on this machine"):
        check_trusted(tmp_path / "a", found, trust=False)


def test_figures_do_not_launder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written again with figures is as trusted as it was."""
    make_artifact(tmp_path / "a", **NATIVE)
    assert is_made_here(rewrite(tmp_path / "a", lambda directory, manifest: manifest))
    elsewhere(monkeypatch, tmp_path)
    assert not is_made_here(rewrite(tmp_path / "a", lambda directory, manifest: manifest))


def test_engines_without_native_files_need_no_trust(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make_artifact(tmp_path / "a").native_code == ()
    elsewhere(monkeypatch, tmp_path)
    check_trusted(tmp_path / "a", verify(tmp_path / "a"), trust=False)


@pytest.mark.parametrize("mode", [0o644, 0o660])
def test_a_key_that_others_may_read_is_none(home: Path, tmp_path: Path, mode: int) -> None:
    make_artifact(tmp_path / "a")
    (home / "machine.key").chmod(mode)
    assert not is_made_here(read_manifest(tmp_path / "a"))
    assert make_artifact(tmp_path / "b").made_here == ""


def test_no_place_for_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert make_artifact(tmp_path / "a").made_here == ""


def test_signatures(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cryptography")
    public = new_keys(tmp_path / "maker.pem")
    assert (tmp_path / "maker.pem").stat().st_mode & 0o777 == 0o600
    make_artifact(tmp_path / "a", **NATIVE)
    sign_artifact(tmp_path / "a", tmp_path / "maker.pem")
    elsewhere(monkeypatch, tmp_path)
    manifest = verify(tmp_path / "a")
    with pytest.raises(ArtifactError, match="not made on this machine") as caught:
        check_trusted(tmp_path / "a", manifest, trust=False)
    assert "which is not trusted here" in str(caught.value.why)
    keys = tmp_path / "elsewhere" / "optc" / "trusted-keys"
    keys.mkdir(parents=True)
    shutil.copyfile(public, keys / "maker.pem")
    check_trusted(tmp_path / "a", manifest, trust=False)
    signature = (tmp_path / "a" / SIGNATURE).read_bytes()
    edited = rewrite(tmp_path / "a", lambda directory, found: found)
    assert not (tmp_path / "a" / SIGNATURE).exists()
    (tmp_path / "a" / SIGNATURE).write_bytes(signature)  # of the manifest before, which is this one but for its mark
    with pytest.raises(ArtifactError, match="native code"):
        check_trusted(tmp_path / "a", edited, trust=False)


def test_signatures_agree_with_openssl(home: Path, tmp_path: Path) -> None:
    """A key that openssl made signs, and openssl verifies what it signed."""
    pytest.importorskip("cryptography")
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
    make_artifact(tmp_path / "a")
    assert optc("sign", tmp_path / "a", "--key", private) == 0
    assert optc("verify", tmp_path / "a", "--key", public) == 0
    raw = bytes.fromhex(json.loads((tmp_path / "a" / SIGNATURE).read_text())["signature"])
    (tmp_path / "raw").write_bytes(raw)
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in"]
    command += [tmp_path / "a" / "manifest.json", "-sigfile", tmp_path / "raw"]
    assert b"Successfully" in subprocess.run(command, check=True, capture_output=True).stdout


SIGNATURES = {
    "noise": b"\xff\xfe",
    "no object": b"[]",
    "no hex": b'{"format": 1, "key": "xy", "signature": "zz"}',
    "another key": b'{"format": 1, "key": "' + b"00" * 32 + b'", "signature": "' + b"00" * 64 + b'"}',
    "more keys": b'{"format": 1, "key": "", "signature": "", "x": 1}',
    "nested": b"[" * 50_000,
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_bad_signatures(name: str, home: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    public = new_keys(tmp_path / "maker.pem")
    make_artifact(tmp_path / "a")
    (tmp_path / "a" / SIGNATURE).write_bytes(SIGNATURES[name])
    assert optc("verify", tmp_path / "a") == 0
    assert optc("verify", tmp_path / "a", "--key", public) == 7


def test_a_signature_of_another_manifest(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cryptography")
    assert make_artifact(tmp_path / "a") != make_artifact(tmp_path / "b", weight_bytes=11)
    assert optc("sign", tmp_path / "a", "--key", tmp_path / "k.pem", "--new-key") == 0
    assert optc("verify", tmp_path / "b", "--key", tmp_path / "k.pem.pub") == 7
    assert "it has no manifest.sig" in capsys.readouterr().err
    shutil.copyfile(tmp_path / "a" / SIGNATURE, tmp_path / "b" / SIGNATURE)
    assert optc("verify", tmp_path / "b", "--key", tmp_path / "k.pem.pub") == 7
    assert "the signature is not of this manifest" in capsys.readouterr().err
    assert optc("sign", tmp_path / "a", "--key", tmp_path / "k.pem", "--new-key") == 3  # the key stays
    assert optc("sign", tmp_path / "a", "--key", tmp_path / "k.pem.pub") == 3
    assert optc("verify", tmp_path / "a", "--key", tmp_path / "k.pem") == 3


@pytest.mark.parametrize("command", [["run", "--prompt-tokens", "1"], ["bench"], ["bundle", "-o", "b"], ["eval"]])
def test_commands_ask_for_trust(
    command: list[str], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("text")
    contract = {"kv_cache": {"kind": "linear", "in_place": True}}
    import msgspec
    from artifacts import make_manifest

    from optc.compiler.ir.contract import KVCache

    decoder = msgspec.structs.replace(make_manifest().contract, kv_cache=KVCache(**contract["kv_cache"]))
    info = {"model": "model.onnx", "weights": "model.onnx.data", "inputs": [], "constants": {}}
    needs = {"machine": "x86_64", "torch": "2", "cpu_flags": []}
    make_artifact(tmp_path / "a", engine="aotinductor", engine_info=info, contract=decoder, needs=needs)
    elsewhere(monkeypatch, tmp_path)
    monkeypatch.setattr(own_process, "_is_made_here", lambda artifact: True)  # the fork is tested by itself
    more = ["--text", str(tmp_path / "text")] if command[0] == "eval" else []
    assert optc(command[0], tmp_path / "a", *command[1:], *more) == 7
    assert "add --trust" in capsys.readouterr().err


class TestOwnProcess:
    """Children fork and leave at once."""

    @pytest.mark.parametrize(
        ("end", "kind"),
        [
            (signal.SIGSEGV, ArtifactError),
            (signal.SIGABRT, ArtifactError),
            (signal.SIGKILL, ResourceError),
            (3, SystemExit),
        ],
    )
    def test_the_end_of_the_engine(
        self,
        end: signal.Signals | int,
        kind: type[BaseException],
        home: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        make_artifact(tmp_path / "a")
        elsewhere(monkeypatch, tmp_path)
        parent = os.getpid()

        def body() -> None:
            own_process.leave_to_own_process([tmp_path / "a"])
            faulthandler.disable()
            if isinstance(end, signal.Signals):
                os.kill(os.getpid(), end)
            os._exit(int(end))

        try:
            with pytest.raises(kind) as caught:
                body()
        finally:
            if os.getpid() != parent:
                os._exit(99)
        if kind is SystemExit:
            assert caught.value.code == 3  # type: ignore[attr-defined]
        if kind is ArtifactError:
            assert "crashed" in str(caught.value)

    def test_nothing_forks_for_what_was_made_here(self, home: Path, tmp_path: Path) -> None:
        make_artifact(tmp_path / "a")
        before = os.getpid()
        own_process.leave_to_own_process([tmp_path / "a", tmp_path / "none"])
        assert os.getpid() == before


def test_a_signature_is_replaced_whole(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cryptography")
    new_keys(tmp_path / "k.pem")
    make_artifact(tmp_path / "a")
    sign_artifact(tmp_path / "a", tmp_path / "k.pem")
    before = (tmp_path / "a" / SIGNATURE).read_bytes()

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts.os, "replace", full)
    with pytest.raises(ResourceError):
        sign_artifact(tmp_path / "a", tmp_path / "k.pem")
    assert (tmp_path / "a" / SIGNATURE).read_bytes() == before
    verify(tmp_path / "a")
    with pytest.raises(InputError), write_folder(tmp_path / "a", force=False):
        pass


def test_python_asks_for_trust_where_the_commands_isolate(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`optc.load` has no process of its own: whatever its engine reads was made here, signed, or is trusted."""
    import optc
    from optc.runtime.sessions.load import load

    make_artifact(tmp_path / "a")
    make_artifact(tmp_path / "folder", engine="huggingface", engine_info={})
    elsewhere(monkeypatch, tmp_path)
    with pytest.raises(ArtifactError, match="not made on this machine") as refused:
        optc.load(tmp_path / "a")
    assert refused.value.exit_code == 7
    assert "trust=True" in str(refused.value.remedy)
    assert "optc run" in str(refused.value.remedy)
    for opened in (lambda: load(tmp_path / "a"), lambda: optc.load(tmp_path / "a", trust=True)):
        with pytest.raises(OptcError) as later:  # it has no real graph
            opened()
        assert "made on this machine" not in str(later.value)
    check_trusted(tmp_path / "folder", verify(tmp_path / "folder"), trust=False, isolated=False)
