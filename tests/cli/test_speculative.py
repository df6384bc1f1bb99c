"""Speculation through the command line: docs/speculative.md as it stands, the counters, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import optc, optc_json
from conftest import EXAMPLE, ROOT
from hf_folders import rename_token
from medusa_heads import write_heads
from once import packages_of_equal_graphs_once, short_artifact, short_example
from prometheus_client.parser import text_string_to_metric_families
from serving import run
from training_runs import small_model

from optc.cli.bench_serve import LoadOptions, _server_flags
from optc.compiler.artifact.folder import read_manifest, rewrite
from optc.compiler.artifact.manifest import Manifest
from optc.compiler.model_folder.checkpoint import check_folder, weights_digest
from optc.runtime.serving.counters import Counters
from optc.runtime.serving.engine_process import open_artifact
from optc.runtime.serving.request import Generate
from optc.runtime.serving.settings import ServeOptions

pytestmark = pytest.mark.slow

COMMANDS = re.findall(r"^optc (.*)$", (ROOT / "docs" / "speculative.md").read_text(), re.MULTILINE)
RUNS = [command for command in COMMANDS if command.startswith("run ") and "eagle3" not in command]
EAGLE = [command for command in COMMANDS if "eagle3" in command or "--expose-hidden" in command]
PROMPT = "The cat sat on the mat. The dog sat on the mat. The cat sat on the mat. The dog"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the repository's with a model of fewer layers, and with what the page's first command makes of one."""
    folder = tmp_path_factory.mktemp("speculative")
    (folder / "examples").mkdir()
    (folder / "examples" / "fiction-3m").symlink_to(short_example(layers=1))
    (folder / "examples" / "book.txt").symlink_to(EXAMPLE.parent / "book.txt")
    (folder / "out").mkdir()
    assert COMMANDS[0] == "compile examples/fiction-3m --target inductor-cpu --kv-cache paged -o out/fiction-paged"
    (folder / "out" / "fiction-paged").symlink_to(short_artifact("inductor-cpu", kv_cache="paged"))
    return folder


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where a model drafts for itself, and where a draft model is compiled twice, the second package is the first."""
    return packages_of_equal_graphs_once(monkeypatch)


@pytest.mark.parametrize("command", RUNS)
def test_the_page_runs(command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(place)
    if "fiction-medusa" in command:
        _compile_heads(place)
    if "fiction-drafted" in command:
        (made,) = [item for item in COMMANDS if "-o out/fiction-drafted" in item]
        assert optc(*made.split()) == 0
    capsys.readouterr()
    words = re.findall(r'"[^"]*"|\S+', command)
    assert optc(*(word.strip('"') for word in words), "--max-new-tokens", "10") == 0
    out = capsys.readouterr().out
    if "medusa" in words:
        found = json.loads(out)["speculation"]
        assert (found["method"], len(found["acceptance_by_position"])) == ("medusa", 2)
        assert found["drafted_tokens"] > 0
    elif "--json" in words:
        found = json.loads(out)["speculation"]
        assert found["acceptance_length"] == 4  # three drafted by the model itself, and one more
    else:
        assert len(out.split()) > 2


def _compile_heads(place: Path) -> None:
    """The page's command that compiles with heads, of random weights."""
    (command,) = [command for command in COMMANDS if "--medusa" in command]
    if not (place / "out" / "fiction-medusa").exists():
        write_heads(
            place / "out" / "heads",
            192,
            heads=2,
            scale=0.0,  # each guesses what the model says of the next token
            weights=weights_digest(check_folder(short_example(layers=1))),
        )
        assert optc(*command.split()) == 0


