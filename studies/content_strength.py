"""How much has to go for a content expert to read no traces: its accuracy by side and way, on training images.

Where content tells nothing of labels (rho 0.5) whatever it reads above 50 % is traces, which it would take from the
method; where content tells of them (rho 0.9) it should still read content. `train.surgery.content_side` is chosen by
this table, once, and no test image is looked at: `python -m studies.content_strength` writes
results/study/content_strength.csv.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer

from dgs.atomic import replacing_file
from dgs.commands import for_users
from dgs.data.manifest import ImageSource, build_manifest
from dgs.data.prepared import Prepared
from dgs.data.views import Contents, Views
from dgs.device import choose_device, set_determinism
from dgs.model.backbone import Backbone
from dgs.model.clip import load_clip
from dgs.model.features import extract_features
from dgs.model.methods.experts import cross_fitted
from dgs.params import Params, load_params
from dgs.stats import share_interval
from dgs.workspace import find_root

OUT = Path("results/study/content_strength.csv")
RHOS = (0.5, 0.9)
SIDES = (0.125, 0.1875, 0.25, 0.375, 0.5)  # 8 to 32 px of 64
WAYS = {"shrunk": (False,), "blurred": (True,), "both": (False, True)}  # of `Contents`; the expert has both
COLUMNS = ["rho", "way", "side", "images", "accuracy", "low", "high"]


def strengths(
    params: Params, root: Path, images: int | None, sides: Sequence[float] = SIDES
) -> Iterator[tuple[float, str, float, int, float, float, float]]:
    """Rows of `COLUMNS`: accuracy out of fold of a content expert at each side and way, with its 95 % Wilson interval.

    Args:
        params: their data is the embedded benchmark; rho is taken from `RHOS`.
        images: of the training images, drawn by seed 0 in proportion to generators and labels; None: all.
        sides: shares of the pictures' side, as train.surgery.content_side.
    """
    device = choose_device(params.compute.device)
    backbone = Backbone(load_clip(params.model, root, params.image_size, text=False)).to(device).eval()
    source = ImageSource((root / params.data.root).resolve())
    for rho in RHOS:
        manifest = build_manifest(source.root, params.data.model_copy(update={"rho": rho}))
        without = np.zeros((len(manifest), 0), np.float32)
        whole = Prepared(manifest, {"rho": rho}, without, {}, None, source)
        rows = whole.with_training_images(images, seed=0).split("train")
        labels = rows["label"].to_numpy(np.int64)
        for side in sides:
            views = Views(rows, source, params)
            with backbone.frozen():
                read = [
                    extract_features(backbone, Contents(views, side, blurred), params, f"rho {rho}, side {side}")
                    for blurred in (False, True)
                ]
            for way, parts in WAYS.items():
                evidence = torch.cat([read[part] for part in parts], 1).cpu().numpy()
                right = (cross_fitted(evidence, labels, seed=0) > 0) == labels
                yield rho, way, side, len(rows), *share_interval(int(right.sum()), len(rows))


def main(
    out: Annotated[Path | None, typer.Option(help="the table to write (CSV); default where the study's are")] = None,
    images: Annotated[int | None, typer.Option(min=10, help="training images of each rho; default all")] = None,
    side: Annotated[list[float] | None, typer.Option(help="share of the side; may be repeated")] = None,
) -> None:
    """Measure what a content expert reads at several strengths, on training images of the embedded benchmark."""
    params = load_params()
    set_determinism(params.compute.threads)
    found = []
    for row in strengths(params, find_root(), images, side or SIDES):
        found.append(row)
        typer.echo(", ".join(f"{name} {value}" for name, value in zip(COLUMNS, row, strict=True)), err=True)
    with replacing_file(out or find_root() / OUT) as draft:
        pd.DataFrame(found, columns=COLUMNS).round(6).to_csv(draft, index=False)


if __name__ == "__main__":
    with for_users():
        typer.run(main)
