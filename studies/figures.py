"""Figures of what runs beside the pipeline, each of a table in results/study."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dgs.analysis.figures import style as look
from dgs.stats import rounded_text
from studies.regimes import DROPOUT, LR, MAP, METHODS, RHO
from studies.sweep import EPOCHS

WHAT = {"balanced_acc_unseen": "Bal. acc., unseen", "zero_shot_kept": "Zero-shot kept"}


def differences(table: pd.DataFrame) -> pd.DataFrame:
    """DGS minus LoRA in every cell of the map: its settings, measure, mean (points) over seeds, number of seeds, and
    whether every seed has the mean's sign.

    `table`: of `studies.regimes`; of several recipes of a cell, the last stands.
    """
    table = table.drop_duplicates(["settings", "method", "seed"], keep="last")
    settings = pd.DataFrame([json.loads(text) for text in table["settings"]], index=table.index)
    within = settings[list(MAP)].notna().all(axis=1) & (settings.notna().sum(axis=1) == len(MAP))
    rows = pd.concat([settings.loc[within, list(MAP)], table.loc[within, ["method", "seed", *WHAT]]], axis=1)
    both = rows.pivot(index=[*MAP, "seed"], columns="method", values=list(WHAT))
    both = both.reindex(columns=pd.MultiIndex.from_product([WHAT, METHODS]))
    gaps = 100.0 * (both.xs("dgs", axis=1, level=1) - both.xs("lora", axis=1, level=1)).dropna()
    long = pd.DataFrame(gaps).reset_index().melt([*MAP, "seed"], list(WHAT), "measure", "gap")
    cells = long.groupby([*MAP, "measure"])["gap"]
    agree = cells.agg(lambda own: bool((np.sign(own) == np.sign(own.mean())).all()))
    return pd.DataFrame({"mean": cells.mean(), "seeds": cells.size(), "agree": agree}).reset_index()


@look.style()
def regime_map(table: pd.DataFrame) -> Figure:
    """DGS minus LoRA over learning rates (across) and epochs (up): a block a measure, a line a dropout, a panel a rho.

    Cells are means over seeds in points; those in which seeds differ in sign are in brackets. `table`: of
    `studies.regimes`. Raises ValueError where no cell has both methods.
    """
    cells = differences(table)
    if cells.empty:
        raise ValueError("expected cells of dgs and lora with equal seeds, found none")
    lines = [(measure, dropout) for measure in WHAT for dropout in sorted(cells[DROPOUT].unique())]
    rhos = sorted(cells[RHO].unique())
    fig, axes = look.panels(len(lines) * len(rhos), 0.9, 1.75, columns=len(rhos))
    reach = {measure: cells.loc[cells["measure"] == measure, "mean"].abs().max() for measure in WHAT}
    for ax, (measure, dropout, rho) in zip(axes, [(*line, rho) for line in lines for rho in rhos], strict=True):
        own = cells[(cells["measure"] == measure) & (cells[DROPOUT] == dropout) & (cells[RHO] == rho)]
        means = own.pivot(index=EPOCHS, columns=LR, values="mean").sort_index(ascending=False)
        agree = own.pivot(index=EPOCHS, columns=LR, values="agree").reindex_like(means)
        digits = 1 if measure == "balanced_acc_unseen" else 0
        notes = means.map(lambda gap, digits=digits: "" if np.isnan(gap) else rounded_text(gap, digits, sign=True))
        sns.heatmap(
            means, ax=ax, annot=notes.where(agree.astype(bool), "(" + notes + ")"), fmt="", annot_kws={"fontsize": 10},
            cmap="PuOr", center=0.0, vmin=-reach[measure], vmax=reach[measure], linewidths=1.0, linecolor="white",
            cbar=False, xticklabels=[f"{rate:.0e}".replace("e-0", "e-") for rate in means],
            yticklabels=[f"{n:g}" for n in means.index],
        )  # fmt: skip
        ax.set_title(f"{WHAT[measure]}\nrho {rho:g}, dropout {dropout:g}", fontsize=10)
        ax.tick_params(length=0, labelrotation=0, labelsize=10)
        ax.set(
            xlabel="Learning rate" if ax in axes[-len(rhos) :] else "",
            ylabel="Epochs" if ax in axes[:: len(rhos)] else "",
        )
    detected = cells[cells["measure"] == "balanced_acc_unseen"]
    above, below = (int(((detected["mean"] * sign > 0) & detected["agree"]).sum()) for sign in (1, -1))
    said = f"DGS minus LoRA, points: all seeds above in {above} of {len(detected)} regimes, all below in {below}"
    chance = sum(0.5 ** detected["seeds"])
    return look.finish(fig, said, f"in brackets: seeds differ in sign; by chance {rounded_text(chance, 0)} each way")
