"""Tasks of the evaluation harness on an artifact, against the harness's own model over transformers."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import captured_folder, make_manifest
from conftest import EXAMPLE
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from msgspec.structs import replace
from transformers import AutoModelForCausalLM, AutoTokenizer

from optc.compiler.diagnostics import InputError, UsageError
from optc.compiler.ir.program import Program
from optc.runtime.generation.tokenizer import eos_token_ids, load_tokenizer
from optc.runtime.measuring import lm_eval_adapter
from optc.runtime.measuring.lm_eval_adapter import ArtifactLM
from optc.runtime.measuring.tasks import run_tasks
from optc.runtime.sampling import Sampling
from optc.runtime.sessions.program import open_program
from optc.runtime.sessions.text_model import Model

PAIRS = [
    ("The old man looked at the sea, and", " said nothing"),
    ("The old man looked at the sea, and", " wept"),
    ("The old man looked at the sea, and ", "said"),  # the space belongs to the continuation
    ("", "Once upon a time"),
    ("It", " was raining when they came to the house, and nobody had made a fire."),
]
TEXTS = ["A.", "It was a dark night, and the ship lay at anchor. " * 6, 'Fire!\n\n"No," he said.']


def _program() -> Program:
    return captured_folder(EXAMPLE)


def _model(context: int = 0) -> Model:
    program = _program()
    if context:
        facts = program.contract.model
        program = program.with_contract(model=replace(facts, context_length=context))
    tokenizer = load_tokenizer(EXAMPLE)
    manifest = make_manifest(contract=program.contract)
    return Model(manifest, open_program(program), tokenizer, eos_token_ids(EXAMPLE))


@cache
def _peer(context: int = 2048) -> Any:
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=1,
        max_length=context,
        device="cpu",
    )


def _requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, item, i) for i, item in enumerate(arguments)]


@pytest.mark.parametrize("context", [2048, 12])
def test_loglikelihood_equals_the_harness(context: int) -> None:
    requests = _requests("loglikelihood", *PAIRS[: 4 if context < 100 else 5])
    found = ArtifactLM(_model(context)).loglikelihood(requests, disable_tqdm=True)
    expected = _peer(context).loglikelihood(requests, disable_tqdm=True)
    for (value, greedy), (other, other_greedy) in zip(found, expected, strict=True):
        assert value == pytest.approx(float(other), abs=1e-3)
        assert greedy == bool(other_greedy)


@pytest.mark.parametrize("context", [2048, 24])
def test_rolling_equals_the_harness(context: int) -> None:
    requests = _requests("loglikelihood_rolling", *[(text,) for text in TEXTS])
    found = ArtifactLM(_model(context)).loglikelihood_rolling(requests)
    assert found == pytest.approx(_peer(context).loglikelihood_rolling(requests, disable_tqdm=True), abs=1e-2)
    assert all(value < -1 for value in found)


def test_generation_equals_the_harness() -> None:
    options = [
        {"until": ["\n"], "max_gen_toks": 16},
        {"until": [" the"], "max_gen_toks": 16, "do_sample": False},
        {"until": [], "max_gen_toks": 5},
        {"until": [], "max_gen_toks": 24, "repetition_penalty": 1.5},
    ]
    requests = _requests("generate_until", *[(PAIRS[0][0], item) for item in options])
    found = ArtifactLM(_model()).generate_until(requests)
    assert found == _peer().generate_until(requests, disable_tqdm=True)
    assert " the" not in found[1]
    assert found[0].startswith(found[2])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Sampling(seed=3)),
        ({"temperature": 0.0, "top_k": 5}, Sampling(seed=3)),
        ({"temperature": 0.0, "do_sample": True}, Sampling(seed=3)),
        ({"temperature": 0.7, "do_sample": False}, Sampling(seed=3)),
        ({"temperature": None, "do_sample": None}, Sampling(seed=3)),
        ({"do_sample": True}, Sampling(temperature=1.0, seed=3)),
        ({"temperature": 0.7, "do_sample": None}, Sampling(temperature=0.7, seed=3)),
        ({"temperature": 0.7, "top_p": 0.9, "min_p": 0.1}, Sampling(temperature=0.7, top_p=0.9, min_p=0.1, seed=3)),
        (
            {"frequency_penalty": 1, "presence_penalty": -2},
            Sampling(frequency_penalty=1.0, presence_penalty=-2.0, seed=3),
        ),
    ],
)
def test_how_tasks_want_tokens_chosen(options: dict[str, Any], expected: Sampling) -> None:
    """A temperature of 0 that a task states is greedy, whatever else it says."""
    assert lm_eval_adapter._generation_options(options, seed=3)[0] == expected


def test_equal_inputs_share_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, runs = _model(), []
    score = model.session.score
    monkeypatch.setattr(model.session, "score", lambda tokens: runs.append(1) or score(tokens))
    requests = _requests("loglikelihood", ("The sun is", " hot"), ("The sun is", " cold"), ("The moon is", " hot"))
    found = ArtifactLM(model).loglikelihood(requests, disable_tqdm=True)
    assert len(runs) == 2
    assert len({value for value, _ in found}) == 3


def test_refuses() -> None:
    lm = ArtifactLM(_model(4))
    with pytest.raises(InputError, match="a continuation cannot be scored") as caught:
        lm.loglikelihood(_requests("loglikelihood", ("a", " b c d e f g h")), disable_tqdm=True)
    assert "the context 4" in str(caught.value)
    with pytest.raises(UsageError, match="generation option 'num_beams'"):
        lm.generate_until(_requests("generate_until", ("a", {"num_beams": 4})))
    model = _model()
    model.tokenizer = None
    with pytest.raises(InputError, match="the model has no tokenizer"):
        ArtifactLM(model)


# -- tasks ------------------------------------------------------------------------------------


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two offline tasks: multiple choice and perplexity."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {"question": "The ship lay at", "choices": ["anchor", "butter"], "gold": 0},
        {"question": "He opened the", "choices": ["because", "door"], "gold": 1},
        {"question": "She looked out of the", "choices": ["window", "yesterday", "and"], "gold": 0},
        {"question": "They went to", "choices": ["the house", "purple"], "gold": 1},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path / "cache"}}}
test_split: test
"""
    choice = """task: tiny_choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
    words = """task: tiny_words
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
"""
    (folder / "choice.yaml").write_text(choice + common)
    (folder / "words.yaml").write_text(words + common)
    return folder


def test_tasks_equal_the_harness(tasks: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = run_tasks(_model(), [str(tasks)], on_request=lambda done, total: seen.append((done, total)))
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    names = ["tiny_choice", "tiny_words"]
    expected = simple_evaluate(_peer(), tasks=names, task_manager=manager, log_samples=False, bootstrap_iters=10)
    assert sorted(found) == names
    for name, metric in (
        ("tiny_choice", "acc"),
        ("tiny_choice", "acc_norm"),
        ("tiny_words", "word_perplexity"),
    ):
        value = found[name][metric]["value"]
        assert value == pytest.approx(expected["results"][name][f"{metric},none"], rel=1e-3)
    assert found["tiny_choice"]["acc"]["value"] == 0.75
    assert found["tiny_choice"]["acc"]["stderr"] == pytest.approx(0.25)  # sqrt(0.75 * 0.25 / (4 - 1))
    assert found["tiny_choice"]["samples"] == 4
    assert seen[-1][0] == seen[-1][1]


def test_one_task_file_with_a_limit_and_examples(tasks: Path) -> None:
    found = run_tasks(_model(), [str(tasks / "choice.yaml")], limit=2)
    assert list(found) == ["tiny_choice"]
    assert found["tiny_choice"]["samples"] == 2
    assert found["tiny_choice"]["acc"]["value"] == 1.0


@pytest.mark.parametrize(
    ("kind", "message", "names", "options"),
    [
        (UsageError, "no task is named", [], {}),
        (UsageError, "limit 0 is out of range", ["tasks"], {"limit": 0}),
        (UsageError, "num-fewshot -1 is out of range", ["tasks"], {"num_fewshot": -1}),
        (InputError, "the task does not exist", ["{}/none.yaml"], {}),
        (InputError, "no task is defined there", ["{}"], {}),
        (InputError, "a task cannot be loaded", ["{}/broken.yaml"], {}),
    ],
)
def test_bad_tasks(
    tmp_path: Path, kind: type[Exception], message: str, names: list[str], options: dict[str, int]
) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "broken.yaml").write_text("task: broken\ndataset_path: /nowhere/at/all\ntest_split: test\n")
    given = [name.format(folder) for name in names]
    if message == "no task is defined there":
        (folder / "broken.yaml").unlink()
    with pytest.raises(kind, match=message):
        run_tasks(_model(), given, **options)
