"""bitsandbytes folders: linears in 4 bits (NF4, FP4), as transformers writes them. They are read, not written.

Source: github.com/bitsandbytes-foundation/bitsandbytes, `QuantState.as_dict` and `functional.quantize_4bit`. Of a linear M
with weight [N, K], whose elements are taken row by row in blocks of 64 or more:

    M.weight                uint8 [N * K / 2, 1], element 2i in the high nibble: codes of `quant_map`
    M.weight.quant_map      float32 [16]: what a code stands for
    M.weight.absmax         float32 [blocks], by which a block is multiplied; double quantization: uint8 codes of
                            M.weight.nested_quant_map float32 [256], multiplied by M.weight.nested_absmax float32
                            [blocks / 256], to which the offset of the state is added
    M.weight.quant_state.bitsandbytes__nf4    uint8, JSON: quant_type, blocksize, shape, dtype; nested_blocksize,
                            nested_dtype, nested_offset
"""

METHOD = "bitsandbytes"
STATE = "quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
