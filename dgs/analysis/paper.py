"""The paper's numbers, the authors' own re-run and ours in one form: docs/paper-tables.md, and a report's suites.

`python -m dgs.analysis.paper` writes the page from docs/paper/*.csv and results/mini. All three are rows of one table,
shaped as detection.csv (`theirs`), and every table is a pivot of it. Averages are recomputed from the cells; printed
ones that differ are named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

from dgs.analysis.metrics import by_suite, generators_in_order, headline, mean_of, paper_mean, read_detection, unique
from dgs.analysis.report import markdown_table, plus_minus, render
from dgs.data.suites import AIGC_DETECT_BENCHMARK, AIGI_BENCH, SUITES, UNIVERSAL_FAKE_DETECT
from dgs.errors import UserError
from dgs.stats import percent_text, rounded_text
from dgs.tables import read_table

PAGE = Path("docs/paper-tables.md")
PRINTED = "PRINTED_AVERAGE"
SUBJECT = "DGS-Net"
PAPER, RERUN = f"paper, {SUBJECT}", f"re-run, {SUBJECT}"
ACCURACY = {1: "AIGCDetectBenchmark", 3: "AIGIBench"}  # tables of one Real column and an F.Acc column a generator
PRECISION = {2: "AIGCDetectBenchmark"}
OURS = ("probe", "lora", "dgs")
ROUNDING = 0.05 + 1e-6  # a printed average may be so far from the exact one
Measure = Callable[[pd.DataFrame], float | None]  # of one run's rows, a row a generator
NAMES = {"f_acc": "F.Acc", "ap": "AP", "r_acc": "R.Acc", "acc": "Acc"}
SUMMARY: dict[str, Measure] = {
    "Acc": mean_of("acc"),
    "R.Acc": mean_of("r_acc"),
    "F.Acc": mean_of("f_acc"),
    "balanced acc.": lambda run: float(run["r_acc"].mean() + run["f_acc"].mean()) / 2.0,
    "mAcc": paper_mean,
    "AP": mean_of("ap"),
}


def paper_cells(root: Path) -> pd.DataFrame:
    """The paper's cells: columns table, benchmark, metric, method, column, value (per cent); 732 cells and averages."""
    return read_table(_existing(root / "docs/paper/paper_tables.csv"))


def averages(cells: pd.DataFrame, table: int) -> pd.DataFrame:
    """Each method's averages in one of the paper's tables, recomputed: index method, columns printed and average.

    `average` is over all of a method's cells, as the paper's; tables 1 and 3 also have r_acc, f_acc (mean over
    generators) and balanced_acc. Per cent.
    """
    own = cells[cells["table"] == table]
    single = own[own["column"] != PRINTED]
    found = pd.DataFrame(
        {
            "printed": own[own["column"] == PRINTED].set_index("method")["value"],
            "average": single.groupby("method")["value"].mean(),
        }
    )
    if table in ACCURACY:
        found[["r_acc", "f_acc"]] = single.pivot_table("value", "method", "metric")[["r_acc", "f_acc"]]
        found["balanced_acc"] = (found["r_acc"] + found["f_acc"]) / 2.0
    return found.loc[unique(own["method"])]


def misprinted(found: pd.DataFrame) -> pd.Series:
    """Printed minus recomputed average of the methods where they differ by more than rounding, from `averages`."""
    gap = found["printed"] - found["average"]
    return gap[gap.abs() > ROUNDING]


def rerun_cells(root: Path) -> pd.DataFrame:
    """The authors' re-run: columns benchmark, generator (the paper's name), acc, ap, r_acc, f_acc; paper's order."""
    found = read_table(_existing(root / "docs/paper/official_rerun.csv"))
    suites = {suite.name: suite for suite in (AIGC_DETECT_BENCHMARK, AIGI_BENCH, UNIVERSAL_FAKE_DETECT)}
    named = [
        suites[name].generator(folder) for name, folder in zip(found["benchmark"], found["generator"], strict=True)
    ]
    found["generator"] = [known.column for known in named if known]
    order = [*suites, *paper_cells(root)["column"], *found["generator"]]
    return found.sort_values(["benchmark", "generator"], key=lambda names: names.map(order.index))


