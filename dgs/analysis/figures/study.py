"""One picture of the study: every method minus lora under every condition, with intervals over generators."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dgs.analysis.figures.style import colour, ends, marker, plain, style
from dgs.analysis.metrics import in_order

ROW, PANEL = 0.21, 1.75  # inches


def study_forest(gaps: pd.DataFrame, baseline: str = "lora") -> Figure:
    """Each method minus `baseline` on unseen generators: a row a method, a panel a condition, zero as a line.

    Markers are means over generators, bars 95 % Student t intervals over them: what other generators would show, where
    reports have intervals over seeds. The order of rows is that of all gaps' means. A method that a condition did not
    run leaves its row empty.

    Args:
        gaps: columns condition, method, generator, gap (points), as `study.generator_gaps` gives them.
    """
    order = gaps.groupby("method")["gap"].mean().sort_values(ascending=False).index
    with style():
        grid = sns.catplot(
            gaps, kind="point", x="gap", y="method", hue="method", col="condition", order=order,
            palette={method: colour(method) for method in order}, errorbar=ends(), linestyle="none", legend=False,
            height=1.2 + ROW * len(order), aspect=PANEL / (1.2 + ROW * len(order)), markersize=5,
            markers=[marker(method) for method in order],
            err_kws={"linewidth": 1.3},
        )  # fmt: skip
        grid.refline(x=0.0, color="#333333", linestyle="-", linewidth=1.0)
        grid.set_titles("{col_name}", size=9)
        grid.figure.subplots_adjust(top=1 - 0.75 / (1.2 + ROW * len(order)))
        grid.set_axis_labels("", "")
        for ax in grid.axes.flat:
            ax.set_yticks(range(len(order)), [plain(method) for method in order])
            ax.tick_params(labelsize=8)
            ax.grid(axis="y", visible=False)
        fig: Figure = grid.figure
        fig.supxlabel(f"Balanced accuracy on unseen generators minus {plain(baseline)}, points", fontsize=10)
        fig.suptitle(f"{len(in_order(gaps['condition']))} conditions: mean and 95 % interval over generators")
    return fig