def test_heads_come_into_a_paged_program_of_their_own_model(tmp_path: Path, capsys: Capture) -> None:
    """What is refused before anything is captured."""
    write_heads(tmp_path / "theirs", 192, weights="b" * 64)
    (tmp_path / "empty").mkdir()
    compile_ = ("compile", EXAMPLE, "--target", "inductor-cpu", "-o", tmp_path / "out", "--medusa")
    paged = ("--kv-cache", "paged")
    for args, code, message in (
        ((*compile_, tmp_path / "theirs"), 2, "--medusa needs a paged KV cache"),
        ((*compile_, tmp_path / "theirs", *paged), 3, "the Medusa heads were trained for another model"),
        ((*compile_, tmp_path / "empty", *paged), 3, "the folder has no Medusa heads"),
        (
            (*compile_, tmp_path / "theirs", *paged, "--passes", "page-kv-cache"),
            2,
            "--medusa has no effect with --passes",
        ),
    ):
        assert optc(*args) == code, args
        assert message in capsys.readouterr().err
        kept = [word for word in args[1:] if word not in ("-o", tmp_path / "out")]
        assert optc("plan", *kept) == code, kept
        assert message in capsys.readouterr().err


def test_bench_of_trees(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Both shapes are measured, and the manifest holds the tree and what it gave, and as many bytes as were planned."""
    monkeypatch.chdir(place)
    _compile_heads(place)
    capsys.readouterr()
    (command,) = [command for command in COMMANDS if command.startswith("bench ") and "medusa" in command]
    short = ("--samples", "3", "--new-tokens", "24", "--prompt-length", "32", "--batch", "2")
    found = optc_json(capsys, *command.split(), *short)
    assert found["shape"] in ("chain", "tree")
    chain, tree = found["shapes"]["chain"], found["shapes"]["tree"]
    assert (chain["equal"], tree["equal"], chain["tree"]) == (1.0, 1.0, 0)
    contract = read_manifest(place / "out" / "fiction-medusa").contract
    assert contract.tree is not None
    assert tree["tree"] == len(contract.tree.nodes) > 2
    assert tree["acceptance_length"] >= chain["acceptance_length"]
    (compiled,) = [command for command in COMMANDS if "--medusa" in command]
    words = compiled.partition(" -o ")[0].split()
    planned = optc_json(capsys, "plan", *words[1:])
    numbers = 2 * (192 * 192 + 192)
    assert (planned["medusa"]["heads"], planned["medusa"]["layers"]) == (2, 1)
    assert planned["medusa"]["bytes"] == numbers * 4
    sizes = read_manifest(place / "out" / "fiction-medusa").sizes
    assert sizes is not None
    assert planned["sizes"]["total"] == pytest.approx(sizes.total, rel=0.01)


def test_a_program_that_takes_trees_runs_by_itself(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(place)
    _compile_heads(place)
    capsys.readouterr()
    words = ["--prompt", "Once there was", "--max-new-tokens", "6"]
    assert optc("run", "out/fiction-medusa", *words) == 0
    script = [sys.executable, str(place / "out" / "fiction-medusa" / "generate.py"), *words]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == capsys.readouterr().out.strip()


def test_bench(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(place)
    (command,) = [command for command in COMMANDS if command.startswith("bench ") and "suffix" in command]
    short = ("--samples", "3", "--new-tokens", "24", "--prompt-length", "32", "--batch", "2")
    found = optc_json(capsys, *command.split(), *short)
    assert (found["method"], found["batch"], found["equal"]) == ("suffix", 2, 1.0)
    assert found["acceptance_length"] >= 1
    assert found["verified"] > 0
    low, high = found["speedup"]["ci95"]
    assert low <= found["speedup"]["median"] <= high
    assert found["step_cost"]["median"] > 0
    assert optc(*command.split(), *short) == 0
    shown = capsys.readouterr()
    assert all(label in shown.out for label in ("acceptance length", "by position", "cost of a step", "speed-up"))


def test_a_batch_is_the_plain_one(place: Path, capsys: Capture) -> None:
    """Greedy and drawn; of equal prompts the first has the seed."""
    artifact = place / "out" / "fiction-paged"
    many = ("--prompt", PROMPT, "--prompt", "Once", "--prompt", PROMPT, "--max-new-tokens", "24")
    for how in ((), ("--temperature", "0.7", "--seed", "3")):
        plain = optc_json(capsys, "run", artifact, *many, *how)["results"]
        found = optc_json(capsys, "run", artifact, *many, *how, "--speculative", "suffix")
        rows = found["results"]
        assert [row["tokens"] for row in rows[:2]] == [row["tokens"] for row in plain[:2]]
        assert (rows[2]["tokens"] == rows[0]["tokens"]) is (not how)
        assert [row["stop"] for row in rows] == ["length"] * 3
        assert found["speculation"]["method"] == "suffix"


def test_a_server_drafts_and_says_so(place: Path, tmp_path: Path) -> None:
    """The engine as the server's process opens it, and its lines in /metrics."""
    assert "serve out/fiction-paged --speculative suffix" in COMMANDS
    engine = open_artifact(
        place / "out" / "fiction-paged", ServeOptions(speculative="suffix", draft_tokens=3, threads=1)
    )
    run(engine, [Generate(id="a", prompt=[5, 6, 7, 8] * 6, max_new_tokens=40)])
    figures = engine.metrics().speculation
    assert figures is not None
    Counters.create(tmp_path / "counters", 1)
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(
            Counters(tmp_path / "counters", 0).text(engine.info, engine.metrics())
        )
        for sample in family.samples
    }
    assert [samples["optc_draft_tokens_total", str(place)] for place in range(3)] == figures.drafted_at
    assert [samples["optc_draft_accepted_tokens_total", str(place)] for place in range(3)] == figures.accepted_at
    assert samples["optc_draft_verified_total",] == figures.verified > 0
    assert samples["optc_draft_depth",] == figures.depth
    engine.close()


