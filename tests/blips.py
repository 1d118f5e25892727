"""A small random BLIP on disk, of the same classes and files as the real one."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

WORDS = ("a", "the", "red", "blue", "old", "small", "dog", "cat", "boat", "car", "tree", "lake", "on", "in", "near")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")


def write_random_blip(folder: Path, seed: int = 0, size: int = 32) -> Path:
    """Save a random BLIP whose captions differ from image to image: two layers a tower, width 32, a word a token."""
    folder.mkdir(parents=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join([*SPECIAL, *WORDS]) + "\n", encoding="utf-8")
    tokenizer = BertTokenizerFast(str(vocabulary), bos_token="[DEC]")
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "projection_dim": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.4,
    }
    text = {
        "vocab_size": len(tokenizer),
        "encoder_hidden_size": 32,
        "max_position_embeddings": 64,
        "bos_token_id": tokenizer.convert_tokens_to_ids("[DEC]"),
        "eos_token_id": tokenizer.convert_tokens_to_ids("[SEP]"),
        "sep_token_id": tokenizer.convert_tokens_to_ids("[SEP]"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("[PAD]"),
    }
    torch.manual_seed(seed)
    config = BlipConfig(text_config={**tower, **text}, vision_config={**tower, "image_size": size, "patch_size": 8})
    BlipForConditionalGeneration(config).eval().save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": size, "width": size}), tokenizer).save_pretrained(folder)
    return folder
