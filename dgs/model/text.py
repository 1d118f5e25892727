"""What embeds captions and prompts: CLIP's own text tower, one aligned to its image tower, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from dgs.data.manifest import ImageSource
from dgs.data.prepared import text_sentence
from dgs.model.aligned import AlignedText, aligned_text
from dgs.model.clip import Clip, load_clip
from dgs.params import Params
from dgs.workspace import Workspace

TEXTS = 256  # a batch
ALIGNED = "text.safetensors"  # in a prepare stage's output
Encode = Callable[[Sequence[str]], NDArray[np.float32]]  # N texts to (N, D) unnormalised embeddings


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


@dataclass(frozen=True)
class TextSide:
    """What embeds captions.

    clip: whose image tower it goes with; with its text tower only if that is it.
    about: what prepared data say of it: {"side": "own", "aligned" or "none"}, and what `aligned` knows of itself.
    aligned: the trained tower, if it is one.
    """

    clip: Clip
    encode: Encode
    about: dict[str, Any]
    aligned: AlignedText | None = None

    def __str__(self) -> str:
        return text_sentence(self.about)

    @property
    def facts(self) -> dict[str, Any]:
        """What is noted of CLIP and of it beside prepared data."""
        return {**self.clip.identity, "text": self.about}

    def embed(
        self, manifest: pd.DataFrame, prompts: dict[str, dict[str, list[str]]]
    ) -> tuple[dict[str, NDArray[np.float32]], dict[str, tuple[list[str], NDArray[np.float32]]]]:
        """(`embed_captions`, `encode_prompts` of each attribute)."""
        captions = embed_captions(self.encode, manifest)
        return captions, {name: encode_prompts(self.encode, texts) for name, texts in prompts.items()}

    def save(self, folder: Path) -> None:
        """Keep an aligned tower among prepared data, for captions that are asked about later."""
        if self.aligned is not None:
            self.aligned.save(folder / ALIGNED, self.about)


def open_text_side(
    params: Params,
    workspace: Workspace,
    manifest: pd.DataFrame,
    source: ImageSource,
    patches: dict[str, NDArray[np.int32]] | None,
) -> TextSide:
    """The text side that model.text asks for; an aligned one is trained, or found where an earlier run kept it.

    Args:
        manifest: of which an aligned one sees training and validation images alone.

    Raises:
        UserError: as `load_clip`; fewer than two captions to align a text tower by.
    """
    side = params.model.text
    clip = load_clip(params.model, workspace.root, params.image_size, text=side == "own")
    if side != "aligned":
        return TextSide(clip, partial(encode_texts, clip) if side == "own" else no_text, {"side": side})
    text, known = aligned_text(clip, manifest, source, params, patches, workspace.kept("text"))
    return TextSide(clip, text.encode, {"side": side, **known}, text)


def reopen_text_side(params: Params, root: Path, folder: Path) -> Encode:
    """What embedded the captions that were prepared in `folder`; `root`: as in `load_clip`."""
    if params.model.text == "aligned":
        return AlignedText.load(folder / ALIGNED)[0].encode
    if params.model.text == "none":
        return no_text
    return partial(encode_texts, load_clip(params.model, root, params.image_size))


def no_text(texts: Sequence[str]) -> NDArray[np.float32]:
    """Embeddings without a text side: (N, 0)."""
    return np.zeros((len(texts), 0), np.float32)


def embed_captions(encode: Encode, manifest: pd.DataFrame) -> dict[str, NDArray[np.float32]]:
    """The (D,) embedding of every distinct caption of a manifest (columns split and caption).

    Captions of training and validation come first, in batches of their own: not even by rounding do their embeddings
    depend on test images.
    """
    learned = set(manifest.loc[manifest["split"] != "test", "caption"])
    embeddings: dict[str, NDArray[np.float32]] = {}
    for texts in filter(None, (sorted(learned), sorted(set(manifest["caption"]) - learned))):
        embeddings |= dict(zip(texts, encode(texts), strict=True))
    return embeddings


def encode_prompts(encode: Encode, prompts: dict[str, list[str]]) -> tuple[list[str], NDArray[np.float32]]:
    """Zero-shot class vectors: the unit-length mean of each value's unit-length prompt embeddings, (C, D)."""
    rows = []
    for texts in prompts.values():
        vectors = encode(texts)
        mean = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).mean(axis=0)
        rows.append(mean / np.linalg.norm(mean))
    return list(prompts), np.stack(rows).astype(np.float32)