def test_a_server_that_is_started_for_a_load_gets_its_flags(capsys: Capture) -> None:
    given = LoadOptions(serve=True, speculative="draft", draft_tokens=3, threads=2, trust=True)
    words = [word for words in _server_flags(given).values() for word in words]
    assert words == ["--threads", "2", "--trust", "--speculative", "draft", "--draft-tokens", "3"]
    assert optc("bench", "--serve", "http://127.0.0.1:1", "--speculative", "suffix") == 2
    assert "--speculative has no effect on a server that runs already" in capsys.readouterr().err


def test_what_is_refused(place: Path, tmp_path: Path, capsys: Capture) -> None:
    artifact = place / "out" / "fiction-paged"
    ask = ("run", artifact, "--prompt", "Once")
    book = ("--text", EXAMPLE.parent / "book.txt")
    for args, code, message in (
        ((*ask, "--speculative", "draft"), 2, "--speculative draft needs the model that drafts"),
        ((*ask, "--speculative", "ngram", "--draft", artifact), 2, "--draft has no effect with --speculative ngram"),
        ((*ask, "--draft-tokens", "3"), 2, "--draft-tokens has no effect without --speculative"),
        ((*ask, "--speculative", "ngram", "--draft-tokens", "65"), 2, "65"),
        ((*ask, "--speculative", "medusa"), 4, "the artifact has no Medusa heads"),
        ((*ask, "--speculative", "hydra"), 2, "hydra"),
        (("serve", artifact, "--speculative", "draft"), 2, "--speculative draft needs the model that drafts"),
        (("bench", artifact, "--speculative", "ngram"), 2, "--speculative needs a text"),
        (("bench", artifact, *book), 2, "--text has no effect without --speculative"),
        (("bench", artifact, "--speculative", "ngram", *book, "--save"), 2, "--save has no effect"),
        (
            ("bench", "--serve", artifact, "--draft-tokens", "2"),
            2,
            "--draft-tokens has no effect without --speculative",
        ),
        ((*ask, "--speculative", "draft", "--draft", tmp_path / "none"), 3, "none"),
        ((*ask, "--speculative", "eagle3"), 2, "--speculative eagle3 needs the model that drafts"),
        ((*ask, "--speculative", "eagle3", "--draft", artifact), 3, "no draft model that reads hidden states"),
        ((*ask, "--speculative", "draft", "--draft", EXAMPLE), 3, "the model that drafts is not compiled"),
    ):
        assert optc(*args) == code, args
        assert message in capsys.readouterr().err


def test_an_artifact_that_cannot_verify(capsys: Capture) -> None:
    artifact = short_artifact("onnx-cpu")
    for args in (("run", artifact, "--prompt", "Once"), ("bench", artifact, "--text", EXAMPLE.parent / "book.txt")):
        assert optc(*args, "--speculative", "ngram") == 4
        assert "the artifact cannot verify drafts" in capsys.readouterr().err


