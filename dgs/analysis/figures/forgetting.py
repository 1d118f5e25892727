"""Figures of forgetting: what a tuned tower still knows, detection against memory, and where the tower changed."""

from __future__ import annotations

import textwrap

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dgs.analysis.figures import style as look
from dgs.analysis.figures.style import colour, marker, plain, short_names, style, takeaway
from dgs.analysis.metrics import (
    BLOCK,
    TEXT_METRICS,
    has_aligned_text,
    label_of,
    measure_words,
    one_rho,
    per_seed_values,
)
from dgs.errors import UserError

NO_TOWER = "No method here is of a CLIP: there is nothing that could be forgotten."
ROOM = 5.0  # points that the plane's detection axis spans at least: closer up, noise would look like a gap
# What the plane's memory axis shows, the first that was measured: its name in a title, its axis label.
_MEMORY = {
    "zero_shot_kept": ("Zero-shot kept", "Zero-shot accuracy kept (% of the frozen model's)"),
    "cka_to_frozen": ("CKA to frozen", "Similarity to the frozen features (CKA, %)"),
}
_BLOCKS = {"cka_block": "CKA to frozen (%)", "cosine_drift_block": "Cosine drift (%)"}


@style()
def forgetting_measures(forgetting: pd.DataFrame) -> Figure:
    """What each method still knows: every measure before (black tick) and after fine-tuning (dot), in per cent.

    Dots are means over seeds with 95 % intervals cut at 0 and 100 %, faint ones single seeds. Left out is what is no
    memory of the tower's output: measures whose `before` is 0 everywhere (drifts, angles), those of single blocks, and
    the silhouette of real against fake. A table without rows gives a sentence. Raises UserError where no measure is
    left, or for mixed rho.
    """
    if forgetting.empty:
        return look.nothing(NO_TOWER)
    one_rho(forgetting, "forgetting table")
    known = forgetting.groupby("measure", sort=False)["before"].transform(lambda before: (before != 0).any())
    name = forgetting["measure"].astype(str)
    rows = forgetting[known.astype(bool) & ~name.str.contains(BLOCK) & (name != "silhouette")]
    if rows.empty:
        raise UserError("The forgetting table has no measure to draw: `before` is 0 or there are no rows.")
    shown, methods = rows["measure"].map(_measure_name), list(rows["method"].unique())
    before = 100.0 * rows.groupby("measure", sort=False)["before"].mean()
    fig, (ax,) = look.panels(1, 1.1, max(0.45, 0.12 * len(methods)) * len(before))
    look.dots(ax, rows.assign(value=100.0 * rows["after"], shown=shown), "shown", methods)
    at = np.arange(len(before))
    ax.vlines(before, at - 0.45, at + 0.45, "black", lw=2.2)
    ax.set_xlim(-2.0, max(102.0, float(100.0 * rows["before"].max()) + 1.0))
    ax.set_xlabel("After fine-tuning (%); black: before")
    zero_shot = rows["measure"].astype(str).str.startswith("zero_shot")
    part = rows[zero_shot] if zero_shot.any() else rows
    ratio = 100.0 * (part["after"] / part["before"]).where(part["before"] != 0)
    kept = ratio.groupby([part["method"], part["seed"]], sort=False).mean()
    what = label_of("zero_shot_kept", rows).capitalize() if zero_shot.any() else "Share kept"
    return look.finish(fig, takeaway(what, kept), look.SEEDS, methods)


