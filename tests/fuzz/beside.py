"""What is given beside a model: folders of draft models and Medusa heads, files of arrays, folders of datasets."""

from __future__ import annotations

import io
import json
import random
import shutil
import zipfile

from fuzz.mutations import blind, mutated, text_of
from fuzz.readers import Input, Reader, build_safetensors, mutated_safetensors
from fuzz.seeds import split_safetensors
from fuzz.whole import FolderReader


class Drafts(FolderReader):
    """Folders of EAGLE-3 draft models and of Medusa heads: config, hashes of the base, weights."""

    cost = 4.0

    def prepare(self) -> None:
        import torch
        from medusa_heads import write_heads

        from optc.compiler.model_folder.draft_origin import Origin
        from optc.compiler.model_folder.eagle3 import EMBEDDING, Eagle3Config, write_eagle3

        made = self.place / "made"
        shutil.rmtree(made, ignore_errors=True)
        write_heads(self.place / "made", 8, vocabulary=20, weights="a" * 64)
        self.copy_of(made, "heads")
        heads = self.sound
        config = Eagle3Config(
            hidden_size=8,
            intermediate_size=8,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            vocab_size=30,
            draft_vocab_size=20,
            boundaries=(0, 1, 2),
            norm_before_residual=True,
        )
        tensors = {name: torch.ones(shape) for name, shape in config.shapes().items()}
        origin = Origin(config="0" * 64, weights="a" * 64, tokenizer="")
        shutil.rmtree(made)
        made.mkdir()
        write_eagle3(made, config, {**tensors, EMBEDDING: torch.ones(30, 8)}, torch.arange(3, 23), origin)
        self.copy_of(made, "eagle3")
        self.sound = {name: data for name, data in {**heads, **self.sound}.items() if not name.startswith("made")}

    def make(self, rng: random.Random) -> Input:
        name = rng.choice(sorted(self.sound))
        data = self.sound[name]
        if name.endswith(".json"):
            return name, text_of(mutated(json.loads(data), rng), rng)
        header, weights = split_safetensors(data)
        if rng.random() < 0.3:
            return name, build_safetensors(header, blind(weights, rng)[: len(weights)].ljust(len(weights), b"\0"))
        return name, mutated_safetensors(header, weights, rng)

    def read(self, name: str, data: bytes) -> None:
        from optc.compiler.model_folder.eagle3 import Eagle3Folder, is_eagle3
        from optc.compiler.model_folder.medusa import MedusaFolder, heads_digest

        self.replace(name, data)
        if name.startswith("eagle3"):
            is_eagle3(self.place / "eagle3")
            Eagle3Folder.read(self.place / "eagle3")
        else:
            MedusaFolder.read(self.place / "heads")
            heads_digest(self.place / "heads")


class ArrayFile(Reader):
    """.npz and .npy: calibration of modules, and inputs of `optc run`."""

    cost = 3.0

    def prepare(self) -> None:
        import numpy as np

        buffer = io.BytesIO()
        np.save(buffer, np.ones((2, 4), np.float32))
        self._array = buffer.getvalue()

    def make(self, rng: random.Random) -> Input:
        array = blind(self._array, rng, end=100) if rng.random() < 0.7 else self._array
        if rng.random() < 0.3:
            return "inputs.npy", array
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as file:
            file.writestr(rng.choice(("x.npy", "x.npy", "x", "labels.npy", "../x.npy")), array)
        data = packed.getvalue()
        return "inputs.npz", blind(data, rng) if rng.random() < 0.4 else data

    def read(self, name: str, data: bytes) -> None:
        from optc.compiler.ir.contract import Contract, Input, Output
        from optc.runtime.measuring.tensors import read_batches
        from optc.runtime.sessions.tensor_model import checked_inputs

        spec = Input(name="x", role="input", dtype="float32", dims=("batch", 4))
        contract = Contract(kind="module", inputs=(spec,), outputs=(Output(name="y", role="output"),))
        for batch in read_batches(self.write(name, data), contract):
            checked_inputs(contract, batch.inputs)


class DatasetFolder(FolderReader):
    """Folders of `datasets.save_to_disk`: what they say of themselves, and their rows in Arrow's format."""

    cost = 20.0
    packages = ("datasets", "pyarrow")

    def prepare(self) -> None:
        import datasets

        datasets.disable_progress_bars()
        made = self.place / "made"
        rows = {"texts": [{"text": "hello world"}, {"text": None}], "tokens": [{"tokens": [1, 2, 3]}, {"tokens": []}]}
        found: dict[str, bytes] = {}
        for name, items in rows.items():
            shutil.rmtree(made, ignore_errors=True)
            datasets.Dataset.from_list(items).save_to_disk(made)
            self.copy_of(made, name)
            found |= {key: data for key, data in self.sound.items() if key.startswith(f"{name}/")}
        self.sound = found

    def make(self, rng: random.Random) -> Input:
        name = rng.choice(sorted(self.sound))
        data = self.sound[name]
        if name.endswith(".json") and rng.random() < 0.6:
            return name, text_of(mutated(json.loads(data), rng), rng)
        return name, blind(data, rng)

    def read(self, name: str, data: bytes) -> None:
        from optc.compiler.calibration.documents import read_documents

        self.replace(name, data)
        read_documents(self.place / name.partition("/")[0], _Letters())


class _Letters:
    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 128 for letter in text[:1000]]
