"""The text side of CLIP: captions and prompts to embeddings, at their length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from dgs.model.clip import Clip

TEXTS = 256  # a batch


@torch.no_grad()
def embed_tokens(model: Any, tokens: Tensor) -> Tensor:
    """(B, context) tokens to (B, D) unnormalised embeddings: the text tower, cut to the longest text of the batch.

    Exact, since under the causal mask nothing before the end token sees what comes after it; another text tower than
    open_clip's causal one is run whole.
    """
    if not isinstance(model, open_clip.CLIP) or model.text_pool_type != "argmax" or model.attn_mask is None:
        return model.encode_text(tokens)
    tokens = tokens[:, : int(tokens.argmax(dim=1).max()) + 1]
    length = tokens.shape[1]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    x = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=1)]
    projection = model.text_projection
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection


@torch.no_grad()
def encode_texts(clip: Clip, texts: Sequence[str]) -> NDArray[np.float32]:
    """Unnormalised caption embeddings t of the frozen text tower: N texts to (N, D) float32."""
    device = next(clip.model.parameters()).device
    starts = range(0, len(texts), TEXTS)
    parts = [
        embed_tokens(clip.model, clip.tokenizer(list(texts[i : i + TEXTS])).to(device)).float().cpu().numpy()
        for i in tqdm(starts, desc="captions", unit="batch", disable=len(starts) < 2)
    ]
    return np.concatenate(parts).astype(np.float32)


def embed_captions(clip: Clip, manifest: pd.DataFrame) -> dict[str, NDArray[np.float32]]:
    """The (D,) embedding of every distinct caption of a manifest (columns split and caption).

    Captions of training and validation come first, in batches of their own: not even by rounding do their embeddings
    depend on test images.
    """
    learned = set(manifest.loc[manifest["split"] != "test", "caption"])
    embeddings: dict[str, NDArray[np.float32]] = {}
    for texts in filter(None, (sorted(learned), sorted(set(manifest["caption"]) - learned))):
        embeddings |= dict(zip(texts, encode_texts(clip, texts), strict=True))
    return embeddings


@torch.no_grad()
def encode_prompts(clip: Clip, prompts: dict[str, list[str]]) -> tuple[list[str], NDArray[np.float32]]:
    """Zero-shot class vectors: the unit-length mean of each value's unit-length prompt embeddings, (C, D)."""
    rows = []
    for texts in prompts.values():
        vectors = encode_texts(clip, texts)
        mean = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).mean(axis=0)
        rows.append(mean / np.linalg.norm(mean))
    return list(prompts), np.stack(rows).astype(np.float32)
