"""What the study on real pictures says beyond each profile's report, in one table: by training pictures, by copy, with
and without the test pictures whose prompt was trained on, and with intervals over generators."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import pandas as pd
import typer

from dgs.analysis.metrics import detection_table, headline
from dgs.data.prepared import load_prepared
from dgs.errors import UserError
from dgs.params import load_params
from dgs.stats import Interval, seed_interval
from dgs.workspace import Workspace, find_root
from real.manifest import read_manifest

PROFILES = ("real", "real-unmatched", "real-64", "real-128", "real-256")
RATES = ("balanced_acc", "auroc", "ap")
COLUMNS = ["profile", "training_images", "method", "pictures", "rate", "over", "n", "mean", "low", "high"]
ENOUGH = 4  # generators for an interval over them
LEFT_OUT = "glid3_xl without trained prompts"


def without_trained_prompts(scores: pd.DataFrame, manifest: pd.DataFrame) -> pd.DataFrame:
    """Scores without test pictures whose prompt was trained on; matched copies have another suffix."""
    marked = manifest.loc[manifest["prompt_trained_on"] == "1", "path"]
    stems = {PurePosixPath(path).with_suffix("") for path in marked}
    return scores[[PurePosixPath(name).with_suffix("") not in stems for name in scores["id"]]]


def by_generator(scores: pd.DataFrame, seen: set[str], manifest: pd.DataFrame) -> pd.DataFrame:
    """`headline` rows, and one of `LEFT_OUT` for each run."""
    rows = headline(detection_table(scores, seen))
    fewer = headline(detection_table(without_trained_prompts(scores, manifest), seen))
    return pd.concat([rows, fewer[fewer["generator"] == "glid3_xl"].assign(generator=LEFT_OUT)])


def _row(values: pd.Series, over: str, **what: Any) -> dict[str, Any]:
    found: Interval = seed_interval(values.to_numpy())
    return {**what, "over": over, "n": len(values), **found._asdict()}


def intervals(rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Means with 95 % t intervals: each generator's over seeds, and those of unseen and seen ones twice.

    Over seeds (of the mean over generators: what another training would give), and over generators (of each one's mean
    over seeds: what another generator would give), where there are `ENOUGH`.
    """
    kinds = {False: "unseen", True: "seen"}
    for method, own in rows.groupby("method", sort=False):
        for rate in RATES:
            what = {"method": method, "rate": rate}
            for generator, part in own.groupby("generator"):
                yield _row(part[rate], "seeds", **what, pictures=generator)
            for seen, part in own[own["generator"] != LEFT_OUT].groupby("seen"):
                name = kinds[bool(seen)]
                yield _row(part.groupby("seed")[rate].mean(), "seeds", **what, pictures=name)
                of_generators = part.groupby("generator")[rate].mean()
                if len(of_generators) >= ENOUGH:
                    yield _row(of_generators, "generators", **what, pictures=name)


def study(root: Path, profiles: tuple[str, ...] = PROFILES) -> pd.DataFrame:
    """The rows of every profile that was run, columns `COLUMNS`.

    Raises:
        UserError: none was.
    """
    manifest, tables = read_manifest(), []
    for name in profiles:
        file = root / "build" / name / "evaluate" / "scores.parquet"
        if file.exists():
            prepared = load_prepared(Workspace.of(name).find("prepare", made_by="prepare"), root)
            images = load_params(name, root).train.images or len(prepared.split("train"))
            rows = by_generator(pd.read_parquet(file), set(prepared.info["seen"]), manifest)
            tables.append(pd.DataFrame(intervals(rows)).assign(profile=name, training_images=images))
    if not tables:
        raise UserError(f"Expected scores of {', '.join(profiles)} below build/, found none. Run make real.")
    return pd.concat(tables)[COLUMNS].reset_index(drop=True)


def main(out: Annotated[Path | None, typer.Option(help="table; default results/real/study.csv")] = None) -> None:
    """Write the study's table from the scores of all profiles that were run, and print the unseen generators' part."""
    root = find_root()
    table = study(root).round(4)
    out = out or root / "results" / "real" / "study.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(out, index=False)
    print(table[(table["pictures"] == "unseen") & (table["rate"] == "balanced_acc")].to_string(index=False))


if __name__ == "__main__":
    typer.run(main)
