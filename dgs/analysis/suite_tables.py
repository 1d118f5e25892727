"""The paper's test suites in the paper's form: the paper's numbers, the authors' re-run, and this run's, side by side.

Per cent, threshold 0.5, unperturbed images. The paper's and the re-run's numbers are those of docs/paper/*.csv.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from dgs.analysis.metrics import by_suite, headline, in_order, paper_mean
from dgs.analysis.paper import (
    PRINTED,
    SIDE_BY_SIDE,
    SUBJECT,
    number_text,
    our_line,
    paper_cells,
    paper_lines,
    rerun_cells,
    rerun_lines,
)
from dgs.analysis.report import markdown_table, plus_minus
from dgs.data.suites import SUITES

NOTE = (
    "Per cent at threshold 0.5; ours: means over seeds ± half the 95 % interval. **mAcc** is the paper's mean, of one "
    "Real column and one F.Acc column a generator, so for the most part fake recall; **balanced acc.** is the mean of "
    "R.Acc and F.Acc, **AP** average precision, both plain means over the suite's generators. To be compared with the "
    "paper only if this run has its setting (docs/release.md says where they differ) and whole suites. "
    "The headline's means are over all generators tested; one that two suites have counts twice there."
)


def suite_sections(detection: pd.DataFrame, root: Path) -> list[str]:
    """Markdown sections on the suites that a detection table has rows of, for REPORT.md; none without suites.

    `root`: the repository, for docs/paper. Raises UserError as `metrics.headline` does, or where that lacks a file.
    """
    parts = {suite: rows for suite, rows in by_suite(headline(detection)).items() if suite}
    if not parts:
        return []
    cells, rerun = paper_cells(root), rerun_cells(root)
    lines = []
    for suite, rows in parts.items():
        lines += [*paper_lines(cells, suite), *rerun_lines(rerun, suite)]
        lines += [our_line(rows[rows["method"] == method], suite) for method in in_order(rows["method"])]
    sections = ["## The paper's suites", NOTE, markdown_table(SIDE_BY_SIDE, lines)]
    for suite, rows in parts.items():
        again = rerun[rerun["benchmark"] == suite].set_index("generator")
        paper = cells[(cells["benchmark"] == suite) & (cells["method"] == SUBJECT)]
        sections += [f"### {suite}", *_missing(suite, rows)]
        sections += [
            "Accuracy on real images and on fakes of each generator (F.Acc), as in the paper's tables 1 and 3:",
            _table(rows, paper, again, "f_acc", "**mAcc**"),
            "Average precision:",
            _table(rows, paper, again, "ap", "**mean**"),
        ]
    return sections


def _missing(name: str, rows: pd.DataFrame) -> list[str]:
    (suite,) = [suite for suite in SUITES if suite.name == name]
    absent = [known.column for known in suite.generators if known.column not in set(rows["generator"])]
    if not absent:
        return []
    return [f"**Not tested here: {', '.join(absent)}.** The means are over the others, the paper's over all."]


def _table(rows: pd.DataFrame, paper: pd.DataFrame, again: pd.DataFrame, metric: str, last: str) -> str:
    """One metric, a row a generator and their mean last; of accuracies with the paper's Real column first."""
    own = {method: rows[rows["method"] == method] for method in in_order(rows["method"])}
    printed = paper[paper["metric"] == metric].set_index("column")["value"]
    printed = printed[printed.index != PRINTED]
    lines = []
    if metric == "f_acc":
        real = paper.loc[paper["metric"] == "r_acc", "value"].mean()
        ours = [plus_minus(part.groupby("seed")["r_acc"].mean()) for part in own.values()]
        lines.append(["Real", "", number_text(real), number_text(again["r_acc"].mean()), *ours])
        means = [np.append(printed, real).mean(), paper_mean(again)]
        by_seed = [part.groupby("seed")[["r_acc", "f_acc"]].apply(paper_mean) for part in own.values()]
    else:
        means = [printed.mean(), again[metric].mean()]
        by_seed = [part.groupby("seed")[metric].mean() for part in own.values()]
    for generator in in_order(rows["generator"]):
        seen = rows.loc[rows["generator"] == generator, "seen"].iloc[0]
        theirs = [float(column.get(generator, np.nan)) for column in (printed, again[metric])]
        ours = [plus_minus(part.loc[part["generator"] == generator, metric]) for part in own.values()]
        lines.append([generator, "seen" if seen else "unseen", *map(number_text, theirs), *ours])
    lines.append([last, "", *map(number_text, means), *map(plus_minus, by_seed)])
    header = ["", "in training", f"paper, {SUBJECT}", f"re-run, {SUBJECT}", *(f"ours, `{name}`" for name in own)]
    return markdown_table(header, lines)
