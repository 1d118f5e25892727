"""Text sides compared: what each encoder makes of a caption, and how its map finds the images."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from copies import ROOT
from numpy.typing import NDArray
from safetensors.torch import save
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel

from dgs.data.prepared import load_prepared
from dgs.params import Params
from real.text_sides import minilm, ridge, text_sides, wordllama, words

TEXTS = ["a red cup", "a blue cup", "a red shoe", "a green shoe", "a blue ant"]
VOCABULARY = {"[PAD]": 0, "[UNK]": 1, "a": 2, "red": 3, "blue": 4, "cup": 5, "shoe": 6, "green": 7, "ant": 8}


@pytest.fixture
def tokenizer() -> bytes:
    made = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made.to_str().encode()


def test_words_are_those_of_training_alone() -> None:
    vectors = words(TEXTS[:2])(["a blue cup", "a green ant"])
    assert vectors.tolist() == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], "blue, cup, red; no word of one letter"


def test_wordllama_is_the_mean_of_a_texts_tokens(tokenizer: bytes) -> None:
    table = torch.randn(len(VOCABULARY), 4)
    vectors = wordllama(save({"embedding": table.half()}), tokenizer)
    assert np.allclose(vectors(["a red cup"])[0], table.half().float()[[2, 3, 5]].mean(0), atol=1e-6)


def test_minilm_is_the_mean_of_a_texts_own_tokens(tokenizer: bytes) -> None:
    """A longer neighbour in the batch pads a text, and changes nothing."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16,
    )  # fmt: skip
    model = BertModel(config).eval()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("config.json", json.dumps(config.to_dict()))
        opened.writestr("model.safetensors", save(model.state_dict()))
        opened.writestr("tokenizer.json", tokenizer)
    vectors = minilm(archive.getvalue())
    together = vectors(["red cup", "a blue cup a red shoe"])
    with torch.no_grad():
        mean = model(torch.tensor([[3, 5]])).last_hidden_state[0].mean(0)
    assert np.allclose(together[0], mean / mean.norm(), atol=1e-5)
    assert np.allclose(together[1:], vectors(["a blue cup a red shoe"]), atol=1e-5)


def test_a_ridge_finds_directions_that_are_linear_in_the_text() -> None:
    """Images whose features are a sum of their words': a text of a new combination lies nearest its own image."""
    captions = [f"{colour} {thing}" for colour in ("red", "blue", "green", "grey") for thing in ("cup", "shoe", "ant")]
    rng = np.random.default_rng(0)
    of_word = {word: rng.normal(size=16) for text in captions for word in text.split()}
    features = np.array([sum(of_word[word] for word in text.split()) for text in captions], np.float32)
    known = [number for number in range(12) if number % 4]  # three of each colour or two
    side = ridge(5.0 * features[known], [captions[number] for number in known], words(captions))
    found = side.encode(captions)
    assert np.allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-6)
    assert (found @ (features / np.linalg.norm(features, axis=1, keepdims=True)).T).argmax(0).tolist() == list(
        range(12)
    )


def test_every_side_is_asked_for_the_same_validation_captions(tiny: Params, tiny_prepared: Path) -> None:
    def length(texts: Sequence[str]) -> NDArray[np.float32]:
        return np.array([[len(text)] for text in texts], np.float32)

    rows = list(text_sides(tiny, ROOT, load_prepared(tiny_prepared, ROOT), {"length": length}))
    assert [row["text"] for row in rows] == ["own", "contrast", "ridge: words", "ridge: length"]
    assert len({(row["pool"], row["images"]) for row in rows}) == 1 and rows[0]["pool"] > 1
    rank = {row["text"]: row["r5"] for row in rows}
    assert rank["own"] > rank["ridge: length"], "CLIP's own text side knows these drawings, a text's length does not"
