"""Tiny models of pictures with random weights, written as transformers writes them, with their processors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from once import once

LAYERS = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
CLASSES = {0: "cat", 1: "dog", 2: "boat", 3: "tree", 4: "sea", 5: "old man"}


def make_vit() -> Any:
    config = hf.ViTConfig(
        **LAYERS, image_size=24, patch_size=8, id2label=CLASSES, label2id={v: k for k, v in CLASSES.items()}
    )
    return hf.ViTForImageClassification(config)


def make_clip() -> Any:
    text = {**LAYERS, "vocab_size": 50, "max_position_embeddings": 12, "eos_token_id": 2}
    vision = {**LAYERS, "image_size": 16, "patch_size": 8}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def make_detr() -> Any:
    back = hf.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = hf.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=back, d_model=16,
        encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2,
        decoder_attention_heads=2, num_queries=3, num_labels=4,
    )  # fmt: skip
    return hf.DetrForObjectDetection(config)


def write_folder(folder: Path, make: Callable[[], Any], processor: Any = None) -> Any:
    """Save a model whose numbers are no accident of small weights, and its processor; returns the model."""
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.mul_(3.0)
        else:
            weight.add_(0.05 * torch.randn_like(weight))
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return model


def vit_folder() -> Path:
    """A ViT that names its classes, of pictures of 24 x 24 that its processor crops."""

    def make(folder: Path) -> None:
        size, crop = {"shortest_edge": 30}, {"height": 24, "width": 24}
        write_folder(folder, make_vit, hf.CLIPImageProcessorPil(size=size, crop_size=crop))

    return once("picture-vit", make)