@style()
def forgetting_plane(detection: pd.DataFrame, forgetting: pd.DataFrame) -> Figure:
    """Detection against memory: balanced accuracy (%) on unseen generators over the share of zero-shot accuracy kept.

    One marker a method (mean over seeds) with 95 % intervals both ways, cut at 0 and 100 %, and a faint dot a seed.
    Without unseen generators the seen ones are used, and without zero_shot:* measures (data without named classes) the
    similarity to the frozen features; the axes say so. Methods that were not measured are named in the axis label.
    A table without rows gives a sentence. Raises UserError where no method has either.
    """
    if forgetting.empty:
        return look.nothing(NO_TOWER)
    values = per_seed_values(detection, forgetting)
    where = "unseen" if (values["metric"] == "balanced_acc_unseen").any() else "seen"
    table = 100.0 * values.pivot(index=["method", "seed"], columns="metric", values="value")
    memory = next((name for name in _MEMORY if name in table), None)
    if memory is None:
        raise UserError("The forgetting table has no zero_shot:* measures and no CKA: there is no share kept to draw.")
    kept_name, axis = _MEMORY[memory]
    if memory in TEXT_METRICS and has_aligned_text(forgetting):
        axis += "\nagainst an aligned text side, not CLIP's own"
    table = table[[memory, f"balanced_acc_{where}"]].set_axis(["kept", "found"], axis=1).dropna()
    names = [str(name) for name in values["method"].unique()]
    measured = [name for name in names if name in table.index.get_level_values("method")]
    absent = [plain(name) for name in names if name not in measured]
    fig, (ax,) = look.panels(1, 4.4)
    for method in measured:
        part = table.loc[[method]]
        ax.scatter(part["kept"], part["found"], s=14, color=colour(method), alpha=0.45, linewidths=0, zorder=2)
        (x, y), ends = part.mean(), part.apply(lambda own: look.ends(0.0, 100.0)(own.tolist()), result_type="expand")
        across, up = (ends - (x, y)).abs().T.to_numpy()
        ax.errorbar(
            x, y, xerr=across[:, None], yerr=up[:, None], fmt=marker(method), markersize=9, color=colour(method),
            markeredgecolor="white", capsize=3, zorder=4,
        )  # fmt: skip
    ax.axvline(100.0, **look.LINE | {"linestyle": ":"})
    ax.margins(0.08)
    low, high = ax.get_ylim()
    room = max(0.0, ROOM - (high - low)) / 2.0
    ax.set_ylim(max(low - room, -3.0), min(high + room, 103.0))
    low, high = ax.get_xlim()
    ax.set_xlim(max(low, -3.0), min(high, max(103.0, table["kept"].max() + 3.0)))
    ax.set_xlabel(axis + (f"\nnot measured: {', '.join(absent)}" if absent else ""))
    ax.set_ylabel(f"Balanced accuracy,\n{where} generators (%)")
    several = table.groupby("method").size().max() > 1  # else nothing is said of seeds
    whose = f"{where}, over seeds" if several else where  # over generators too: the figure of differences
    sentences = (takeaway(kept_name, table["kept"], False), takeaway(whose, table["found"], False))
    return look.finish(fig, "; ".join(sentences), look.SEEDS, measured)


@style()
def forgetting_blocks(forgetting: pd.DataFrame) -> Figure:
    """Where in the tower it changes: CKA (%) and cosine drift (%) of the mean token after each block, a line a method.

    From the measures cka_block:<k> and cosine_drift_block:<k>, means over seeds with 95 % bands cut at 0 and 100 %.
    A table without rows gives a sentence. Raises UserError where there are none, or for mixed rho.
    """
    if forgetting.empty:
        return look.nothing(NO_TOWER)
    one_rho(forgetting, "forgetting table")
    rows = forgetting[forgetting["measure"].astype(str).str.contains(BLOCK)]
    if rows.empty:
        raise UserError("The forgetting table has no measures of single blocks (cka_block:1, ...) to draw.")
    parts = rows["measure"].str.split(":", expand=True)
    rows = rows.assign(kind=parts[0], block=parts[1].astype(int), value=100.0 * rows["after"])
    methods, last = list(rows["method"].unique()), rows["block"].max()
    fig, axes = look.panels(2, 3.2, x="Vision block", sharex=True)
    for ax, (kind, label) in zip(axes, _BLOCKS.items(), strict=True):
        look.curves(ax, rows[rows["kind"] == kind], "block", "value", methods, top=100.0)
        ax.set(ylim=(-3.0, 103.0), ylabel=label)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    after = rows[(rows["kind"] == "cka_block") & (rows["block"] == last)].set_index(["method", "seed"])["value"]
    # A frozen tower would always be the best; in float32 its CKA is 100 % but for the last digits.
    moved = after.groupby("method").transform("min").round(2) < 100.0
    claim = takeaway(f"CKA after block {last}", after[moved] if moved.any() else after)
    return look.finish(fig, claim, look.BANDS, methods)


def _measure_name(measure: str) -> str:
    """`measure_words` in lines; the name of an attribute stays whole, or is cut where it is long."""
    kind, colon, attribute = measure.partition(":")
    words = measure_words(kind + colon + plain(short_names([attribute])[attribute]))
    return "\n".join(textwrap.wrap(words, 14, break_on_hyphens=False, break_long_words=False))
