"""How well captions alone tell real from fake: what a method that reads them could gain without seeing a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from numpy.typing import NDArray
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer

from dgs.commands import for_users
from dgs.data.prepared import Prepared, load_prepared
from dgs.data.suites import pool_of
from dgs.params import load_params
from dgs.stats import DRAWS
from dgs.workspace import Workspace
from real.manifest import of_manifest, read_manifest

FOLDS, SEED = 5, 0


def readers() -> dict[str, Pipeline]:
    """Logistic regressions on a caption's words, and on its embedding; of columns caption and embedding."""
    judge = LogisticRegression(class_weight="balanced", max_iter=5_000)
    words = FunctionTransformer(lambda rows: rows["caption"])
    numbers = FunctionTransformer(lambda rows: np.stack(rows["embedding"]))
    return {
        "words": make_pipeline(words, CountVectorizer(binary=True), judge),
        "embedding": make_pipeline(numbers, Normalizer(), judge),
    }


def with_groups(prepared: Prepared, manifest: pd.DataFrame) -> pd.DataFrame:
    """The prepared pictures with the `group` of the manifest's row whose path is theirs but for the suffix."""
    rows = prepared.manifest.assign(embedding=list(prepared.caption_embeddings))
    return rows.assign(group=of_manifest(rows["file"], manifest, "group").to_numpy())


def parts(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """All pictures, then each generator's fakes beside its own photographs, or beside those for all."""
    yield "all", rows
    reals, fakes = (rows[rows["label"] == label] for label in (0, 1))
    for generator, of_one in fakes.groupby("generator"):
        own = reals[reals["generator"] == generator]
        shared = reals[reals["generator"] == pool_of(str(generator), set(reals["generator"]))]
        yield str(generator), pd.concat([own if len(own) else shared, of_one])


def rates(rows: pd.DataFrame, seed: int = SEED) -> dict[str, float]:
    """Balanced accuracy and AUROC of scored pictures, with 95 % intervals over draws of their groups.

    Groups are drawn anew, since pictures of one are no two facts.

    Args:
        rows: columns label, logit and group.
    """
    labels, logits = rows["label"].to_numpy(), rows["logit"].to_numpy()
    group = rows.groupby("group").ngroup().to_numpy()
    rng, count = np.random.default_rng(seed), int(group.max()) + 1
    draws = [np.ones(len(rows), np.int64)]  # all as they are, then drawn
    while len(draws) <= DRAWS:
        counts = np.bincount(rng.integers(count, size=count), minlength=count)[group]
        if counts[labels == 0].any() and counts[labels == 1].any():
            draws.append(counts)
    of_real, of_fake = (np.array(draws)[:, labels == label].astype(float) for label in (0, 1))
    (real, fake), (reals, fakes) = (logits[labels == 0], logits[labels == 1]), (of_real.sum(1), of_fake.sum(1))
    above = (fake[:, None] > real) + 0.5 * (fake[:, None] == real)
    drawn = {
        "balanced_acc": (of_real @ (real <= 0) / reals + of_fake @ (fake > 0) / fakes) / 2,
        "auroc": ((of_fake @ above) * of_real).sum(1) / (reals * fakes),
    }
    found: dict[str, float] = {}
    for name, values in drawn.items():
        low, high = np.quantile(values[1:], (0.025, 0.975))
        found |= {name: values[0], f"{name}_low": low, f"{name}_high": high}
    return found


def _out_of_fold(reader: Any, rows: pd.DataFrame) -> NDArray[np.float64]:
    logits = np.zeros(len(rows))
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=SEED)
    for fitted, held in folds.split(rows, rows["label"], rows["group"]):
        reader.fit(rows.iloc[fitted], rows["label"].iloc[fitted])
        logits[held] = reader.decision_function(rows.iloc[held])
    return logits


def text_alone(rows: pd.DataFrame) -> pd.DataFrame:
    """Rates by reader, pictures and generator; by words alone where nothing embeds captions (model.text: none).

    `pictures`: "training", cross-validated by group (training and validation pictures together), and "test", judged by
    a reader of all training pictures.
    """
    known, test = rows[rows["split"] != "test"], rows[rows["split"] == "test"]
    found = []
    for name, reader in readers().items():
        if name == "embedding" and not len(rows["embedding"].iloc[0]):
            continue
        sets = {"training": known.assign(logit=_out_of_fold(reader, known))}
        sets["test"] = test.assign(logit=reader.fit(known, known["label"]).decision_function(test))
        for pictures, scored in sets.items():
            for generator, part in parts(scored):
                counts = {"n_real": int((part["label"] == 0).sum()), "n_fake": int((part["label"] == 1).sum())}
                found.append({"reader": name, "pictures": pictures, "generator": generator, **counts, **rates(part)})
    return pd.DataFrame(found)


def main(
    profile: Annotated[str, typer.Option(help="whose prepared pictures")] = "real",
    out: Annotated[Path | None, typer.Option(help="table to write; default results/PROFILE/text_alone.csv")] = None,
) -> None:
    """Say how well captions alone tell real from fake, by words and by embedding, and write the table."""
    params = load_params(profile)
    workspace = Workspace.of(params.profile)
    prepared = load_prepared(workspace.find("prepare", made_by="prepare"), workspace.root)
    table = text_alone(with_groups(prepared, read_manifest())).round(4)
    out = out or workspace.root / "results" / params.profile / "text_alone.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(out, index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    with for_users():
        typer.run(main)
