"""Folders of models that read pictures, as users compile and run them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from command_line import optc as call
from once import once
from picture_folders import CLASSES, make_clip, make_detr, vit_folder, write_folder
from PIL import Image

import optc
from optc.compiler.diagnostics import CaptureError, InputError
from optc.compiler.model_folder.pictures import class_names, picture_size


@pytest.fixture(scope="module")
def artifact() -> Path:
    """The ViT for onnx-cpu."""
    return (
        once("picture-vit-onnx", lambda place: optc.compile(vit_folder(), target="onnx-cpu", output=place / "out"))
        / "out"
    )


def _picture(path: Path, size: tuple[int, int] = (50, 37), mode: str = "RGB") -> Path:
    noise = np.random.default_rng(3).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    return path


def test_a_picture_is_read_as_its_processor_reads_it(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = vit_folder()
    path = _picture(tmp_path / "p.png", mode="RGBA")
    model = hf.ViTForImageClassification.from_pretrained(source)
    pixels = hf.AutoImageProcessor.from_pretrained(source)(images=[Image.open(path)], return_tensors="pt")
    assert list(pixels["pixel_values"].shape) == [1, 3, 24, 24]
    with torch.no_grad():
        logits = model(**pixels).logits[0]
    assert call("run", artifact, "--inputs", path, "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["outputs"]
    np.testing.assert_allclose(row["values"][0], logits, atol=1e-4 * float(logits.abs().max()))
    best = logits.softmax(-1).sort(descending=True)
    assert [item["label"] for item in row["classes"][0]] == [CLASSES[int(index)] for index in best.indices[:5]]
    np.testing.assert_allclose([item["score"] for item in row["classes"][0]], best.values[:5], atol=1e-4)
    assert call("run", artifact, "--inputs", path) == 0
    assert f"\n  {CLASSES[int(best.indices[0])]} 0." in capsys.readouterr().out


@pytest.mark.slow
def test_the_same_in_a_package(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For inductor-cpu: classes and their names, from a picture that its own processor reads."""
    assert call("compile", vit_folder(), "--target", "inductor-cpu", "-o", tmp_path / "out") == 0
    path = _picture(tmp_path / "p.png", mode="RGBA")
    found = []
    for folder in (artifact, tmp_path / "out"):
        capsys.readouterr()
        assert call("run", folder, "--inputs", path, "--json") == 0
        found += json.loads(capsys.readouterr().out)["outputs"]
    np.testing.assert_allclose(found[1]["values"], found[0]["values"], atol=1e-4)
    assert [item["label"] for item in found[1]["classes"][0]] == [item["label"] for item in found[0]["classes"][0]]


