"""Files between the runs of a command: a flipped bit in one is found, never computed with."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from stages import captured
from training_runs import small_config, small_model, token_file

from optc.cli.signals import ended_by_signals
from optc.compiler.artifact import publishing
from optc.compiler.artifact.publishing import remove_folder, write_folder
from optc.compiler.diagnostics import ArtifactError, InputError
from optc.compiler.files import SUMS, damage, write_sums
from optc.compiler.model_folder.checkpoint import check_folder, config_digest, weights_digest
from optc.compiler.pipeline.pipeline import Pipeline, PipelineOptions
from optc.passes.fusion.norm import FuseNorm
from optc.passes.quantization.arithmetic.store import GroupStore
from optc.training import checkpoint
from optc.training.held_run import held_run
from optc.training.loop import run_folder, train
from optc.training.metrics import read_log


def flip(path: Path, seed: int = 0) -> None:
    """One bit of a file."""
    data, rng = bytearray(path.read_bytes()), random.Random(seed)
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def test_a_folder_with_sums(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "in/b"):
        (tmp_path / name).write_bytes(b"some bytes")
    write_sums(tmp_path)
    assert damage(tmp_path) is None
    for name in ("a", "in/b"):
        sound = (tmp_path / name).read_bytes()
        flip(tmp_path / name)
        assert damage(tmp_path) == f"'{name}' was changed after it was written"
        (tmp_path / name).write_bytes(sound)
    (tmp_path / "more").write_bytes(b"")
    assert damage(tmp_path) == f"'more' is not both in the folder and in {SUMS}"
    (tmp_path / "more").unlink()
    (tmp_path / "a").unlink()
    assert damage(tmp_path) == f"'a' is not both in the folder and in {SUMS}"
    (tmp_path / "a").symlink_to("in/b")
    with pytest.raises(OSError, match="symbolic links"):
        damage(tmp_path)
    (tmp_path / SUMS).unlink()
    assert "it has no SHA256SUMS" in str(damage(tmp_path))


def test_stages(tmp_path: Path) -> None:
    program, options = captured("llama"), PipelineOptions(work_dir=tmp_path)
    (tmp_path / ".left.tmp-4194305-01234567").mkdir()  # by a process that cannot be
    Pipeline([FuseNorm()]).run(program, options)
    (stage,) = tmp_path.iterdir()
    files = sorted(path for path in stage.iterdir())
    assert len(files) == 5
    for seed, path in enumerate(files):
        sound = path.read_bytes()
        flip(path, seed)
        with pytest.raises(ArtifactError, match="a saved stage is damaged"):
            Pipeline([FuseNorm()]).run(program, options)
        path.write_bytes(sound)
    Pipeline([FuseNorm()]).run(program, options)


def test_rounded_groups(tmp_path: Path) -> None:
    store = GroupStore(tmp_path)
    store.save(3, [])
    assert store.load(3) == []
    (path,) = tmp_path.iterdir()
    sound = path.read_bytes()
    for seed in range(20):
        flip(path, seed)
        assert store.load(3) is None
        path.write_bytes(sound)
    assert store.load(3) == []
    store.save(3, [])
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, object]:
    """(output, config) of a run that ended after its checkpoint of step 2."""
    config = small_config(
        small_model(tmp_path / "model"),
        token_file(tmp_path / "text.jsonl"),
        tmp_path / "out",
        max_steps=3,
        saving={"every": 2},
    )

    def killed(record: object) -> None:
        if getattr(record, "step", 0) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, on_step=killed)
    return tmp_path / "out", config


def test_training_checkpoints_and_logs(stopped: tuple[Path, object]) -> None:
    output, config = stopped
    run = run_folder(output)
    (folder,) = checkpoint.checkpoints(run)
    for seed, path in enumerate(sorted(folder.iterdir())):
        sound = path.read_bytes()
        flip(path, seed)
        with pytest.raises(InputError, match="the checkpoint is damaged") as caught:
            train(config, resume=True)  # type: ignore[arg-type]
        assert "remove this checkpoint's folder" in str(caught.value.remedy)
        path.write_bytes(sound)
    log = run / "log.jsonl"
    rows = log.read_bytes().splitlines(keepends=True)
    for kept, lost in (([], 1), (rows[:1], 2), (rows[1:], 1)):
        log.write_bytes(b"".join(kept))
        with pytest.raises(InputError, match=f"the log of the run lacks step {lost} of 2"):
            train(config, resume=True)  # type: ignore[arg-type]
    log.write_bytes(b"".join(rows))
    train(config, resume=True)  # type: ignore[arg-type]
    assert [row.step for row in read_log(output / "log.jsonl")] == [1, 2, 3]
    assert sorted(path.name for path in output.parent.iterdir()) == ["model", "out", "text.jsonl"]


def test_two_trainings_of_one_output(stopped: tuple[Path, object]) -> None:
    output, config = stopped
    with held_run(run_folder(output), new=False), pytest.raises(InputError, match="another training writes"):
        train(config, resume=True)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="an unfinished run"), held_run(run_folder(output), new=True):
        pass
    train(config, resume=True)  # type: ignore[arg-type]
    with held_run(output.parent / "never.run", new=True):
        pass
    assert not (output.parent / "never.run").exists()


def test_a_kill_while_a_run_is_cleared_away(stopped: tuple[Path, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """At any point of it, the run is whole or gone."""
    output = stopped[0]
    run = run_folder(output)

    def killed(path: Path, **_: object) -> None:
        next(path.rglob("*.safetensors")).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_folder(run)
    assert not run.exists()
    with held_run(run, new=True):
        assert [path.name for path in output.parent.iterdir() if "gone" in path.name] != []  # of a process that lives


def test_a_source_that_is_replaced_is_not_credited(tmp_path: Path) -> None:
    info = check_folder(small_model(tmp_path / "model"))
    weights, config = weights_digest(info), config_digest(info)
    path = tmp_path / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    time.sleep(0.01)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"model\.safetensors was changed while it was read"):
        weights_digest(info)
    again = check_folder(tmp_path / "model")
    assert weights_digest(again) != weights
    (tmp_path / "new").write_bytes((tmp_path / "model" / "config.json").read_bytes())
    (tmp_path / "new").replace(tmp_path / "model" / "config.json")
    with pytest.raises(InputError, match=r"config\.json was changed"):
        config_digest(again)
    assert config_digest(check_folder(tmp_path / "model")) == config


@pytest.fixture
def handled(number: signal.Signals) -> Iterator[None]:
    """The signal ends a process; one that nohup has started ignores SIGHUP."""
    before = signal.signal(number, signal.SIG_DFL)
    yield
    signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("handled")
def test_signals_leave_nothing_behind(number: signal.Signals, tmp_path: Path) -> None:
    ends = []

    def written() -> None:
        with write_folder(tmp_path / "out", force=False) as directory:
            (directory / "file").write_bytes(b"half")
            os.kill(os.getpid(), number)
            ends.append("not reached")

    with pytest.raises(SystemExit) as caught, ended_by_signals():
        written()
    assert (caught.value.code, ends) == (128 + number, [])
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) is signal.SIG_DFL


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_name_that_cannot_be_synced_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new artifact stands: that is no failure."""
    real = publishing.sync_file

    def failing(path: Path) -> None:
        if path == tmp_path.resolve():
            raise OSError(errno.EIO, "Input/output error")
        real(path)

    monkeypatch.setattr(publishing, "sync_file", failing)
    with (
        pytest.warns(RuntimeWarning, match="a power loss may undo it"),
        write_folder(tmp_path / "out", force=False) as directory,
    ):
        (directory / "file").write_bytes(b"whole")
    assert (tmp_path / "out" / "file").read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_lock_goes_with_the_process(tmp_path: Path) -> None:
    held, leave = threading.Event(), threading.Event()

    def other() -> None:
        with held_run(tmp_path / "run", new=True):
            held.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    held.wait(10)
    with pytest.raises(InputError, match="another training"), held_run(tmp_path / "run", new=False):
        pass
    leave.set()
    thread.join()
    with held_run(tmp_path / "run", new=True):
        assert (tmp_path / "run").is_dir()
