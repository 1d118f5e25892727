"""What generators have in common in a frozen CLIP: how well a linear probe for one finds another's pictures.

An analysis of the tower, with test pictures among those that it fits: no method, rate or threshold comes from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dgs.commands import for_users
from dgs.data.prepared import load_prepared
from dgs.data.views import Views
from dgs.device import set_determinism
from dgs.model.aligned import locked_features
from dgs.model.clip import load_clip
from dgs.params import load_params
from dgs.workspace import Workspace
from real.manifest import of_manifest, read_manifest
from real.text_alone import FOLDS, SEED, parts, rates

COLUMNS = ["trained_on", "tested_on", "n_real", "n_fake", "auroc", "auroc_low", "auroc_high"]


def transfer(rows: pd.DataFrame, features: NDArray[np.float32]) -> Iterator[dict[str, Any]]:
    """AUROC of a probe for each generator on each, with 95 % intervals over groups of pictures (`rates`).

    A picture is scored by a probe that saw none of its group, neither the picture nor another of its prompt: pictures
    of all splits are in one of `FOLDS` folds. Every probe gets as many fakes, what the rarest generator has for
    training, and all photographs that its generator is compared with, weighed to count as much.

    Args:
        rows: columns generator, label and group.
        features: (N, D), row i of `rows`.
    """
    rows = rows.reset_index(drop=True)
    sets = {generator: part for generator, part in parts(rows) if generator != "all"}
    kinds = rows["generator"] + rows["label"].astype(str)
    folds = list(StratifiedGroupKFold(FOLDS, shuffle=True, random_state=SEED).split(rows, kinds, rows["group"]))
    fewest = min(int(part.index[part["label"] == 1].isin(known).sum()) for part in sets.values() for known, _ in folds)
    for trained_on, own in sets.items():
        logits = np.zeros(len(rows))
        for known, held in folds:
            seen = own[own.index.isin(known)]
            fakes = seen[seen["label"] == 1].sample(fewest, random_state=SEED)
            chosen = pd.concat([seen[seen["label"] == 0], fakes])
            probe = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=5_000))
            logits[held] = probe.fit(features[chosen.index], chosen["label"]).decision_function(features[held])
        for tested_on, part in sets.items():
            counts = {"n_real": int((part["label"] == 0).sum()), "n_fake": int((part["label"] == 1).sum())}
            found = rates(part.assign(logit=logits[part.index]))
            yield {"trained_on": trained_on, "tested_on": tested_on, **counts, **found}


def main(profile: Annotated[str, typer.Option(help="whose prepared pictures")] = "real") -> None:
    """Probe the frozen tower for each generator, and write results/PROFILE/in_common.csv."""
    params = load_params(profile)
    set_determinism(params.compute.threads * params.compute.jobs)
    workspace = Workspace.of(params.profile)
    prepared = load_prepared(workspace.find("prepare", made_by="prepare"), workspace.root)
    clip = load_clip(params.model, workspace.root, params.image_size, text=False)
    rows = prepared.manifest
    features = locked_features(clip, Views(rows, prepared.source, params, patches=prepared.patches), params)
    rows = rows.assign(group=of_manifest(rows["file"], read_manifest(), "group").to_numpy())
    table = pd.DataFrame(transfer(rows, features.cpu().numpy()))[COLUMNS].round(4)
    out = workspace.root / "results" / params.profile / "in_common.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(out, index=False)
    print(table.pivot(index="trained_on", columns="tested_on", values="auroc").round(2).to_string())


if __name__ == "__main__":
    with for_users():
        typer.run(main)