def test_a_folder_of_pictures_beside_the_source(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        _picture(tmp_path / f"{number}.jpg", (40 + number, 33))
    np.save(tmp_path / "many.npy", np.zeros((2, 3, 24, 24), np.float32))
    (tmp_path / "notes.txt").write_text("no input")
    assert call("eval", artifact, "--inputs", tmp_path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["batches"], found["rows"], found["top1"]) == (4, 5, 1.0)
    assert found["relative_error"] < 1e-4
    assert found["beside"] == str(vit_folder())


@pytest.mark.parametrize(
    ("size", "text"),
    [((2000, 10), "edges in a ratio of at most 32"), ((9000, 9000), "has 9000 x 9000 pixels")],
)
def test_pictures_of_other_shapes_are_refused(
    artifact: Path, tmp_path: Path, size: tuple[int, int], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("1", size).save(tmp_path / "p.png")
    assert call("run", artifact, "--inputs", tmp_path / "p.png") == 3
    assert text in capsys.readouterr().err


def test_what_is_no_picture_is_refused(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.png").write_bytes(b"GIF89a not a picture")
    assert call("run", artifact, "--inputs", tmp_path / "p.png") == 3
    assert "the picture cannot be read" in capsys.readouterr().err


def test_boxes_come_beside_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A processor that keeps the shape of pictures: the capture is for a square, other shapes are refused."""
    processor = hf.DetrImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64})
    model = write_folder(tmp_path / "detr", make_detr, processor)
    assert call("compile", tmp_path / "detr", "--target", "onnx-cpu", "-o", tmp_path / "out") == 0
    opened = optc.load(tmp_path / "out")
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    wanted, found = model(pixel_values=pixels), opened.run({"pixel_values": pixels.numpy()})
    assert list(found) == ["logits", "pred_boxes", "last_hidden_state", "encoder_last_hidden_state"]
    for name, array in found.items():
        np.testing.assert_allclose(array, wanted[name], atol=1e-4 * float(wanted[name].abs().max()))
    assert opened.manifest.contract.outputs[0].role == "classes"
    capsys.readouterr()
    assert call("run", tmp_path / "out", "--inputs", _picture(tmp_path / "p.png", (60, 40))) == 3
    assert "it was captured for one size" in capsys.readouterr().err
    (tmp_path / "square").mkdir()
    _picture(tmp_path / "square" / "q.png", (40, 40))
    capsys.readouterr()
    assert call("eval", tmp_path / "out", "--inputs", tmp_path / "square", "--json") == 0
    assert json.loads(capsys.readouterr().out)["relative_error"] < 1e-4


def test_pictures_are_compared_with_texts_of_another_number(tmp_path: Path) -> None:
    model = write_folder(tmp_path / "clip", make_clip)
    optc.compile(tmp_path / "clip", target="onnx-cpu", output=tmp_path / "out")
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 50, (3, 9), generator=generator)
    ids[:, 6], mask = 2, torch.ones_like(ids)
    mask[1, 7:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    found = optc.load(tmp_path / "out").run({name: item.numpy() for name, item in inputs.items()})
    assert found["logits_per_image"].shape == (2, 3)
    wanted = model(**inputs)
    for name in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-4 * float(wanted[name].abs().max()))


def test_sizes_come_from_processor_or_config(tmp_path: Path) -> None:
    def written(settings: object, config: dict[str, object]) -> tuple[int, int]:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        return picture_size(tmp_path, config)

    crop = {"do_center_crop": True, "size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 24}}
    assert written(crop, {"image_size": 99}) == (32, 24)
    assert written({**crop, "do_center_crop": False}, {"image_size": 99}) == (99, 99)
    assert written({**crop, "do_center_crop": False}, {}) == (40, 40)
    assert written({"size": 12}, {}) == (12, 12)
    assert written({}, {"vision_config": {"image_size": [8, 16]}}) == (8, 16)
    with pytest.raises(CaptureError, match="nothing says how large the pictures are"):
        written({}, {})
    for size in (0, -1, 10**6, 1.5, "many", {"height": 2**70}, True):
        with pytest.raises(InputError, match="the image processor's size is unusable"):
            written({"size": size}, {})
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"image_processor": {"size": {"height": 5, "width": 6}}})
    )
    assert picture_size(tmp_path, {}) == (5, 6)


def test_names_of_classes_are_read_as_a_stranger_wrote_them() -> None:
    assert class_names({"id2label": {"0": "a", "1": 7, "x": "b", "2": "c"}}) == {0: "a", 2: "c"}
    assert class_names({"id2label": ["a"]}) == {}


def test_what_reads_no_text_takes_no_text(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", artifact, "--prompt", "a cat") == 3
    assert "the model takes no text" in capsys.readouterr().err


def test_plans_know_the_sizes(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", vit_folder(), "--target", "onnx-cpu", "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["sizes"]["linears"] == optc.load(artifact).manifest.sizes.linears


def test_a_folder_for_transformers_is_read_back(tmp_path: Path) -> None:
    written = optc.compile(
        vit_folder(), target="vllm", output=tmp_path / "out", quant="rtn", bits=8, max_relative_error=0.1
    )
    assert written.manifest.opened is not None
    assert written.manifest.opened.opened
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
