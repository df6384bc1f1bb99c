"""The sequential part of GPTQ: a block of columns, rounded one after the other."""
