"""What the study on real pictures says beyond each profile's report, in one table: by training pictures, by copy, with
and without the test pictures whose prompt was trained on, method against method, and with four kinds of interval."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from numpy.typing import NDArray

from dgs.analysis.differences import rate_cells
from dgs.analysis.metrics import detection_table, headline, native_rows, unique
from dgs.analysis.scores import FILE, read_scores
from dgs.commands import for_users
from dgs.crossed import RATES as CROSSED
from dgs.crossed import crossed_interval
from dgs.errors import UserError
from dgs.params import load_params
from dgs.stats import DRAWS, Interval, seed_interval
from dgs.tables import read_table
from dgs.workspace import find_root
from real.manifest import of_manifest, read_manifest
from real.text_alone import SEED, parts

PROFILES = ("real", "real-unmatched", "real-64", "real-128", "real-256")
RATES = ("balanced_acc", "auroc", "ap")
COLUMNS = ["profile", "training_images", "method", "pictures", "rate", "over", "n", "mean", "low", "high"]
OTHER_COPY = ("real-unmatched", "real")  # profiles whose difference is the files' format alone
AGAINST = ("probe", "lora")  # what every other method is compared with
KINDS = {False: "unseen", True: "seen"}
ENOUGH = 4  # generators for an interval over them
LEFT_OUT = "glid3_xl without trained prompts"


def without_trained_prompts(scores: pd.DataFrame, manifest: pd.DataFrame) -> pd.DataFrame:
    """Scores without test pictures whose prompt was trained on."""
    return scores[of_manifest(scores["id"], manifest, "prompt_trained_on").to_numpy() != "1"]


def by_generator(scores: pd.DataFrame, seen: set[str], manifest: pd.DataFrame) -> pd.DataFrame:
    """`headline` rows, and one of `LEFT_OUT` for each run."""
    rows = headline(detection_table(scores, seen))
    fewer = headline(detection_table(without_trained_prompts(scores, manifest), seen))
    return pd.concat([rows, fewer[fewer["generator"] == "glid3_xl"].assign(generator=LEFT_OUT)])


def differences(values: pd.DataFrame) -> pd.DataFrame:
    """Columns "<method> minus <other>", for each other of `AGAINST`; `values`: a column a method."""
    pairs = [(method, other) for other in AGAINST if other in values for method in values if method != other]
    return pd.DataFrame({f"{method} minus {other}": values[method] - values[other] for method, other in pairs})


def by_seed(rows: pd.DataFrame, rate: str) -> pd.DataFrame:
    """A rate of each method and of each difference, paired: a column each, rows by generator, seen and seed."""
    values = rows.pivot(index=["generator", "seen", "seed"], columns="method", values=rate)
    return values.join(differences(values))


def intervals(rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Means with 95 % t intervals: each generator's over seeds, and those of unseen and seen ones twice.

    Over seeds (of the mean over generators: what another training would give), and over generators (of each one's mean
    over seeds: what another generator would give), where there are `ENOUGH`.
    """
    for rate in RATES:
        for method, column in by_seed(rows, rate).items():
            values, what = column.dropna(), {"method": method, "rate": rate}
            for generator, own in values.groupby("generator"):
                yield _row(own, "seeds", **what, pictures=generator)
            for seen, part in values.drop(LEFT_OUT, level="generator", errors="ignore").groupby("seen"):
                name = KINDS[bool(seen)]
                yield _row(part.groupby("seed").mean(), "seeds", **what, pictures=name)
                of_generators = part.groupby("generator").mean()
                if len(of_generators) >= ENOUGH:
                    yield _row(of_generators, "generators", **what, pictures=name)


def _row(values: pd.Series, over: str, **what: Any) -> dict[str, Any]:
    found: Interval = seed_interval(values.to_numpy())
    return {**what, "over": over, "n": len(values), **found._asdict()}


