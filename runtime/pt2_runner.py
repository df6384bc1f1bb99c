"""The loader that `inductor-cpu` artifacts carry, importable: `open_folder("out/model")(ids, mask)`."""

from optc.runtime.carried.pt2_runner import open_folder

__all__ = ["open_folder"]
