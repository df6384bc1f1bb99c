"""The flags of each command, and that a wrong value of any field is a typed error from everywhere it can come from."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
import yaml
from conftest import EXAMPLE
from hypothesis import given, settings
from hypothesis import strategies as st

import optc
from optc.cli.bench import BenchOptions
from optc.cli.bundle import BundleOptions
from optc.cli.compare import CompareOptions
from optc.cli.evaluate import EvalOptions
from optc.cli.flag_tables import with_tables
from optc.cli.inspect import InspectOptions
from optc.cli.main import COMMANDS, cli, main
from optc.cli.plan import TrainingPlan
from optc.cli.request_flags import TITLES
from optc.cli.run import RunOptions
from optc.cli.train import KEYS, TrainOptions
from optc.compiler.diagnostics import TargetError, UsageError
from optc.compiler.settings.fields import Field, fields_of
from optc.compiler.target.options import QuantRequest, TargetOptions
from optc.request import SECTIONS, Request, RunRequest, from_python, target_fields
from optc.resolving import resolve
from optc.targets.registry import all_targets, find_target
from optc.training.recipe import FIELDS

Capture = pytest.CaptureFixture[str]

WHAT = {"--dtype", "--device", "--passes", "--insert-pass", "--pass-option", "--trust-remote-code", "--pooling"}
QUANTIZATION = {
    "--quant",
    "--bits",
    "--average-bits",
    "--group-size",
    "--symmetric",
    "--asymmetric",
    "--ignore",
}
CALIBRATION = {"--calibration", "--calibration-samples", "--calibration-seq-len"}
GATE = {
    "--text",
    "--max-kl",
    "--min-top1",
    "--max-perplexity-increase",
    "--max-relative-error",
    "--seed",
    "--allow-noop",
}
RUN = {"-o", "--output", "--force", "--dump-ir", "--work-dir", "--save-recipe"}
DRAFTING = {"--medusa", "--base", "--expose-hidden"}
TARGETS = {
    "--max-seq-len",
    "--accuracy-level",
    "--head-bits",
    "--max-batch",
    "--arch",
    "--trt-ops",
    "--trt-runtime",
    "--max-num-tokens",
    "--kv-cache-dtype",
    "--speculative",
    "--draft",
    "--draft-tokens",
    "--speculative-tree",
    "--layout",
}
SAMPLING = {
    "--temperature",
    "--top-k",
    "--top-p",
    "--min-p",
    "--repetition-penalty",
    "--presence-penalty",
    "--frequency-penalty",
    "--seed",
}
SESSION = {"--threads", "--kv-blocks", "--trust"}
SPECULATION = {"--speculative", "--draft", "--draft-tokens", "--draft-shape"}
TRAIN = {"--train", "--world-size", "--set"}
COMMON = {"--recipe", "--json"}


def flags(command: click.Command) -> set[str]:
    found = [item for item in command.params if isinstance(item, click.Option)]
    return {name for item in found for name in (*item.opts, *item.secondary_opts)}


EXPECTED = {
    "compile": {
        "--target",
        "--kv-cache",
        *WHAT,
        *DRAFTING,
        *QUANTIZATION,
        *CALIBRATION,
        *GATE,
        *RUN,
        *TARGETS,
        *COMMON,
    },
    "quantize": {
        "--layout",
        "--kv-cache-dtype",
        "--speculative",
        "--draft-tokens",
        *WHAT,
        *QUANTIZATION,
        *CALIBRATION,
        *GATE,
        *RUN,
        *COMMON,
    },
    "plan": {"--target", "--kv-cache", "--medusa", *WHAT, *QUANTIZATION, *TARGETS, *TRAIN, *COMMON},
    "train": {
        "--model",
        "--text",
        "--validation",
        "--epochs",
        "--batch-size",
        "--lr",
        "--save-every",
        "--max-steps",
        "--bits",
        "--group-size",
        "--device",
        "--seed",
        "-o",
        "--output",
        "--set",
        "--resume",
        *COMMON,
    },
    "run": {
        "--prompt",
        "--prompt-tokens",
        "--max-new-tokens",
        "--ignore-eos",
        "--chat",
        "--system",
        "--decoder-input-ids",
        "--beams",
        "--length-penalty",
        "--early-stopping",
        "--inputs",
        "--save-outputs",
        "--embed",
        "--text",
        "--prompt-name",
        "--truncate",
        *SPECULATION,
        *SAMPLING,
        *SESSION,
        "--json",
    },
    "eval": {
        "--compare",
        "--text",
        "--inputs",
        "--windows",
        "--top-k",
        "--source",
        "--no-reference",
        "--tasks",
        "--num-fewshot",
        "--limit",
        "--save",
        "--device",
        *SESSION,
        "--json",
    },
    "serve": {
        "--host",
        "--port",
        "--workers",
        "--model-name",
        "--api-key-file",
        "--cors-origin",
        "--max-running",
        "--token-budget",
        "--max-waiting",
        "--max-prompt-tokens",
        "--max-body-bytes",
        "--max-choices",
        "--max-connections",
        "--request-seconds",
        "--drain-seconds",
        "--engine-seconds",
        "--save-memory",
        *SPECULATION,
        *SESSION,
        "--json",
    },
    "bench": {
        "--serve",
        "--requests",
        "--concurrency",
        "--rate",
        "--length-sigma",
        "--trace",
        "--slo-ttft-ms",
        "--slo-tpot-ms",
        "--model-name",
        "--api-key-file",
        "--plot",
        "--prompt-length",
        "--new-tokens",
        "--batch",
        "--samples",
        "--warmup",
        "--save",
        "--device",
        "--text",
        "--inputs",
        *SPECULATION,
        *SAMPLING,
        *SESSION,
        "--json",
    },
    "compare": {
        "-o",
        "--output",
        "--force",
        "--text",
        "--inputs",
        "--windows",
        "--samples",
        "--no-speed",
        "--prompt-length",
        "--new-tokens",
        *SESSION,
        "--json",
    },
    "search": {
        "-o",
        "--output",
        "--text",
        "--methods",
        "--max-loss",
        "--max-size",
        "--windows",
        "--samples",
        "--keep-all",
        "--target",
        "--kv-cache",
        *WHAT - {"--passes"},
        *QUANTIZATION - {"--quant", "--average-bits"},
        *CALIBRATION,
        *GATE - {"--text"},
        *TARGETS,
        *COMMON,
    },
    "inspect": {"--ir", "--stage", "--dtype", "--json"},
    "diff": {"--json"},
    "verify": {"--key", "--json"},
    "sign": {"--key", "--new-key", "--json"},
    "bundle": {"-o", "--output", "--with-libraries", "--force", "--trust", "--json"},
    "check": {"--json"},
    "passes": {"--json"},
    "targets": {"--json"},
}


def command_of(name: str) -> click.Command:
    with cli.make_context("optc", [name]) as context:
        found = cli.get_command(context, name)
        assert found is not None
        return found


def test_the_flags_of_each_command() -> None:
    """Exactly these: a flag that is added, lost or renamed shows here."""
    assert {name: flags(command_of(name)) for name in COMMANDS} == EXPECTED


OWN = {
    "train": (TrainOptions, (EXAMPLE,)),
    "plan": (TrainingPlan, (EXAMPLE,)),
    "run": (RunOptions, (EXAMPLE,)),
    "eval": (EvalOptions, (EXAMPLE,)),
    "bench": (BenchOptions, (EXAMPLE,)),
    "compare": (CompareOptions, (EXAMPLE, EXAMPLE)),
    "inspect": (InspectOptions, (EXAMPLE,)),
    "bundle": (BundleOptions, (EXAMPLE, "-o", "x")),
}
"""Commands with a struct of their own, and arguments that they need."""


@pytest.mark.parametrize("name", OWN)
def test_flags_are_made_of_fields(name: str) -> None:
    """Help with its default, and the flag's name, as the field has them; nothing but --json is written by hand."""
    options = {item.name: item for item in command_of(name).params if isinstance(item, click.Option)}
    fields = fields_of(OWN[name][0])
    for field in fields.values():
        option = options[field.name]
        assert option.opts[-1] == f"--{field.key}"
        assert option.help is not None
        assert option.help.startswith(field.help)
        assert field.help.endswith(".")
        assert (f"[default: {field.default_text}]" in option.help) == bool(
            field.default_text and field.kind is not bool
        )
    if name not in ("train", "plan"):
        assert set(options) == {*fields, "as_json"}


