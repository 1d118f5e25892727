"""The figure of training: losses of the task and of the text head, validation on the way, and validation at the end."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dgs.analysis.figures import style as look
from dgs.analysis.figures.style import plain, style, takeaway
from dgs.stats import rounded_text

POINTS = 40  # of a curve of losses; longer logs are averaged in bins
_LABELS = {  # a panel each
    "loss_task": "Task loss (nats)",
    "loss_text": "Text head's loss (nats)",
    "val": "Validation balanced\naccuracy (%)",
}


@style()
def training_curves(training: pd.DataFrame, validation: pd.DataFrame | None = None) -> Figure:
    """Losses (nats) and validation balanced accuracy (%) over the share of training done, mean over seeds.

    The task's loss alone: totals hold other terms for other methods. The text head's loss has a floor, what a converged
    classifier of the same caption embeddings has (median over runs): a text head far above it has not learned what
    captions tell. Validation images carry the shortcut of the training set, so their accuracy rewards reading it; the
    title is therefore about the last kind of `validation`. n: as how many images a kind counts, fewer than there are
    where they are weighed. Panels without data are left out.

    Args:
        training: columns method, seed, step, loss_task, val_balanced_acc (NaN but at epoch ends), and where known
            loss_text, loss_text_floor and rho.
        validation: of the final checkpoints, as `evaluate.final_validation` gives it: columns method, seed, images,
            balanced_acc, n_effective; the kinds of images in the order to draw them.
    """
    methods = list(training["method"].unique())
    steps = training.dropna(subset=["loss_task"]).groupby("method")["step"].max() + 1
    done = 100.0 * ((training["step"] + 1) / training["method"].map(steps)).clip(upper=1.0)
    table = training.assign(done=done, val=100.0 * training["val_balanced_acc"])
    width = 100.0 / POINTS
    binned = table.assign(done=(np.ceil(done / width) - 0.5) * width) if table["step"].nunique() > POINTS else table
    rho = float(table["rho"].max()) if "rho" in table else np.nan
    floor = float(table["loss_text_floor"].median()) if "loss_text_floor" in table else np.nan
    shown = [name for name in _LABELS if name in table and (name == "loss_task" or table[name].notna().any())]
    fig, axes = look.panels(len(shown) + (validation is not None), 1.0, 2.3)
    for ax, name in zip(axes, shown, strict=False):
        own = (table if name == "val" else binned).dropna(subset=[name])
        own = own.groupby(["method", "seed", "done"], sort=False)[name].mean().reset_index()
        look.curves(ax, own, "done", name, methods, top=100.0 if name == "val" else np.inf)
        ax.set(xlabel="Training done (%)", ylabel=_LABELS[name], xlim=(0.0, 102.0))
        note = {"loss_text": "dashed: converged" if np.isfinite(floor) else "",
                "val": "with the shortcut" if rho > 0.5 else ""}  # fmt: skip
        ax.set_title(note.get(name, ""), fontsize=10, fontweight="normal")
        if np.isfinite(floor) and name == "loss_text":
            ax.axhline(floor, **look.LINE)
    if validation is not None:
        sizes = validation.groupby("images", sort=False)["n_effective"].first()
        kinds = {kind: "\n".join([*str(kind).rsplit(" ", 1), f"(n {size:.0f})"]) for kind, size in sizes.items()}
        percent = validation.assign(value=100.0 * validation["balanced_acc"], kind=validation["images"].map(kinds))
        look.dots(axes[-1], percent, "kind", methods)
        axes[-1].set_xlabel("Final bal. accuracy (%)")
    return look.finish(fig, _takeaway(table, validation), look.BANDS, methods)


def _takeaway(table: pd.DataFrame, validation: pd.DataFrame | None) -> str:
    """About the least biased validation there is, else the losses."""
    if validation is not None:
        kind = validation["images"].iloc[-1]
        rows = validation[validation["images"] == kind].set_index(["method", "seed"])["balanced_acc"]
        return takeaway(f"Validation images {kind}".replace("\n", " "), 100.0 * rows)
    last = table.dropna(subset=["val"]).sort_values("step", kind="stable")
    if not last.empty:
        return takeaway("Validation on seen generators", last.groupby(["method", "seed"], sort=False)["val"].last())
    losses = table.dropna(subset=["loss_task"]).sort_values("step", kind="stable")
    means = losses.groupby(["method", "seed"])["loss_task"].last().groupby("method").mean().sort_values()
    low, high = (f"{rounded_text(means.iloc[i], 3)} ({plain(str(means.index[i]))})" for i in (0, -1))
    return f"Training loss ends at {low}" + (f" to {high}" if low != high else "")
