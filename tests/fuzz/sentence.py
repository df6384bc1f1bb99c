"""Folders of sentence-transformers: modules.json, the settings of its modules, and their weights."""

from __future__ import annotations

import random
import shutil

import msgspec
from fuzz.readers import Input
from fuzz.whole import FolderReader, mutated_file


class SentenceFolder(FolderReader):
    """The modules behind a model, to the steps that are captured; the model itself is what `Folder` reads."""

    cost = 3.0

    def prepare(self) -> None:
        from sentence_folders import MEAN, TANH, WIDTH, write_sentence_folder

        shutil.rmtree(self.place / "made", ignore_errors=True)
        dense = {"in_features": WIDTH, "out_features": 8, "bias": True, "activation_function": TANH}
        write_sentence_folder(
            self.place / "made",
            [MEAN[0], ("Dense", dense), ("Normalize", {"module_input_name": "sentence_embedding"})],
            settings={"max_seq_length": 9, "do_lower_case": True, "model_args": {"dtype": "float16"}},
            prompts={"prompts": {"query": "q: "}, "default_prompt_name": "query", "model_type": "SentenceTransformer"},
        )
        (self.place / "made" / "model.safetensors").unlink()
        self.copy_of(self.place / "made", "read")
        own = ("modules.json", "sentence_", "config_sentence_", "tokenizer_config", "1_", "2_", "3_")
        self._names = [name for name in self.sound if name.startswith(tuple(f"read/{start}" for start in own))]

    def make(self, rng: random.Random) -> Input:
        name = rng.choice(self._names)
        return name, mutated_file(name, self.sound[name], rng)

    def read(self, name: str, data: bytes) -> None:
        from optc.compiler.model_folder.sentence import modules_behind, sentence_modules

        self.replace(name, data)
        folder = self.place / "read"
        modules_behind(folder)
        found = sentence_modules(folder)
        if found is not None:
            msgspec.json.encode(found.facts(8))  # a manifest holds them
