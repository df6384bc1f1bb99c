from pathlib import Path

import numpy as np
import pytest
import torch

from optc.compiler.formats.layouts import words as layout_words
from optc.compiler.formats.layouts.words import pack_words, unpack_words, word_count
from optc.compiler.ir.stored_weights import WorkFile


def _codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns + bits)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


def test_four_bits_by_hand() -> None:
    words = pack_words(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15, 9]], dtype=torch.uint8), 4)
    assert [hex(word & 0xFFFFFFFF) for word in words[0].tolist()] == ["0xf7654321", "0x9"]
    assert words.dtype == torch.int32


def test_three_bits_cross_words_as_gptq_does() -> None:
    # The three words of 32 3-bit values in AutoGPTQ's pack(): value 10 lies in words 0 and 1, value 21 in 1 and 2.
    values = _codes(1, 32, 3)[0].numpy().astype(np.uint32)
    words = np.zeros(3, dtype=np.uint32)
    for j in range(10):
        words[0] |= values[j] << np.uint32(3 * j)
    words[0] |= values[10] << np.uint32(30)
    words[1] |= (values[10] >> np.uint32(2)) & np.uint32(1)
    for j in range(10):
        words[1] |= values[11 + j] << np.uint32(3 * j + 1)
    words[1] |= values[21] << np.uint32(31)
    words[2] |= (values[21] >> np.uint32(1)) & np.uint32(3)
    for j in range(10):
        words[2] |= values[22 + j] << np.uint32(3 * j + 2)
    packed = pack_words(torch.from_numpy(values.astype(np.uint8))[None], 3)
    assert packed[0].tolist() == words.view(np.int32).tolist()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (5, 64), (300, 33)])
def test_round_trip(bits: int, shape: tuple[int, int]) -> None:
    codes = _codes(*shape, bits)
    words = pack_words(codes, bits)
    assert words.shape == (shape[0], word_count(shape[1], bits))
    assert torch.equal(unpack_words(words, bits, shape[1]), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(3, 31), (5, 64)])
def test_as_compressed_tensors_packs(bits: int, shape: tuple[int, int]) -> None:
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers",
        reason="needs compressed-tensors (extra test-oracles)",
    )
    codes = _codes(*shape, bits)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack_words(codes, bits), helpers.pack_to_int32(signed, bits))
    assert torch.equal(unpack_words(helpers.pack_to_int32(signed, bits), bits, shape[1]), codes)
    along_rows = pack_words(codes.t().contiguous(), bits).t().contiguous()
    assert torch.equal(along_rows, helpers.pack_to_int32(signed, bits, packed_dim=0))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rows_of_several_blocks(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = _codes(11, 37, bits)
    words = pack_words(codes, bits)
    monkeypatch.setattr(layout_words, "_CODES", 100)  # two rows and a rest
    assert torch.equal(pack_words(codes, bits), words)
    assert torch.equal(unpack_words(words, bits, 37), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rows_that_begin_anywhere_in_memory(bits: int) -> None:
    codes = _codes(9, 33, bits)
    assert torch.equal(pack_words(codes[1:], bits), pack_words(codes[1:].clone(), bits))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_strides_of_axes_of_one_element_say_nothing(bits: int) -> None:
    column, row = _codes(6, 1, bits), _codes(1, 8, bits)
    odd = torch.as_strided(row.clone(), (1, 8), (3, 1)), torch.as_strided(column.clone(), (6, 1), (1, 5))
    for codes, same in zip(odd, (row, column), strict=True):
        assert codes.is_contiguous()
        words = pack_words(codes, bits)
        assert torch.equal(words, pack_words(same, bits))
        assert torch.equal(unpack_words(words, bits, codes.shape[1]), codes)
    words = pack_words(column, bits)
    assert torch.equal(unpack_words(torch.as_strided(words, (6, 1), (1, 5)), bits, 1), column)


def test_codes_that_lie_in_a_file(tmp_path: Path) -> None:
    codes = _codes(300, 512, 4)
    stored = WorkFile(tmp_path).store(codes)
    assert type(stored) is not torch.Tensor
    assert torch.equal(pack_words(stored, 4), pack_words(codes, 4))


def test_a_code_that_does_not_fit() -> None:
    with pytest.raises(AssertionError, match="does not fit"):
        pack_words(torch.tensor([[1, 16]], dtype=torch.uint8), 4)