def test_the_page_trains_and_runs_a_draft_model(
    tmp_path: Path, packages: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Its commands, on a smaller model and for a few steps; and what is refused of the artifacts that they make."""
    monkeypatch.chdir(tmp_path)
    small = small_model(tmp_path / "examples" / "fiction-3m", layers=3, vocabulary=8192)
    shutil.copyfile(EXAMPLE / "tokenizer.json", small / "tokenizer.json")
    (tmp_path / "examples" / "book.txt").write_text((EXAMPLE.parent / "book.txt").read_text()[:20_000])
    short = ("--max-steps", "2", "--set", "seq_len=32", "--set", "batch_size=2", "--set", "eagle3.draft_vocab_size=100")
    assert [command.partition(" ")[0] for command in EAGLE] == ["train", "compile", "run", "compile", "run"]
    texts = []
    for command in EAGLE:
        words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', command)]
        more = {"train": short, "run": ("--max-new-tokens", "12", "--json")}.get(words[0], ())
        code, (out, err) = optc(*words, *more), capsys.readouterr()
        assert code == 0, err
        texts += [out] if words[0] == "run" else []
    model, first, second = packages
    assert model != first == second
    states, draft = "out/fiction-eagle3", "out/eagle3-paged"
    plain = optc_json(capsys, "run", states, "--prompt", "Once", "--max-new-tokens", "12")
    own, other = map(json.loads, texts)
    assert own["tokens"] == other["tokens"] == plain["tokens"]
    assert own["speculation"]["method"] == "eagle3"
    assert min(item["speculation"]["verified"] for item in (own, other)) > 3
    ask = ("run", states, "--prompt", "Once", "--speculative", "eagle3", "--draft")
    for args, code, message in (
        ((*ask, draft, "--draft-tokens", "5"), 2, "drafts 4 tokens in a row at most, not 5"),
        ((*ask, "out/eagle3"), 3, "with --base and the folder of its base"),
        (("run", draft, "--prompt", "Once"), 4, "is a draft model, which does not generate by itself"),
        (("run", states, "--prompt", "Once", "--speculative", "draft"), 2, "drafts by --speculative eagle3, not draft"),
        (("compile", "out/eagle3", "--target", "inductor-cpu", "--kv-cache", "paged", "-o", "out/x"), 2, "give --base"),
        (
            ("compile", "out/eagle3", "--target", "onnx-cpu", "--base", small, "-o", "out/x"),
            2,
            "needs a paged KV cache",
        ),
        (("compile", small, "--target", "inductor-cpu", "--base", small, "-o", "out/x"), 2, "--base has no effect"),
        (("compile", small, "--target", "onnx-cpu", "--expose-hidden", "1", "-o", "out/x"), 2, "--expose-hidden needs"),
        (("compile", small, "--target", "onnx-cpu", "--expose-hidden", "-1", "-o", "out/x"), 2, "expose-hidden"),
    ):
        assert optc(*args) == code, args
        assert message in capsys.readouterr().err


def test_another_tokenizer_is_named_by_its_first_difference(place: Path, tmp_path: Path, capsys: Capture) -> None:
    artifact, other = place / "out" / "fiction-paged", tmp_path / "other"
    shutil.copytree(artifact, other)
    rewrite(other, _edit_tokenizer, replaces=("report.html", "tokenizer.json"))
    ask = ("run", artifact, "--prompt", "Once", "--speculative", "draft", "--draft", other)
    assert optc(*ask) == 3
    message = capsys.readouterr().err
    assert "the model that drafts has another tokenizer" in message
    assert "token id 300 is 'changed' there" in message


def _edit_tokenizer(directory: Path, manifest: Manifest) -> Manifest:
    """Give id 300 another token."""
    shutil.copyfile(EXAMPLE / "tokenizer.json", directory / "tokenizer.json")
    rename_token(directory / "tokenizer.json", 300)
    (directory / "report.html").write_text("")
    return manifest
