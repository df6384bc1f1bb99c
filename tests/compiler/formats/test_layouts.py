"""What is written, taken apart by readers that share no code with optc: from the layouts' documentation alone."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from families import make_model
from hf_folders import codes_of, config, logits, quantized, source, tensors, write
from safetensors.torch import save_file
from torch import Tensor

from optc.compiler.capture import capture_pretrained
from optc.compiler.diagnostics import InputError, TargetError
from optc.compiler.formats.layouts import QuantizedWeight, Scheme
from optc.compiler.formats.layouts.awq.writer import AwqWriter
from optc.compiler.formats.layouts.compressed_tensors.writer import CompressedTensorsWriter
from optc.compiler.formats.layouts.config import ConfigReader
from optc.compiler.formats.layouts.gptq.writer import GptqWriter
from optc.compiler.formats.layouts.registry import CHOICES, LAYOUTS, layout_writer
from optc.exporters.options.hf import FolderOptions

K_PROJ = "model.layers.1.self_attn.k_proj"
DOWN = "model.layers.0.mlp.down_proj"


def _parts(folder: Path, module: str) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(f"{module}."): tensor.numpy()
        for name, tensor in tensors(folder).items()
        if name.startswith(f"{module}.")
    }


def _awq_dense(parts: dict[str, np.ndarray], group: int) -> np.ndarray:
    """AutoAWQ's GEMM layout: 8 nibbles of a word are columns 0 2 4 6 1 3 5 7 of it; (q - z) * s, [K, N]."""

    def nibbles(words: np.ndarray) -> np.ndarray:
        out = np.zeros((words.shape[0], words.shape[1] * 8), dtype=np.int64)
        for row in range(words.shape[0]):
            for place in range(words.shape[1]):
                word = int(words[row, place]) & 0xFFFFFFFF
                for i, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                    out[row, place * 8 + column] = (word >> (4 * i)) & 15
        return out

    rows = np.arange(parts["qweight"].shape[0]) // group
    zero, scale = nibbles(parts["qzeros"])[rows], parts["scales"].astype(np.float64)[rows]
    return (nibbles(parts["qweight"]) - zero) * scale


def _gptq_dense(parts: dict[str, np.ndarray], bits: int, offset: int) -> np.ndarray:
    """GPTQ's layout: codes packed down the rows of [K, N], zero points along them, less `offset`; g_idx says the group."""
    weight, zeros = parts["qweight"], parts["qzeros"]
    count = weight.shape[0] * 32 // bits
    codes = np.zeros((count, weight.shape[1]), dtype=np.int64)
    for column in range(weight.shape[1]):
        row = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(weight[:, column]))
        codes[:, column] = [(row >> (bits * k)) & (2**bits - 1) for k in range(count)]
    zero = np.zeros((zeros.shape[0], weight.shape[1]), dtype=np.int64)
    for group in range(zeros.shape[0]):
        row = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(zeros[group]))
        zero[group] = [((row >> (bits * n)) & (2**bits - 1)) + offset for n in range(weight.shape[1])]
    index = parts["g_idx"]
    return (codes - zero[index]) * parts["scales"].astype(np.float64)[index]


def _dense(name: str, recipe: str, module: str, bits: int) -> np.ndarray:
    """The program's weight [K, N] by the definition of the canonical form."""
    table = codes_of(quantized(name, recipe, half=True))
    codes = table[f"{module}.weight_codes"].double()
    scale, zero = table[f"{module}.weight_scale"].double(), table.get(f"{module}.weight_zero")
    size = codes.shape[1] // scale.shape[1]
    middle = torch.tensor(2.0 ** (bits - 1)) if zero is None else zero.double().repeat_interleave(size, 1)
    return ((codes - middle) * scale.repeat_interleave(size, 1)).t().numpy()


@pytest.mark.parametrize("recipe", ["int4", "int4-asym"])
@pytest.mark.parametrize("module", [K_PROJ, DOWN])
def test_awq_by_an_independent_reader(tmp_path: Path, recipe: str, module: str) -> None:
    write(quantized("llama", recipe, half=True), source("llama"), tmp_path, "awq")
    parts = _parts(tmp_path, module)
    assert parts["scales"].dtype == np.float16
    assert np.array_equal(_awq_dense(parts, 32), _dense("llama", recipe, module, 4))
    settings = config(tmp_path)["quantization_config"]
    assert settings == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "lm_head": False,
        "modules_to_not_convert": ["lm_head"],
    }


def test_awq_nibble_order_by_hand() -> None:
    scheme = Scheme(bits=4, group_size=0, symmetric=True)
    codes = torch.arange(8, dtype=torch.uint8)[:, None]  # row n of [N, K] = [8, 1] has code n
    written = AwqWriter().tensors(QuantizedWeight(scheme, codes, torch.ones(8, 1)))
    assert hex(written["qweight"].item()) == "0x75316420"
    assert written["qzeros"].item() & 0xFFFFFFFF == 0x88888888


