"""One session per engine: prefill, decode, extend, rewind, score."""
