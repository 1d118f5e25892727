"""Tables of what runs beside the pipeline (`studies.sweep`): those whose results are there."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dgs.analysis.scores import read_scores
from dgs.analysis.study import UNSEEN, crossed_gap, unseen_cells
from dgs.stats import Interval, seed_interval
from dgs.tables import read_table
from minibench import generators
from studies import dose_response, oracle_ladder, priors, seen_pairs, text_heads
from studies.sweep import Arm
from studies.tables import Cell, Table, number, told

STORE = "results/study"
NOT_RUN = "not run"
RATES = {"balanced accuracy": "balanced_acc", "AP": "ap"}


@cache
def _results(root: Path, study: str) -> tuple[pd.DataFrame, dict[tuple[str, str], pd.DataFrame]]:
    """Rows of a study, of several recipes of a run the last; and its scores by settings and method."""
    table = read_table(root / STORE / f"{study}.csv").drop_duplicates(["settings", "method", "seed"], keep="last")
    scores = read_scores(root / STORE / f"{study}.parquet")
    return table, {
        (str(settings), str(method)): own for (settings, method), own in scores.groupby(["profile", "method"])
    }


def _per_cent(interval: Interval) -> Interval:
    return Interval(*(100 * end for end in interval))


def values(root: Path, study: str, arm: Arm, measure: str) -> pd.Series:
    """An arm's measure by seed."""
    table, _ = _results(root, study)
    own = table[(table["method"] == arm.method) & (table["settings"] == arm.text)]
    return own.set_index("seed")[measure].astype(float).dropna()


def mean(root: Path, study: str, measure: str, arm: Arm, scale: float = 100.0, digits: int = 1) -> str:
    """An arm's measure with its interval over seeds, in per cent unless `scale` says otherwise."""
    found = values(root, study, arm, measure)
    return told(seed_interval(scale * found.to_numpy()), digits, sign=False) if len(found) else NOT_RUN


@cache
def _cells(root: Path, study: str, method: str, settings: str, rate: str) -> dict[int, NDArray[np.float64]]:
    """`unseen_cells` of an arm, by seed; none where it was not run."""
    of_arms = _results(root, study)[1]
    return (
        unseen_cells(of_arms[settings, method], generators.SEEN, rate)[method] if (settings, method) in of_arms else {}
    )


def gap(root: Path, study: str, rate: str, pair: tuple[Arm, Arm]) -> str:
    """An arm minus another on unseen generators: points, with seeds, generators and images as random."""
    if pair[0] == pair[1]:
        return ""
    first, second = (_cells(root, study, arm.method, arm.text, rate) for arm in pair)
    return told(_per_cent(crossed_gap(first, second).interval)) if first and second else NOT_RUN


def _by_pair(root: Path, measure: str, methods: tuple[str, str]) -> pd.Series | None:
    """One method minus another, points, by the images' folder: means of seeds; None where one was not run."""
    table, _ = _results(root, "seen_pairs")
    means = table.assign(folder=[json.loads(text)["data.root"] for text in table["settings"]])
    means = means.groupby(["folder", "method"])[measure].mean().unstack()
    return (100 * (means[methods[0]] - means[methods[1]])).dropna() if set(methods) <= set(means) else None


def over_pairs(root: Path, measure: str, methods: tuple[str, str]) -> str:
    """One method minus another over random seen pairs: each pair is one value; a dash where neither has the measure."""
    gaps = _by_pair(root, measure, methods)
    if gaps is None:
        return NOT_RUN
    return told(seed_interval(gaps.to_numpy(dtype=np.float64))) if len(gaps) else "–"


def on_pair(root: Path, measure: str, methods: tuple[str, str], folder: str) -> str:
    """One method minus another where the generators of `folder` are seen."""
    gaps = _by_pair(root, measure, methods)
    return NOT_RUN if gaps is None or folder not in gaps else number(gaps[folder], sign=True)


def _ladder(root: Path) -> dict[str, Table]:
    rungs = {arm.method: arm for arm in oracle_ladder.arms()}

    def against(other: str, names: list[str]) -> Table:
        pairs = {f"`{name}`": (rungs[name], rungs[other]) for name in names if name != other}
        shown = {"lora": "LoRA"}.get(other, f"`{other}`")
        gaps = {f"{label} minus {shown}": partial(gap, root, "oracle_ladder", rate) for label, rate in RATES.items()}
        kept = {"zero-shot kept": lambda pair: mean(root, "oracle_ladder", "zero_shot_kept", pair[0], digits=0)}
        return "rung", pairs, {**gaps, **kept}

    with_mlp = [name for name, rung in oracle_ladder.RUNGS.items() if rung.mlp]
    return {"oracle-ladder": against("lora", list(rungs)), "ladder-mlp": against("mlp", with_mlp)}