def over_pictures(scores: pd.DataFrame, seen: set[str], manifest: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Balanced accuracy, mean over seeds, with a 95 % bootstrap interval over the test pictures' groups.

    What other pictures of the same generators would give. A group is drawn whole, since pictures of one prompt are no
    two facts; all methods get the same draws, and all generators the same draws of shared photographs. `n`: groups.
    """
    test = scores[scores["split"] == "test"]
    test = test.assign(right=(test["logit"] > 0) == (test["label"] == 1))
    right = test.pivot_table(index="id", columns="method", values="right", aggfunc="mean", sort=False)
    rows = test.drop_duplicates("id").set_index("id").loc[right.index].reset_index()
    rows["group"] = of_manifest(rows["id"], manifest, "group").to_numpy()
    weights = group_draws(rows["group"].to_numpy())
    of_generator: dict[str, tuple[NDArray[np.float64], set[Any]]] = {}
    for generator, part in parts(rows):
        sides = [part.index[part["label"] == label] for label in (0, 1)]
        shares = [weights[:, side] @ right.to_numpy(float)[side] / weights[:, side].sum(1)[:, None] for side in sides]
        of_generator[generator] = np.mean(shares, axis=0), set(part["group"])
    del of_generator["all"]
    sets = {name: [name] for name in of_generator}
    sets |= {kind: [name for name in of_generator if (name in seen) is known] for known, kind in KINDS.items()}
    for pictures, generators in sets.items():
        if generators:
            chosen = [of_generator[name] for name in generators]
            values = pd.DataFrame(np.mean([rates for rates, _ in chosen], axis=0), columns=right.columns)
            groups = len(set.union(*(groups for _, groups in chosen)))
            for method, column in values.join(differences(values)).items():
                low, high = np.nanquantile(column[1:], (0.025, 0.975))
                found = {"n": groups, "mean": column[0], "low": low, "high": high}
                yield {"method": method, "rate": "balanced_acc", "over": "pictures", "pictures": pictures, **found}


def shown(scores: pd.DataFrame, seen: set[str], manifest: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Differences on the unseen generators with a 95 % interval that has seeds, generators and groups as random.

    The definition of "shown": `dgs.crossed`. `n`: seeds times generators.
    """
    test = native_rows(scores[scores["split"] == "test"])
    test = test.assign(group=of_manifest(test["id"], manifest, "group"))
    generators = [name for name in unique(test.loc[test["label"] == 1, "generator"]) if name not in seen]
    methods, seeds = unique(test["method"]), sorted(test["seed"].unique())
    for rate in CROSSED:
        cells = rate_cells(test, rate, generators)
        for method, other in [(method, other) for other in AGAINST for method in methods if method != other]:
            gaps = [
                cells[method, seed] - cells[other, seed]
                for seed in seeds
                if {(method, seed), (other, seed)} <= set(cells)
            ]
            if gaps:
                found = crossed_interval(np.moveaxis(np.array(gaps), -1, 0)).interval
                what = {"method": f"{method} minus {other}", "rate": rate, "over": "crossed", "pictures": "unseen"}
                yield {**what, "n": len(gaps) * len(generators), **found._asdict()}


def group_draws(groups: NDArray[Any]) -> NDArray[np.float64]:
    """How often each picture counts, (1 + DRAWS, pictures): once, then in draws of as many groups with replacement."""
    distinct, numbers = np.unique(groups, return_inverse=True)
    rng = np.random.default_rng(SEED)
    counts = rng.multinomial(len(distinct), np.full(len(distinct), 1 / len(distinct)), size=DRAWS)
    return np.concatenate([np.ones((1, len(groups))), counts[:, numbers]])


def other_copy(rows: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """`others` minus `rows`, paired by method, generator and seed: the same pictures in another copy."""
    keys = ["method", "generator", "seen", "seed"]
    both = others.merge(rows, on=keys, suffixes=("", "_other"))
    return both[keys].join(pd.DataFrame({rate: both[rate] - both[f"{rate}_other"] for rate in RATES}))


def study(root: Path, profiles: tuple[str, ...] = PROFILES) -> pd.DataFrame:
    """The rows of every profile whose scores results/ has, columns `COLUMNS`; those of `OTHER_COPY`, if both are there.

    Raises:
        UserError: none has any.
    """
    manifest, tables, runs = read_manifest(), [], {}
    for name in profiles:
        folder = root / "results" / name
        if (folder / FILE).exists():
            images = load_params(name, root).train.images or int((manifest["split"] == "train").sum())
            generators = read_table(folder / "detection.csv").groupby("generator")["seen"].first()
            scores, seen = read_scores(folder / FILE), set(generators[generators].index)
            runs[name] = by_generator(scores, seen, manifest)
            rows = [*intervals(runs[name]), *over_pictures(scores, seen, manifest), *shown(scores, seen, manifest)]
            tables.append(pd.DataFrame(rows).assign(profile=name, training_images=images))
    if not tables:
        raise UserError(f"Expected scores of {', '.join(profiles)} below results/, found none. Run make real.")
    if set(OTHER_COPY) <= set(runs):
        minus = other_copy(runs[OTHER_COPY[1]], runs[OTHER_COPY[0]])
        tables.append(pd.DataFrame(intervals(minus)).assign(profile=" minus ".join(OTHER_COPY)))
    return pd.concat(tables)[COLUMNS].reset_index(drop=True)


def main(out: Annotated[Path | None, typer.Option(help="table; default results/real/study.csv")] = None) -> None:
    """Write the study's table from the scores of all profiles that were run, and print the unseen generators' part."""
    root = find_root()
    table = study(root).round(6)  # so that a document's rounding is the report's
    out = out or root / "results" / "real" / "study.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(out, index=False)
    print(table[(table["pictures"] == "unseen") & (table["rate"] == "balanced_acc")].to_string(index=False))


if __name__ == "__main__":
    with for_users():
        typer.run(main)