def wrong_texts(field: Field) -> list[str]:
    """Values that a command line can give and the field does not take."""
    numbers = (int, float) if not field.repeatable else ()
    if field.kind in numbers or int in getattr(field.kind, "__args__", ())[:1] or field.name == "prompt_length":
        ge, gt, le, _ = field.bounds
        outside = [text for bound, by in ((ge, -1), (le, 1)) if bound is not None for text in [str(bound + by)]]
        return ["x", "", "nan", "1,5", *outside, *([str(gt)] if gt is not None else [])]
    if field.choices:
        return ["nope", ""]
    if field.name in ("prompt_tokens", "decoder_input_ids"):
        return ["x", "1,,2", "", "1.5"]
    return ["gpu"] if field.name == "device" else []


def test_wrong_values_of_commands(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused with exit code 2, the flag named, before the artifact (here none) is looked at."""
    monkeypatch.chdir(tmp_path)
    count = 0
    for name, (cls, arguments) in OWN.items():
        keys = {key: FIELDS[where] for key, where in KEYS.items()} if name == "train" else {}
        own = {**fields_of(cls), **{key: dataclasses.replace(field, name=key) for key, field in keys.items()}}
        for key, field in own.items():
            for value in wrong_texts(field):
                given = ("--recipe", "finetune") if name == "train" else arguments
                flag = f"--{key.replace('_', '-')}"
                assert exit_code(name, *given, f"{flag}={value}", "--json") == 2, (name, flag, value)
                said = json.loads(capsys.readouterr().out)
                assert said["where"] == f"the command line, {flag}", (name, flag, value)
                count += 1
    assert count > 100
    assert not list(tmp_path.iterdir())


@functools.cache
def every_field() -> list[tuple[str, Field]]:
    """(target, field): the sections' fields with a target that takes all, and each target's own."""
    shared = [("inductor-cpu", field) for cls in SECTIONS.values() for field in fields_of(cls).values()]
    own = [row for rows in target_fields().values() for row in rows]
    return shared + own


def test_every_field_has_help_and_a_name_of_its_own() -> None:
    names = [name for cls in SECTIONS.values() for name in fields_of(cls)]
    assert len(names) == len(set(names))
    assert not set(names) & set(target_fields())
    for _, field in every_field():
        assert field.help.endswith("."), field.name
        assert "\n" not in field.help


def wrong_values(field: Field) -> list[Any]:
    """Values of another type or out of bounds, as YAML and Python can give them."""
    ge, _, le, _ = field.bounds
    outside = [value for value in (None if ge is None else ge - 1, None if le is None else le + 1) if value is not None]
    if field.kind is int:
        return ["x", "4", 1.5, True, [4], {"a": 4}, *map(int, outside)]
    if field.kind is float:
        return ["abc", "0.5", True, [0.5], float("nan"), *outside]
    if field.kind is bool:
        return ["no", "true", 0, 1, [True], {}]
    if field.kind is Path:
        return [5, True, "", [], {"a": 1}, "a\0b"]
    if field.kind is str:
        return [4, True, ["a"], {"a": 1}, "a\0b"]
    if field.choices:
        return ["nope", 17, True, [field.choices[0]]]
    if field.name == "passes":
        return [
            4,
            True,
            [],
            [4],
            {"fuse-norm": {}},
            [{"fuse-norm": 3}],
            [{"a": {}, "b": {}}],
            ["fuse-norm", ""],
        ]
    if field.name == "expose_hidden":
        return [5, True, "", [], [-1], [True], [1 << 20], "1,x", {"a": 1}]
    if field.name == "calibration":
        return [4, True, "", [1, 2], {"a": 1}]
    if field.name == "group_size":
        return ["x", "64", 1.5, True, [64], -1, (1 << 20) + 1]
    assert field.repeatable, field.name
    return [5, True, {"a": 1}, [5], ["a", None]]


CASES = [(target, field, value) for target, field in every_field() for value in wrong_values(field)]


def exit_code(*args: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    return int(caught.value.code or 0)


def test_wrong_values_from_python(tmp_path: Path) -> None:
    for target, field, value in CASES:
        with pytest.raises(UsageError) as caught:
            from_python(target, **{"output": tmp_path / "out", field.name: value})
        error = caught.value
        assert error.exit_code == 2
        assert f"'{field.key}' cannot be " in error.what or error.what == f"unknown {field.key} '{value}'"
        assert error.where == f"optc.compile({field.name}=...)"
        assert field.expected in str(error.remedy) or ", ".join(sorted(field.choices)) in str(error.remedy)
    assert not list(tmp_path.iterdir())


def test_wrong_values_from_a_recipe(tmp_path: Path, capsys: Capture) -> None:
    recipe = tmp_path / "recipe.yaml"
    kinds = {(target, field.name, type(value)): (target, field, value) for target, field, value in CASES}
    for target, field, value in kinds.values():  # one of each type: Python has them all, and converts them alike
        keys = {"model": str(EXAMPLE), "target": target, "output": str(tmp_path / "out"), field.key: value}
        recipe.write_text(yaml.safe_dump(keys))
        assert exit_code("compile", "--recipe", recipe, "--json") == 2, (field.name, value)
        said = json.loads(capsys.readouterr().out)
        assert field.key in said["what"], (field.name, value)
        assert said["where"] == f"{recipe}, key '{field.key}'"
    assert list(tmp_path.iterdir()) == [recipe]


def test_wrong_values_from_the_command_line(tmp_path: Path, capsys: Capture) -> None:
    for target, field, value in CASES:
        numeric = field.kind in (int, float)
        if field.kind is bool or not isinstance(value, int | float | str) or isinstance(value, bool):
            continue  # no text on a command line
        if (not numeric and not field.choices) or (numeric and value in ("4", "0.5")) or "\0" in str(value):
            continue  # any text is a text
        arguments = (EXAMPLE, "--target", target, "-o", tmp_path / "out", f"--{field.key}={value}")
        assert exit_code("compile", *arguments, "--json") == 2, (field.name, value)
        said = json.loads(capsys.readouterr().out)
        assert field.key in said["what"]
        assert said["where"] == f"the command line, --{field.key}"
    assert not list(tmp_path.iterdir())


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_value_is_taken_or_refused_with_a_type(data: st.DataObject) -> None:
    target, field = data.draw(st.sampled_from(every_field()))
    value = data.draw(PLAIN)
    try:
        request = from_python(target, **{field.name: value})
    except (UsageError, TargetError):  # 2 and 4; anything else fails the test
        return
    parts = [request.options, *(getattr(request, section) for section in SECTIONS)]
    made = next(part for part in parts if field.name in part.__struct_fields__)
    hint = field.hint if field.kind not in (Path,) and "read" not in field.extra else Any
    if value is not None:
        msgspec.convert(getattr(made, field.name), hint)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("force: 'no'", "'force' cannot be 'no'"),
        ("dtype: 16", "'dtype' cannot be 16"),
        ("quant: 4", "'quant' cannot be 4"),
        ("ignore: 5", "'ignore' cannot be 5"),
        ("max-kl: abc", "'max-kl' cannot be 'abc'"),
        ("passes: 4", "'passes' cannot be 4"),
        ("group-size: -1", "'group-size' cannot be -1"),
        ("max_seq_len: -5", "'max-seq-len' cannot be -5"),
        ("model: 5", "'model' cannot be 5"),
        ("target: [trt]", "'target' cannot be ['trt']"),
    ],
)
def test_faults_that_were_found(text: str, what: str, tmp_path: Path, capsys: Capture) -> None:
    """An existing artifact is never replaced by them."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "manifest.json").write_text("{}")
    keys = {"model": str(EXAMPLE), "target": "inductor-cpu", "output": str(output), "quant": "rtn"}
    recipe = tmp_path / "recipe.yaml"
    name = text.partition(":")[0]
    recipe.write_text(yaml.safe_dump({key: value for key, value in keys.items() if key != name}) + text + "\n")
    assert exit_code("compile", "--recipe", recipe, "--json") == 2
    said = json.loads(capsys.readouterr().out)
    assert said["what"] == what
    assert (output / "manifest.json").read_text() == "{}"


@pytest.mark.parametrize(
    "setting",
    [
        "quantize-rtn.bits=[",
        "quantize-rtn.bits=x",
        "quantize-rtn.group_size=-1",
        "quantize-rtn.head=5",
        "a",
        "a.b=1",
    ],
)
def test_wrong_options_of_passes(setting: str, tmp_path: Path, capsys: Capture) -> None:
    arguments = (EXAMPLE, "--target", "onnx-cpu", "--quant", "rtn", "-o", tmp_path / "out")
    assert exit_code("compile", *arguments, "--pass-option", setting) in (2, 3)
    assert "Traceback" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_option_of_other_targets(capsys: Capture, tmp_path: Path) -> None:
    arguments = (EXAMPLE, "--target", "onnx-cpu", "-o", tmp_path / "out", "--layout", "awq")
    assert exit_code("compile", *arguments, "--json") == 4
    said = json.loads(capsys.readouterr().out)
    assert said["what"] == "target 'onnx-cpu' does not take --layout"
    assert said["remedy"] == "it takes: accuracy-level, head-bits"


def test_targets_lists_the_options(capsys: Capture) -> None:
    assert exit_code("targets", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["targets"]}
    assert [item["name"] for item in rows["vllm"]["options"][:2]] == ["speculative", "draft-tokens"]
    assert rows["vllm"]["options"][2:] == [
        {
            "name": "layout",
            "takes": "one of compressed-tensors, awq, gptq, fp8",
            "default": "compressed-tensors",
            "help": "Form of quantized weights in a model folder.",
        },
        {
            "name": "kv-cache-dtype",
            "takes": "one of auto, fp8, int8",
            "default": "auto",
            "help": "fp8 or int8: calibrated scales of keys and values for caches in 8 bits; auto: the compute type.",
        },
    ]


def test_the_docs_tables_are_current() -> None:
    """`python -m optc.cli.flag_tables docs/compile.md` writes them; every section and target has one."""
    path = Path(__file__).parents[2] / "docs" / "compile.md"
    text = path.read_text(encoding="utf-8")
    assert with_tables(text) == text
    names = set(re.findall(r"<!-- table: ([a-z-]+) -->", text))
    assert names == {*SECTIONS, *(target.name for target in all_targets() if fields_of(target.options))}


def test_a_request_made_by_hand_is_read_too(tmp_path: Path) -> None:
    """The structs check nothing themselves; a compile does, before it writes."""
    onnx, vllm = find_target("onnx-cpu"), find_target("vllm")
    output = RunRequest(output=tmp_path / "out")
    for request, what in (
        (Request(target=onnx, quantization=QuantRequest(quant="rtn", bits=-1)), "'bits' cannot be -1"),
        (Request(target=onnx, quantization=QuantRequest(quant=4)), "'quant' cannot be 4"),  # type: ignore[arg-type]
        (Request(target=onnx, run=RunRequest(force="no")), "'force' cannot be 'no'"),  # type: ignore[arg-type]
        (Request(target=onnx, gate=3), "'gate' of a request cannot be 3"),  # type: ignore[arg-type]
        (Request(target="onnx"), "a request's target cannot be 'onnx'"),  # type: ignore[arg-type]
        (
            Request(target=onnx, run=output, options=TargetOptions()),
            "target 'onnx-cpu' does not take TargetOptions",
        ),
        (Request(target=vllm, options=onnx.options()), "target 'vllm' does not take OnnxOptions"),
    ):
        with pytest.raises((UsageError, TargetError)) as caught:
            optc.compile(EXAMPLE, request=request)
        assert caught.value.what == what
    made = Request(target=onnx, quantization=QuantRequest(quant="rtn", group_size=32))
    chosen = resolve(made).options.quantization
    assert chosen is not None
    assert (chosen.bits, chosen.group_size) == (4, 32)


def test_help_has_a_section_for_each_part_of_a_request(capsys: Capture) -> None:
    assert exit_code("compile", "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    titles = [line.removesuffix(":") for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["Options", *TITLES.values(), "Options of targets"]
    assert TITLES.keys() == SECTIONS.keys()
    place = {
        name: next(i for i, line in enumerate(lines) if line.strip().startswith(name))
        for name in ("--bits", "--max-kl")
    }
    assert lines.index("Quantization:") < place["--bits"] < lines.index("KV cache:")
    assert lines.index("Numerics gate:") < place["--max-kl"] < lines.index("Output:")
