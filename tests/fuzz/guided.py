"""Coverage-guided fuzzing of the cheap readers, where atheris installs (github.com/google/atheris, on libFuzzer):

    python -m fuzz.guided Header --work /tmp/fuzz [libFuzzer's options, such as -max_total_time=60]

Inputs that fail are written by libFuzzer, and the process ends with them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader")
    parser.add_argument("--work", type=Path, required=True)
    options, rest = parser.parse_known_args()
    import atheris

    with atheris.instrument_imports(include=["optc.compiler", "optc.training", "optc.runtime", "yaml"]):
        from fuzz.readers import CHEAP, by_name
        from fuzz.seeds import Seeds

        reader = by_name(CHEAP)[options.reader](Seeds(options.work), options.work / "places" / options.reader)
        for name, data in reader.seed_inputs():
            reader.read_guarded(name, data)
    corpus = options.work / "guided" / options.reader
    corpus.mkdir(parents=True, exist_ok=True)
    names = sorted({name for name, _ in reader.seed_inputs()})
    for index, (name, data) in enumerate(reader.seed_inputs()):
        (corpus / f"seed-{index}").write_bytes(bytes([names.index(name)]) + data)

    def one(data: bytes) -> None:
        if data:
            reader.read_guarded(names[data[0] % len(names)], data[1:])

    atheris.Setup([sys.argv[0], *rest, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