def theirs(root: Path) -> pd.DataFrame:
    """DGS-Net's numbers by the paper and by the re-run, as rows of a detection table: fractions, seed 0.

    Columns benchmark, method (`PAPER`, `RERUN`), seed, generator, f_acc, ap, r_acc, acc; NaN is what they do not say.
    """
    cells = paper_cells(root)
    own = cells[(cells["method"] == SUBJECT) & (cells["column"] != PRINTED)]
    by_rate = {rate: rows.set_index(["benchmark", "column"])["value"] for rate, rows in own.groupby("metric")}
    paper = by_rate["f_acc"].to_frame("f_acc").join(by_rate["ap"].rename("ap")).reset_index()
    paper["r_acc"] = paper["benchmark"].map(by_rate["r_acc"].droplevel("column"))
    both = {PAPER: paper.rename(columns={"column": "generator"}), RERUN: rerun_cells(root)}
    table = pd.concat([rows.assign(method=name, seed=0) for name, rows in both.items()], ignore_index=True)
    table[list(NAMES)] /= 100.0
    return table[["benchmark", "method", "seed", "generator", *NAMES]]


def cell(rows: pd.DataFrame, measure: Measure) -> str:
    """A measure of one method's rows: mean over seeds ± half its interval, "–" where it is not known."""
    values = [measure(run) for _, run in rows.groupby("seed")]
    return plus_minus(pd.Series(values, dtype=float).dropna())


def side_by_side(parts: Iterable[tuple[str, pd.DataFrame]]) -> str:
    """A line for each method of each (benchmark, rows), with its means over generators."""
    lines = [
        [method, benchmark, str(own["generator"].nunique()), *(cell(own, measure) for measure in SUMMARY.values())]
        for benchmark, rows in parts
        for method, own in rows.groupby("method", sort=False)
    ]
    return markdown_table(["", "benchmark", "generators", *SUMMARY], lines)


def page(root: Path) -> str:
    """The text of docs/paper-tables.md for the repository at `root`.

    Raises UserError where docs/paper or results/mini lack a file.
    """
    cells, known = paper_cells(root), theirs(root)
    measured = headline(read_detection(_existing(root / "results/mini/detection.csv")))
    shown = [(str(benchmark), rows) for (_, benchmark), rows in known.groupby(["method", "benchmark"], sort=False)]
    for name in OURS:
        own = _named_ours(measured[measured["method"] == name])
        shown += [("embedded, all", own), ("embedded, unseen", own[~own["seen"]])]
    full = []
    for number in (1, 2, 3):
        own = cells[(cells["table"] == number) & (cells["column"] != PRINTED)]
        wide = own.pivot(index="column", columns="method", values="value")
        wide = wide.loc[unique(own["column"]), unique(own["method"])].map(rounded_text)
        what = "average precision" if number in PRECISION else "accuracy on real images, and on fakes of each generator"
        full.append((number, what, markdown_table(["", *wide.columns], wide.itertuples())))
    return render(
        "paper-tables.md.j2",
        subject=SUBJECT,
        side_by_side=side_by_side(shown),
        averages=[(n, benchmark, *_averages(cells, n)) for n, benchmark in {**ACCURACY, **PRECISION}.items()],
        by_generator=[(name, *_by_generator(known[known["benchmark"] == name])) for name in unique(known["benchmark"])],
        ours=_ours(measured),
        full=full,
    )


def _averages(cells: pd.DataFrame, number: int) -> tuple[str, str]:
    found, kind = averages(cells, number), "mAcc" if number in ACCURACY else "mean AP"
    header = {
        "average": f"{kind}, recomputed", "printed": f"{kind}, printed",
        "r_acc": "R.Acc", "f_acc": "F.Acc, mean", "balanced_acc": "balanced acc.",
    }  # fmt: skip
    columns = [column for column in header if column in found]
    rows = found[columns].map(rounded_text).assign(average=found["average"].map(lambda mean: rounded_text(mean, 2)))
    wrong = [f"{method} {rounded_text(gap, 2, sign=True)}" for method, gap in misprinted(found).items()]
    return markdown_table(["method", *(header[column] for column in columns)], rows.itertuples()), ", ".join(wrong)


