"""The page of an artifact: that its figures are the manifest's, and that nothing of a file gets into it unescaped."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from artifacts import make_manifest
from html_pages import Page

from optc.compiler.artifact.manifest import AllowedRecord, DriftRecord, Manifest, PassRecord, ProgramEntry
from optc.compiler.artifact.sizes import Sizes
from optc.compiler.ir.contract import CrossFacts, Input
from optc.compiler.rewriting.quantization_record import LinearRecord
from optc.exporters.reports.drift import cumulative_charts, layer_chart
from optc.exporters.reports.report import write_report


def step(name: str, kl: float, most: float | None = None, **changes: Any) -> PassRecord:
    """A pass of a language model that moved its logits so far in all."""
    drift = DriftRecord(max_abs_diff=kl, kl=kl, top1_agreement=1 - kl, perplexity_increase=kl / 2)
    limit = None if most is None else AllowedRecord(kl=most, perplexity_increase=0.7)
    plain = make_manifest().passes[0]
    fields = {"drift": drift, "since_capture": drift, "allowed": limit, "lossy": most is not None, **changes}
    return msgspec.structs.replace(plain, name=name, **fields)


def write(folder: Path, manifest: Manifest) -> Page:
    folder.mkdir(exist_ok=True)
    write_report(folder, manifest)
    found = Page((folder / "report.html").read_text())
    found.check_alone()
    return found


def figures(text: str) -> list[float]:
    return [float(item) for item in re.findall(r"\d+\.?\d*", text)]


def test_what_is_lost_in_all_is_drawn_beside_what_is_allowed(tmp_path: Path) -> None:
    passes = (step("fuse", 1e-6), step("quantize-rtn", 0.01, 0.1), step("quantize-head", 0.02, 1.0), step("idle", 0.0))
    passes = (*passes[:3], msgspec.structs.replace(passes[3], matched=0, drift=None, since_capture=None))
    chart, changed, perplexity = cumulative_charts(passes)
    assert [row.label for row in chart.rows] == ["fuse", "quantize-rtn", "quantize-head"]
    assert [figures(row.text) for row in chart.rows[1:]] == [[0.01], [0.02]]
    # Six decades from 1e-6 to 1: a bar of 0.01 takes four of them, the limits five and six.
    places = [row.place for row in chart.rows]
    assert places == pytest.approx([0, 100 * 4 / 6, 100 * 4.30103 / 6], abs=0.01)
    assert chart.limit == "M83.333 1 L83.333 2 L100 2 L100 3"
    assert "allowed in all: 1.00 at the end" in [key.text for key in chart.keys]
    assert [row.text for row in changed.rows[1:]] == ["1.0 %", "2.0 %"]
    assert changed.limit == "", "budgets judge decided tokens alone"
    assert [row.text for row in perplexity.rows[1:]] == ["+0.5 %", "+1.0 %"]
    found = write(tmp_path, make_manifest(passes=passes))
    hints = [text for text in found.texts["passes"].splitlines() if "quantize-rtn: 0.0100 of 0.100 allowed" in text]
    assert hints
    assert "Nothing to rewrite was found by idle." in found.texts["passes"]
    assert found.card("lost in all") == ("KL 0.0200", "98.0 % same most likely token")


def test_outputs_without_a_distribution_are_judged_by_their_error() -> None:
    drift = DriftRecord(max_abs_diff=1.0, relative_error=0.03, cosine=0.999)
    limit = AllowedRecord(relative_error=0.3)
    rows = [step("round", 0, 1.0, drift=drift, since_capture=drift, allowed=limit)]
    (chart,) = cumulative_charts(rows)
    assert chart.title == "Relative error of the outputs since the capture"
    assert chart.rows[0].hint == "round: 0.0300 of 0.300 allowed"


def test_two_programs_have_charts_of_their_own() -> None:
    rows = [step("fuse", 1e-4, program="encoder"), step("fuse", 1e-3)]
    assert [chart.title.partition(":")[0] for chart in cumulative_charts(rows)] == ["encoder", "decoder"]


def test_rounding_alone_has_no_chart(tmp_path: Path) -> None:
    assert cumulative_charts([step("fuse", 1e-12)]) == []
    found = write(tmp_path, make_manifest(passes=(step("fuse", 1e-12),)))
    assert "All of them keep the numbers" in found.texts["passes"]
    assert "lost in all" not in [label for _, label, _ in found.cards]
    rows = [figure for table in found.tables for row in table for figure in row if table[0][0] == "pass"]
    assert "0.0e+00" not in rows


def test_layers_of_the_passes_that_change_the_numbers() -> None:
    rows = [step("fuse", 0, layer_drift=(1e-6, 2e-6)), step("quantize", 0.1, 1.0, layer_drift=(0.1, 0.01))]
    chart = layer_chart(rows)
    assert chart is not None
    assert [(dot.x, dot.y) for dot in chart.dots] == [(25, 0), (75, 100)]
    assert chart.lines[0].path == "M25 0 L75 100"
    assert chart.note == "All other passes moved no layer by more than 2.0×10⁻⁶."
    assert [tick.text for tick in chart.x_ticks] == ["0", "1"]
    assert layer_chart([step("fuse", 0, layer_drift=(0.0, 0.0)), step("other", 0, layer_drift=())]) is None


def test_sizes_are_bars_of_one_scale(tmp_path: Path) -> None:
    parts = {"embedding": 3_000_000, "linears": 4_990_000, "rest": 10_000}
    sizes = Sizes(source=8_000_000, before=parts, tied=True, embedding=1_500_000, linears=400_000, scales=100_000)
    found = write(tmp_path, make_manifest(sizes=sizes, weight_bytes=2_000_000))
    assert found.card("weights as written") == ("2.00 MB", "0.25 x of 8.00 MB")
    bars = [
        (given["title"], float(figures(given["style"])[0])) for given in found.of_class("embedding") if "title" in given
    ]
    assert bars == [("embedding and head: 3.00 MB", 37.5), ("embedding and head: 1.50 MB", 18.75)]
    (table,) = (rows for rows in found.tables if rows[0][0] == "weights")
    assert table == [
        ["weights", "source", "artifact", "share"],
        ["embedding and head", "3.00 MB", "1.50 MB", "75.0 %"],
        ["linears", "4.99 MB", "400 kB", "20.0 %"],
        ["scales", "–", "100 kB", "5.0 %"],
        ["rest", "10.0 kB", "–", "–"],
    ]
    known = write(tmp_path, make_manifest(sizes=msgspec.structs.replace(sizes, before={})))
    assert [given["title"] for given in known.of_class("whole")] == ["all weights: 8.00 MB"]
    assert "sizes" not in write(tmp_path, make_manifest(sizes=None)).texts


QUALITY = {
    "tokens": 6144,
    "windows": 6,
    "window": 1024,
    "perplexity": 31.970123456789012,
    "perplexity_ci95": [30.1, 33.912345678901234],
    "reference_perplexity": 28.820000000000001,
    "kl": 0.09531234567890123,
    "top1_agreement": 0.7901234567,
    "top_k": None,
    "top_k_kl": None,
    "seconds": 3.1234567890123,
    "source": "examples/fiction-3m",
    "source_matches": True,
    "text": "book.txt",
    "tasks": {"lambada": {"acc": {"value": 0.31234567890123, "stderr": 0.0123456789}, "alias": "x"}},
    "sample": {
        "prompt": "It was",
        "artifact": " a dark night in May.",
        "source": " a dark night in June.",
        "tokens": 8,
        "same_tokens": 5,
    },
}


def rate(median: float) -> dict[str, Any]:
    return {"median": median, "ci95": [median * 0.987654321, median * 1.0123456789]}


def prompt(tokens: int, scale: float) -> dict[str, Any]:
    rates = {
        "ttft_ms": 12.3456789 * scale,
        "prefill_tokens_per_s": 5000.123 / scale,
        "decode_tokens_per_s": 1034.56789 / scale,
    }
    return {"prompt_tokens": tokens, "first_ttft_ms": 20.0, **{key: rate(value) for key, value in rates.items()}}


SPEED = {
    **prompt(64, 1),
    "prompts": [prompt(64, 1), prompt(256, 2)],
    "samples": 5,
    "batch": 1,
    "new_tokens": 64,
    "sampling": {"temperature": 0.0, "top_k": 0},
    "peak_rss_bytes": 512_345_678,
    "read_bytes_per_s": 12_345_678_901.23,
    "gpu": "",
    "weight_bytes": 2_460_000,
    "weight_read_limit_tokens_per_s": 5018.5678,
    "environment": {"cpu": "A Processor", "threads": 2, "versions": {"optc": "0.1.0"}},
    "a_new_figure": 0.123456789012345,
}


def test_quality_and_speed_are_cards_and_rows(tmp_path: Path) -> None:
    found = write(tmp_path, make_manifest(quality=QUALITY, speed=SPEED))
    assert found.card("perplexity") == ("31.97", "+10.93 % to the source's 28.82; 95 %: 30.10 to 33.91")
    assert found.card("KL divergence from the source") == ("0.0953", "nats per token")
    assert found.card("same most likely token") == ("79.01 %", "as the source")
    assert (
        "on book.txt, 6 windows of 1,024 predicted tokens, beside examples/fiction-3m, 3.1 s" in found.texts["quality"]
    )
    assert ["lambada", "acc", "0.3123", "± 0.0123"] in [row for table in found.tables for row in table]
    assert found.card("decode") == ("1,035 tokens/s", "behind a prompt of 64 tokens")
    (table,) = (rows for rows in found.tables if rows[0][0] == "prompt tokens")
    assert [row[0] for row in table] == ["prompt tokens", "64", "256"]
    assert table[2][1:] == ["24.7", "24.4 to 25.0", "2,500", "2,469 to 2,531", "517", "511 to 524", "20.0"]
    assert "medians of 5 samples · batch 1 · 64 new tokens · greedy · A Processor, 2 threads" in found.texts["speed"]
    assert ["a new figure", "0.1235"] in [row for table in found.tables for row in table], "nothing is left out"


def test_the_sample_stands_beside_the_sources(tmp_path: Path) -> None:
    text = " ".join(write(tmp_path, make_manifest(quality=QUALITY)).texts["quality"].split())
    assert "It was a dark night in June." in text
    assert "It was a dark night in May." in text
    assert "the first 5 of 8 tokens are the same" in text
    page = (tmp_path / "report.html").read_text()
    assert page.count("<mark> a dark night in </mark>") == 2
    alone = {**QUALITY, "sample": {"prompt": "It was", "artifact": " dark.", "source": None, "tokens": 2}}
    write(tmp_path, make_manifest(quality=alone))
    assert "<mark>" not in (tmp_path / "report.html").read_text()


def test_figures_of_another_form_are_left_out(tmp_path: Path) -> None:
    odd = {"perplexity": "low", "tasks": [1], "sample": {"prompt": 3}, "kl": True, "perplexity_ci95": [1], "rows": None}
    found = write(tmp_path, make_manifest(quality=odd, speed={"prompts": [3], "latency_ms": 2, "inputs": {"x": 1}}))
    assert not [
        label for _, label, _ in found.cards if label in ("perplexity", "KL divergence from the source", "decode")
    ]


def test_figures_of_a_classifier(tmp_path: Path) -> None:
    quality = {
        "beside": "bert",
        "batches": 2,
        "rows": 48,
        "accuracy": 0.75,
        "labelled": 48,
        "reference_accuracy": 0.8125,
    }
    quality |= {
        "relative_error": 0.0123456789,
        "cosine": 0.99987654321,
        "max_abs_diff": 0.1,
        "kl": 0.001,
        "top1": 0.9375,
    }
    speed = {
        "inputs": {"input_ids": ["int64", 8, 128]},
        "batch": 8,
        "samples": 50,
        "latency_ms": rate(3.21),
        "rows_per_s": rate(2492),
    }
    found = write(tmp_path, make_manifest(quality=quality, speed=speed))
    assert found.card("accuracy") == ("75.00 %", "the source: 81.25 %; on 48 labelled rows")
    assert found.card("same most likely class")[0] == "93.75 %"
    assert found.card("KL divergence from the source") == ("0.00100", "nats per row")
    assert found.card("latency of a call") == ("3.21 ms", "95 %: 3.17 to 3.25")
    assert "input_ids 8×128" in found.texts["speed"]


def test_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    plain = make_manifest()
    entry = plain.programs["model"]
    features = Input(name="features", role="input", dtype="float32", dims=("batch", 80))
    encoder = msgspec.structs.replace(entry.contract, kind="encoder", inputs=(features,))
    decoder = msgspec.structs.replace(entry.contract, cross=CrossFacts(start_token_id=0))
    programs = {
        "model": ProgramEntry(contract=decoder, engine_info={}),
        "encoder": ProgramEntry(contract=encoder, engine_info={}),
    }
    (tmp_path / "ir" / "encoder").mkdir(parents=True)
    (tmp_path / "ir" / "encoder" / "00-capture.txt").write_text("%0 of the encoder")
    found = write(tmp_path, msgspec.structs.replace(plain, programs=programs))
    assert found.card("programs")[0] == "encoder and decoder"
    assert ["features", "float32[batch, 80]", "input"] in [row for table in found.tables for row in table]
    assert "%0 of the encoder" in found.texts["stages"]
    assert "does not score" in found.texts["quality"], "no command is named that would be refused"
    assert "the model reads sounds" in found.texts["speed"]


EVIL = '<script>alert("x")</script>"><img src=x onerror=alert(1)>&lt;'


def test_nothing_of_a_file_is_markup(tmp_path: Path) -> None:
    plain = make_manifest()
    entry = plain.programs["model"]
    contract = msgspec.structs.replace(
        entry.contract,
        model=msgspec.structs.replace(entry.contract.model, architecture=EVIL),
        inputs=(msgspec.structs.replace(entry.contract.inputs[0], name=EVIL, dims=(EVIL,)),),
    )
    linear = {
        "name": f"layers.0.{EVIL}",
        "shape": (2, 2),
        "method": EVIL,
        "bits": 4,
        "group_size": 2,
        "symmetric": True,
    }
    linear |= {"weight_error": 0.1, "scale_min": 0.1, "scale_max": 0.1, "note": EVIL}
    linears = msgspec.convert([linear, {**linear, "name": f"layers.1.{EVIL}", "bits": 2}], tuple[LinearRecord, ...])
    record = step(EVIL, 0.1, 1.0, notes=(EVIL,), misses=(EVIL,), linears=linears, layer_drift=(0.1, 0.2))
    quality = {
        **QUALITY,
        "text": EVIL,
        "source": EVIL,
        "tasks": {EVIL: {EVIL: {"value": 1.0, "stderr": None}}},
        EVIL: EVIL,
    }
    quality["sample"] = {"prompt": EVIL, "artifact": EVIL, "source": EVIL + "y", "tokens": 1, "same_tokens": 0}
    speed = {**SPEED, "gpu": EVIL, "inputs": {EVIL: [EVIL, EVIL]}, EVIL: {EVIL: EVIL}}
    (tmp_path / "ir").mkdir()
    (tmp_path / "ir" / "00-capture.txt").write_text(EVIL)
    given = msgspec.structs.replace(
        plain,
        programs={"model": ProgramEntry(contract=contract, engine_info={EVIL: {EVIL: EVIL}})},
        source=msgspec.structs.replace(plain.source, path=f"/models/{EVIL}", dtype=EVIL),
        passes=(record, msgspec.structs.replace(record, matched=0, since_capture=None, drift=None)),
        quantization={**plain.quantization, "method": EVIL, "ideal": EVIL},
        needs={EVIL: EVIL},
        limits={EVIL: "unlimited"},
        command=EVIL,
        quality=quality,
        speed=speed,
        sizes=Sizes(source=10, linears=5),
    )
    found = write(tmp_path, given)
    assert "img" not in {tag for tag, _ in found.tags}
    assert len(found.scripts) == 1
    assert "alert" not in found.scripts[0]
    assert "<script>alert" not in (tmp_path / "report.html").read_text()
    assert EVIL in found.texts[""], "and it is shown as it is"