def _heads(root: Path) -> dict[str, Table]:
    study, arms = "text_heads", text_heads.arms()
    of = {(arm.method, arm.settings["data.rho"], arm.settings[text_heads.HEAD]): arm for arm in arms}
    rhos, kinds = text_heads.RHOS, text_heads.HEADS
    readers = list(dict.fromkeys(name for name, _, head in of if head == "fitted"))

    def rows(names: list[str]) -> dict[str, tuple[str, float]]:
        return {f"`{name}`, rho {rho:g}": (name, rho) for rho in rhos for name in names}

    def against(other: str, rate: str, head: str, row: tuple[str, float]) -> str:
        same = head if (other, row[1], head) in of else "release"
        return gap(root, study, rate, (of[(*row, head)], of[other, row[1], same]))

    def gaps(other: str) -> dict[str, Cell]:
        return {
            f"{label}, {head}": partial(against, other, rate, head) for label, rate in RATES.items() for head in kinds
        }

    heads = {f"{head}, rho {rho:g}": of["dgs", rho, head] for rho in rhos for head in kinds}
    facts = {
        "text head's accuracy": partial(mean, root, study, "text_acc"),
        "its loss": partial(mean, root, study, "loss_text", scale=1.0, digits=2),
        "degrees between task and harm": partial(mean, root, study, "angle_task_harmful", scale=1.0),
        "energy along harm": partial(mean, root, study, "along_harm"),
        "zero-shot kept": partial(mean, root, study, "zero_shot_kept", digits=0),
    }
    return {
        "text-heads": ("minus LoRA, unseen", rows(readers), gaps("lora")),
        "text-head-controls": ("minus DGS, unseen", rows([name for name in readers if name != "dgs"]), gaps("dgs")),
        "text-head-facts": ("DGS, text head", heads, facts),
    }


def _dose(root: Path) -> dict[str, Table]:
    dropped, shares = dose_response.DROPPED, {f"{100 * share:.0f} %": share for share in dose_response.SHARES}

    def at(name: str, share: float = 0.0) -> Arm:
        return Arm(name, {dropped: share})

    pairs: dict[str, Callable[[float], tuple[Arm, Arm]]] = {
        "`poe_distillation` minus LoRA": lambda share: (at("poe_distillation", share), at("lora")),
        "`content_poe_distillation` minus `poe_distillation`": lambda share: (
            at("content_poe_distillation"),
            at("poe_distillation", share),
        ),
        "DGS minus itself at 0 %": lambda share: (at("dgs", share), at("dgs")),
    }

    def column(rate: str, pair: Callable[[float], tuple[Arm, Arm]], share: float) -> str:
        return gap(root, "dose_response", rate, pair(share))

    columns = {
        f"{label}: {what}": partial(column, rate, pair) for label, rate in RATES.items() for what, pair in pairs.items()
    }
    return {"dose-response": ("captions without the word", shares, columns)}


ON_EACH = [("lora", "probe"), ("dgs", "lora"), ("content_poe_distillation", "lora"), ("pixel_cnn", "lora")]


def _pairs(root: Path) -> dict[str, Table]:
    contrasts = {
        f"`{first}` minus `{second}`": (first, second)
        for first, second in (
            ("lora", "probe"), ("dgs", "lora"), ("poe_distillation", "lora"), ("content_poe_distillation", "lora"),
            ("content_poe_distillation", "poe_distillation"), ("pixel_cnn", "lora"),
            ("pixel_cnn", "content_poe_distillation"),
        )
    }  # fmt: skip
    measures = {"balanced accuracy": UNSEEN, "AP": "ap_unseen", "zero-shot kept": "zero_shot_kept"}
    columns = {label: partial(over_pairs, root, measure) for label, measure in measures.items()}
    folders = {" and ".join(f"`{name}`" for name in pair): seen_pairs.folder(pair) for pair in seen_pairs.PAIRS}
    each = {f"`{first}` minus `{second}`": partial(on_pair, root, UNSEEN, (first, second)) for first, second in ON_EACH}
    return {
        "seen-pairs": ("unseen generators", contrasts, columns),
        "each-seen-pair": ("seen, balanced accuracy on the others", folders, each),
    }


def _priors(root: Path) -> dict[str, Table]:
    arms, without = priors.arms(), Arm(priors.WITHOUT)
    towers = list(dict.fromkeys(arm.settings[priors.CLIP] for arm in arms if priors.CLIP in arm.settings))
    names = {f"{int(Path(tower).name):,} samples" if Path(tower).name.isdigit() else "whole": tower for tower in towers}

    def level(method: str, measure: str, tower: str) -> str:
        return mean(root, "priors", measure, Arm(method, {priors.CLIP: tower}))

    def minus(method: str, other: str, rate: str, tower: str) -> str:
        second = without if other == priors.WITHOUT else Arm(other, {priors.CLIP: tower})
        return gap(root, "priors", rate, (Arm(method, {priors.CLIP: tower}), second))

    def gaps(*pairs: tuple[str, str]) -> dict[str, Cell]:
        return {
            f"{label}: `{method}` minus `{other}`": partial(minus, method, other, rate)
            for label, rate in RATES.items()
            for method, other in pairs
        }

    levels = {
        f"{label}: `{method}`": partial(level, method, f"{rate}_unseen")
        for label, rate in RATES.items()
        for method in priors.METHODS
    }
    on_each = zip(priors.METHODS[1:], priors.METHODS[:-1], strict=True)
    return {
        "priors": ("CLIP pre-trained on", names, gaps(*((method, priors.WITHOUT) for method in priors.METHODS))),
        "priors-levels": ("CLIP pre-trained on", names, levels),
        "priors-steps": ("CLIP pre-trained on", names, gaps(*on_each)),
    }


MADE = {
    "oracle_ladder": _ladder, "text_heads": _heads, "dose_response": _dose, "seen_pairs": _pairs, "priors": _priors
}  # fmt: skip


def sweep_tables(root: Path) -> dict[str, Table]:
    """The tables of every study that has results."""
    found = [make(root) for study, make in MADE.items() if (root / STORE / f"{study}.csv").exists()]
    return {name: table for tables in found for name, table in tables.items()}
