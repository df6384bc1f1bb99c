"""Types of the zoo whose answers are not tokens: models of pictures, and heads of text models with classes or several answers.

Each is held to its own eager forward in all tensors that it gives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from zoo_models import SPECIAL, Kind, build_of, tiny_config

EDGE = 32
"""Pixels of a picture's height and width."""

_VIT: dict[str, Any] = {
    "image_size": EDGE, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "num_labels": 5,
}  # fmt: skip
_TOWERS: dict[str, Any] = {
    "text_config": {**_VIT, "vocab_size": 99, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1},
    "vision_config": _VIT,
    "projection_dim": 16,
}
_STAGES: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 5}
_RESNET: dict[str, Any] = {**_STAGES, "embedding_size": 8, "layer_type": "basic"}
_SWIN: dict[str, Any] = {
    "image_size": EDGE, "patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4,
    "num_labels": 5,
}  # fmt: skip
_DETR: dict[str, Any] = {
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "d_model": 16, "encoder_layers": 1,
    "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "num_queries": 3, "num_labels": 4,
}  # fmt: skip
_SEGFORMER: dict[str, Any] = {
    "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "decoder_hidden_size": 16, "num_attention_heads": [1, 1, 2, 2],
    "num_labels": 5,
}  # fmt: skip

PICTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "beit": ("BeitForImageClassification", _VIT),
    "clip": ("CLIPModel", _TOWERS),
    "convnext": ("ConvNextForImageClassification", _STAGES | {"num_stages": 2}),
    "convnextv2": ("ConvNextV2ForImageClassification", _STAGES | {"num_stages": 2}),
    "deit": ("DeiTForImageClassification", _VIT),
    "detr": (
        "DetrForObjectDetection",
        _DETR | {"backbone_config": {"model_type": "resnet", **_RESNET, "out_features": ["stage2"]}},
    ),
    "dinov2": ("Dinov2ForImageClassification", _VIT),
    "dinov2_with_registers": ("Dinov2WithRegistersForImageClassification", _VIT),
    "mobilevit": (
        "MobileViTForImageClassification",
        {
            "image_size": EDGE, "hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 16],
            "num_attention_heads": 2,
        },
    ),
    "poolformer": (
        "PoolFormerForImageClassification",
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "num_labels": 5},
    ),
    "regnet": ("RegNetForImageClassification", _STAGES | {"embedding_size": 8, "groups_width": 8}),
    "resnet": ("ResNetForImageClassification", _RESNET),
    "segformer": ("SegformerForSemanticSegmentation", _SEGFORMER),
    "siglip": ("SiglipModel", _TOWERS),
    "swin": ("SwinForImageClassification", _SWIN),
    "swinv2": ("Swinv2ForImageClassification", _SWIN),
    "vit": ("ViTForImageClassification", _VIT),
    "yolos": ("YolosForObjectDetection", _VIT | {"image_size": [EDGE, EDGE], "num_detection_tokens": 3}),
}  # fmt: skip
"""Class and sizes of each type. MobileNetV2 is left out: in its 52 layers of random weights float32 itself is off by 1.6e-4 of
the largest output."""

ANSWERS = {
    "albert": "AlbertForSequenceClassification",
    "bert": "BertForQuestionAnswering",
    "deberta-v2": "DebertaV2ForQuestionAnswering",
    "distilbert": "DistilBertForTokenClassification",
    "electra": "ElectraForTokenClassification",
    "mobilebert": "MobileBertForQuestionAnswering",
    "modernbert": "ModernBertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "xlm-roberta": "XLMRobertaForQuestionAnswering",
}
"""Class of each type; they are as small as the text models."""


def other_kinds() -> list[Kind]:
    """The types whose answers are not tokens."""
    return [Kind("picture", name, cls) for name, (cls, _) in PICTURES.items()] + [
        Kind("answers", name, cls) for name, cls in ANSWERS.items()
    ]


Calls = list[tuple[dict[str, Tensor], dict[str, Tensor]]]
"""Inputs of a call, and what the model answers."""


def answered(kind: Kind, folder: Path) -> Calls:
    """Write the model's folder, and call what transformers reads from it: with several rows, and with one."""
    import transformers
    from transformers import CONFIG_MAPPING

    if kind.head == "picture":
        config = CONFIG_MAPPING[kind.type](**PICTURES[kind.type][1])
    else:
        config = tiny_config(CONFIG_MAPPING[kind.type], SPECIAL.get(kind.type, {}))
    made = build_of(kind, config)
    if kind.head == "picture":
        _learn_statistics(made)
    made.save_pretrained(folder)
    if kind.head == "picture":
        size = {"size": {"height": EDGE, "width": EDGE}}
        (folder / "preprocessor_config.json").write_text(json.dumps(size))
    model = getattr(transformers, kind.architecture).from_pretrained(folder, attn_implementation="eager")
    model = model.float().eval().requires_grad_(False)
    calls = []
    for rows in (3, 1):
        inputs = _inputs(model, kind, rows)
        with torch.no_grad():
            out = model(**inputs, return_dict=True)
        calls.append((inputs, {name: item for name, item in out.items() if isinstance(item, Tensor)}))
    return calls


def _learn_statistics(model: Any) -> None:
    """Give norms of batches the statistics of some pictures, as training does. With those of a fresh model, activations grow
    from layer to layer, and float32 itself is off by 4e-4 in 50 of them."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        norm.momentum = None  # the mean of all batches: of one here
    pictures = torch.randn(16, 3, EDGE, EDGE, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        model.train()(pixel_values=pictures)
    model.eval()


def _inputs(model: Any, kind: Kind, rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    inputs: dict[str, Tensor] = {}
    if kind.head == "answers" or hasattr(model.config, "text_config"):
        ids = torch.randint(3, 90, (rows, 11), generator=generator)
        mask = torch.ones_like(ids)
        if rows > 1:
            mask[1, 6:] = 0
            ids[1, 6:] = 0
        ids[:, 5] = 2
        inputs |= {"input_ids": ids, "attention_mask": mask}
    if kind.head == "picture":
        inputs["pixel_values"] = torch.randn(max(1, rows - 1), 3, EDGE, EDGE, generator=generator)
    return inputs


def pairs(contract: Any, run: Callable[..., Sequence[Tensor]], calls: Calls) -> list[tuple[Tensor, Tensor]]:
    """Each output of a program beside what the model answered; padded tokens are left out."""
    found = []
    for given, wanted in calls:
        inputs = {"token_type_ids": torch.zeros_like(given["input_ids"])} if "input_ids" in given else {}
        inputs |= given
        with torch.no_grad():
            outputs = run(*(inputs[spec.name] for spec in contract.inputs))
        keep = given["attention_mask"].bool() if "attention_mask" in given else None
        for spec, output in zip(contract.outputs, outputs, strict=True):
            truth = wanted[spec.name]
            by_token = keep is not None and output.shape[:2] == keep.shape
            found.append((output[keep], truth[keep]) if by_token else (output, truth))
    return found