@pytest.mark.parametrize(("recipe", "layout"), [("int4", "gptq"), ("int4-asym", "gptq"), ("int4-channel", "gptq")])
def test_gptq_by_an_independent_reader(tmp_path: Path, recipe: str, layout: str) -> None:
    write(quantized("llama", recipe, half=True), source("llama"), tmp_path, layout)
    settings = config(tmp_path)["quantization_config"]
    offset = {"gptq": 1, "gptq_v2": 0}[settings["checkpoint_format"]]
    for module in (K_PROJ, DOWN):
        assert np.array_equal(_gptq_dense(_parts(tmp_path, module), 4, offset), _dense("llama", recipe, module, 4))
    assert settings["group_size"] == (-1 if recipe == "int4-channel" else 32)
    assert settings["sym"] is (recipe == "int4")
    assert settings["dynamic"] == {"-:^lm_head$": {}}


def _spread(folder: Path, kind: str) -> dict[str, np.ndarray]:
    """Give every linear of a folder groups of columns from all over it; returns the weights [K, N] by hand."""
    held, dense = tensors(folder), {}
    for place, name in enumerate(sorted(held)):
        module, _, last = name.rpartition(".")
        if last not in ("qweight", "weight_packed"):
            continue
        parts = _parts(folder, module)
        columns = parts["qweight"].shape[0] * 8 if kind == "gptq" else int(parts["weight_shape"][1])
        shared = 0 if module.endswith(("q_proj", "k_proj", "v_proj")) else place  # of one input, one order
        groups = (torch.randperm(columns, generator=torch.Generator().manual_seed(shared)) // 32).to(torch.int32)
        held[f"{module}.{'g_idx' if kind == 'gptq' else 'weight_g_idx'}"] = groups
        if kind == "gptq":
            dense[module] = _gptq_dense({**parts, "g_idx": groups.numpy()}, 4, 1)
        else:
            words = parts["weight_packed"].view(np.uint32)
            codes = np.stack([(words >> (4 * place)) & 15 for place in range(8)], 2).reshape(len(words), -1)
            dense[module] = ((codes - 8.0) * parts["weight_scale"][:, groups.numpy()]).T
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return dense


@pytest.mark.parametrize("kind", ["gptq", "compressed-tensors"])
def test_groups_of_columns_from_all_over_the_weight_are_read(tmp_path: Path, kind: str) -> None:
    """GPTQ's act-order, by transformers with the weights made by hand; no layout of ours writes them again."""
    write(quantized("llama", "int4", half=True), source("llama"), tmp_path / "a", kind)
    dense = _spread(tmp_path / "a", kind)
    model = make_model("llama")
    with torch.no_grad():
        for module, weight in dense.items():
            model.get_submodule(module).weight.copy_(torch.from_numpy(weight.T))
        ids = torch.arange(3, 27).reshape(2, 12)
        expected = model(ids).logits
    program, _ = capture_pretrained(tmp_path / "a")
    assert sum(node.target is torch.ops.aten.index_select.default for node in program.graph.nodes) == 10
    torch.testing.assert_close(logits(program, ids), expected, atol=1e-4, rtol=0)
    with pytest.raises(TargetError, match="act-order"):
        write(program, tmp_path / "a", tmp_path / "b", kind)


def test_gptq_symmetric_zero_points_are_sevens() -> None:
    scheme = Scheme(bits=4, group_size=0, symmetric=True)
    weight = QuantizedWeight(scheme, torch.zeros(8, 8, dtype=torch.uint8), torch.ones(8, 1))
    written = GptqWriter().tensors(weight)
    assert hex(written["qzeros"].item()) == "0x77777777"
    assert written["g_idx"].tolist() == [0] * 8


def test_gptq_with_a_zero_point_of_zero_is_written_as_v2() -> None:
    # Less one it would be -1: AutoGPTQ's readers wrap it to 0, vLLM's take 16.
    scheme = Scheme(bits=4, group_size=0, symmetric=False)
    zero = torch.tensor([[0], [3], [15], [8], [1], [2], [4], [5]], dtype=torch.uint8)
    weight = QuantizedWeight(scheme, torch.zeros(8, 8, dtype=torch.uint8), torch.ones(8, 1), zero)
    writer = layout_writer("gptq", [weight])
    assert writer.config({"m": scheme}, ["m"])["checkpoint_format"] == "gptq_v2"
    assert hex(writer.tensors(weight)["qzeros"].item()) == "0x54218f30"
    above = QuantizedWeight(scheme, weight.codes, weight.scale, zero + 1)
    assert layout_writer("gptq", [above]).config({"m": scheme}, ["m"])["checkpoint_format"] == "gptq"


@pytest.mark.parametrize("recipe", ["int4", "int4-asym", "int4-channel", "int8", "w8a8", "fp8", "fp8-weights"])
def test_compressed_tensors_by_its_own_library(tmp_path: Path, recipe: str) -> None:
    library = pytest.importorskip("compressed_tensors", reason="needs compressed-tensors (extra test-oracles)")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    program = quantized("qwen2", recipe)
    write(program, source("qwen2"), tmp_path)
    settings = QuantizationConfig.model_validate(config(tmp_path)["quantization_config"])
    scheme = settings.config_groups["group_0"]
    expected = {
        "int4": "pack-quantized",
        "int4-asym": "pack-quantized",
        "int4-channel": "pack-quantized",
        "int8": "pack-quantized",
        "w8a8": "int-quantized",
        "fp8": "float-quantized",
        "fp8-weights": "float-quantized",
    }[recipe]
    assert settings.format == expected, library.__version__
    stored, table = tensors(tmp_path), codes_of(program)
    for module in (K_PROJ, DOWN):
        state = {
            name.removeprefix(f"{module}."): tensor
            for name, tensor in stored.items()
            if name.startswith(f"{module}.weight")
        }
        dense = BaseCompressor.get_value_from_registry(expected).decompress(state, scheme)["weight"]
        assert torch.equal(dense, _canonical(table, module)), module


def _canonical(table: dict[str, Tensor], module: str) -> Tensor:
    codes, scale = table[f"{module}.weight_codes"], table[f"{module}.weight_scale"]
    zero = table.get(f"{module}.weight_zero")
    if codes.dtype == torch.float8_e4m3fn:
        return codes.float() * scale
    bits = 8 if int(codes.max()) > 15 else 4
    size = codes.shape[1] // scale.shape[1]
    middle = 2.0 ** (bits - 1) if zero is None else zero.float().repeat_interleave(size, 1)
    return (codes.float() - middle) * scale.repeat_interleave(size, 1)


def test_mixed_schemes_name_their_linears() -> None:
    schemes = {
        "a": Scheme(bits=4, group_size=32, symmetric=True),
        "b": Scheme(bits=8, group_size=0, symmetric=True, activations="int8"),
        "c": Scheme(bits=4, group_size=32, symmetric=True),
    }
    settings = CompressedTensorsWriter().config(schemes, ["a", "b", "c", "head"])
    assert settings["format"] == "mixed-precision"
    groups = settings["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["a", "c"], ["b"]]
    assert [group["format"] for group in groups.values()] == ["pack-quantized", "int-quantized"]
    assert settings["ignore"] == ["head"]
    with pytest.raises(TargetError, match="one setting for all linears") as caught:
        GptqWriter().config(schemes, [])
    assert "4 bits g32, 8 bits g0" in str(caught.value)


@pytest.mark.parametrize(
    ("writer", "scheme", "shape", "reason"),
    [
        (CompressedTensorsWriter(), Scheme(bits=3, group_size=0, symmetric=True), (8, 8), "3-bit weights"),
        (
            CompressedTensorsWriter(),
            Scheme(bits=8, group_size=4, symmetric=True, activations="int8"),
            (8, 8),
            "one scale per",
        ),
        (CompressedTensorsWriter(), Scheme(bits=8, group_size=4, symmetric=True, format="fp8"), (8, 8), "in groups"),
        (AwqWriter(), Scheme(bits=8, group_size=0, symmetric=True), (8, 8), "4-bit integer weights only"),
        (AwqWriter(), Scheme(bits=4, group_size=0, symmetric=True), (12, 8), "not a multiple of 8"),
        (GptqWriter(), Scheme(bits=3, group_size=0, symmetric=True), (32, 48), "multiples of 32"),
        (
            GptqWriter(),
            Scheme(bits=8, group_size=0, symmetric=True, activations="int8"),
            (8, 8),
            "with unquantized activations",
        ),
    ],
)
def test_what_a_layout_cannot_hold(writer, scheme: Scheme, shape: tuple[int, int], reason: str) -> None:
    groups = shape[1] // (scheme.group_size or shape[1])
    weight = QuantizedWeight(scheme, torch.zeros(shape, dtype=torch.uint8), torch.ones(shape[0], groups))
    assert reason in writer.obstacle(weight)


def test_scales_that_are_not_float16_are_refused() -> None:
    scheme = Scheme(bits=4, group_size=0, symmetric=True)
    weight = QuantizedWeight(scheme, torch.zeros(8, 8, dtype=torch.uint8), torch.full((8, 1), 0.1))
    assert "round-scales" in GptqWriter().obstacle(weight)
    weight = QuantizedWeight(scheme, weight.codes, weight.scale.half().float())
    assert GptqWriter().obstacle(weight) is None


def test_layouts_to_choose_from() -> None:
    """The option's type names those of the registry that belong to no target of their own."""
    schema = msgspec.json.schema(FolderOptions)["$defs"]["FolderOptions"]["properties"]["layout"]
    assert sorted(schema["anyOf"][0]["enum"]) == sorted(CHOICES)
    assert [name for name in LAYOUTS if name not in CHOICES] == ["modelopt", "bitsandbytes"]


@pytest.mark.parametrize("value", [1 << 63, -(1 << 63) - 1, 10**400])
def test_integers_of_a_config_fit_a_tensor(value: int) -> None:
    config = ConfigReader({"group_size": value, "bits": (1 << 63) - 1}, Path("config.json"))
    with pytest.raises(InputError, match="'group_size' is beyond 64 bits"):
        config.integer("group_size")
    assert config.integer("bits") == (1 << 63) - 1