def _by_generator(rows: pd.DataFrame) -> tuple[str, str, str, str]:
    """Of one benchmark: its table; the paper's R.Acc, the re-run's lowest, and what the re-run lacks."""
    paper, rerun = (rows[rows["method"] == name].set_index("generator") for name in (PAPER, RERUN))
    columns = {f"re-run {label}": rerun[rate] for rate, label in NAMES.items()}
    if len(paper):
        columns = {f"paper {NAMES[rate]}": paper[rate] for rate in ("f_acc", "ap")} | columns
    lines = [[name, *(_known(of.get(name)) for of in columns.values())] for name in unique(rows["generator"])]
    real = _known(paper["r_acc"].iloc[0]) if len(paper) else ""
    lowest = f"{_known(rerun['r_acc'].min())} ({rerun['r_acc'].idxmin()})"
    absent = ", ".join(name for name in paper.index if name not in rerun.index)
    return markdown_table(["generator", *columns], lines), real, lowest, absent


def _ours(measured: pd.DataFrame) -> str:
    means = measured.groupby(["generator", "method"])[list(NAMES)].mean().map(percent_text)
    seen = set(measured.loc[measured["seen"], "generator"])
    lines = [
        [f"{name} (in training)" if name in seen else name, f"`{method}`", *means.loc[[(name, method)]].to_numpy()[0]]
        for name in generators_in_order(measured)
        for method in OURS
    ]
    return markdown_table(["generator", "method", *NAMES.values()], lines)


def suite_sections(detection: pd.DataFrame, root: Path) -> list[str]:
    """Markdown on the suites that a detection table has rows of, for REPORT.md; none without suites.

    `root`: the repository, for docs/paper. Raises UserError as `metrics.headline` does, or where that lacks a file.
    """
    parts = by_suite(headline(detection))
    shown, suites = [], []
    for suite in SUITES:
        if (tested := parts.get(suite.name)) is not None:
            known = theirs(root)
            rows = pd.concat([known[known["benchmark"] == suite.name], _named_ours(tested)])
            absent = [known.column for known in suite.generators if known.column not in set(tested["generator"])]
            tables = [_suite_table(rows, tested, rate) for rate in ("f_acc", "ap")]
            shown.append((suite.name, rows))
            suites.append((suite.name, ", ".join(absent), *tables))
    if not suites:
        return []
    return [render("paper-suites.md.j2", side_by_side=side_by_side(shown), suites=suites).rstrip()]


def _named_ours(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(method="ours, `" + rows["method"] + "`")


def _suite_table(rows: pd.DataFrame, tested: pd.DataFrame, rate: str) -> str:
    """A row a generator that was tested and their mean last, a column a source; of accuracies with Real first."""
    sources = [PAPER, RERUN, *(name for name in unique(rows["method"]) if name not in (PAPER, RERUN))]
    own = {name: rows[rows["method"] == name] for name in sources}

    def line(label: str, seen: str, measure: Measure, generator: str | None = None) -> list[str]:
        parts = [part if generator is None else part[part["generator"] == generator] for part in own.values()]
        return [label, seen, *(cell(part, measure) for part in parts)]

    lines = [line("Real", "", mean_of("r_acc"))] if rate == "f_acc" else []
    for name in unique(tested["generator"]):
        seen = tested.loc[tested["generator"] == name, "seen"].iloc[0]
        lines.append(line(name, "seen" if seen else "unseen", mean_of(rate), name))
    last = line("**mAcc**", "", paper_mean) if rate == "f_acc" else line("**mean**", "", mean_of(rate))
    return markdown_table(["", "in training", *sources], [*lines, last])


def _known(fraction: float | None) -> str:
    return "–" if fraction is None or pd.isna(fraction) else percent_text(fraction)


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"Expected {path}, found none. Run from the repository; make repro makes results/mini.")
    return path


def main() -> None:
    """Writes docs/paper-tables.md of the repository that this module lies in; raises as `page` does."""
    root = Path(__file__).resolve().parents[2]
    (root / PAGE).write_text(page(root), encoding="utf-8", newline="\n")
    print(root / PAGE)


if __name__ == "__main__":
    main()
