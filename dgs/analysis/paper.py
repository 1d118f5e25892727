"""docs/paper-tables.md: the paper's numbers, the authors' own re-run, and what was measured here, in one form.

`python -m dgs.analysis.paper` writes the page from docs/paper/*.csv and results/mini. Averages are recomputed from the
cells; printed ones that differ are named. All numbers are per cent.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from dgs.analysis.metrics import generators_in_order, headline, in_order, paper_mean, read_detection
from dgs.analysis.report import markdown_table
from dgs.errors import UserError
from dgs.stats import rounded_text, seed_interval

PAGE = Path("docs/paper-tables.md")
PRINTED = "PRINTED_AVERAGE"
SUBJECT = "DGS-Net"
ACCURACY = {1: "AIGCDetectBenchmark", 3: "AIGIBench"}  # tables of one Real column and an F.Acc column a generator
PRECISION = {2: "AIGCDetectBenchmark"}
OURS = ("probe", "lora", "dgs")
ROUNDING = 0.05 + 1e-6  # a printed average may be so far from the exact one
# The re-run's names that are not the paper's after dropping case and punctuation, by benchmark.
RENAMED = {
    ("AIGCDetectBenchmark", "whichfaceisreal"): "WFIR",
    ("AIGCDetectBenchmark", "stablediffusionv14"): "SDv1.4",
    ("AIGCDetectBenchmark", "stablediffusionv15"): "SDv1.5",
    ("AIGIBench", "midjourney"): "Midjourney-V6",
}
SUMMARY = ("Acc", "R.Acc", "F.Acc", "balanced acc.", "mAcc", "AP")
SIDE_BY_SIDE = ("", "benchmark", "generators", *SUMMARY)

INTRO = """# The paper's tables, beside what was measured here

Made by `python -m dgs.analysis.paper`, not by hand, from [paper/paper_tables.csv](paper/paper_tables.csv) (tables 1 to
3 of arXiv 2511.13108), [paper/official_rerun.csv](paper/official_rerun.csv) (a log that the authors published with
their release) and `results/mini`. All numbers are per cent.

**Not comparable:** paper and re-run are ViT-L/14 on photographs, ours is a mini-CLIP on an embedded benchmark
([what it is, and is not](minibench.md)). The form is shared so that a run on the paper's data can be put beside it.

- **R.Acc**, **F.Acc**: accuracy on real and on fake images at threshold 0.5. **Balanced acc.**: mean of their means.
- **mAcc** is what the paper averages in tables 1 and 3: one Real column and one F.Acc column a generator. For the most
  part it is fake recall: a detector that calls everything fake would have 94.4 with 17 generators and 96.2 with 25.
- **Acc** is over all images of a generator; **AP** is average precision.
- Means over generators are plain, and recomputed from the cells."""


def paper_cells(root: Path) -> pd.DataFrame:
    """The paper's cells: columns table, benchmark, metric, method, column, value (per cent); 732 cells and averages."""
    return pd.read_csv(_existing(root / "docs/paper/paper_tables.csv"))


def averages(cells: pd.DataFrame, table: int) -> pd.DataFrame:
    """Each method's averages in one of the paper's tables, recomputed: index method, columns printed and average.

    `average` is over all of a method's cells, as the paper's; tables 1 and 3 also have r_acc, f_acc (mean over
    generators) and balanced_acc. Per cent.
    """
    own = cells[cells["table"] == table]
    single = own[own["column"] != PRINTED]
    order = in_order(own["method"])
    found = pd.DataFrame(
        {
            "printed": own[own["column"] == PRINTED].set_index("method")["value"],
            "average": single.groupby("method")["value"].mean(),
        }
    )
    if table in ACCURACY:
        found["r_acc"] = single[single["metric"] == "r_acc"].set_index("method")["value"]
        found["f_acc"] = single[single["metric"] == "f_acc"].groupby("method")["value"].mean()
        found["balanced_acc"] = (found["r_acc"] + found["f_acc"]) / 2.0
    return found.loc[order]


def misprinted(found: pd.DataFrame) -> pd.Series:
    """Printed minus recomputed average of the methods where they differ by more than rounding, from `averages`."""
    gap = found["printed"] - found["average"]
    return gap[gap.abs() > ROUNDING]


def rerun_cells(root: Path) -> pd.DataFrame:
    """The authors' re-run: columns benchmark, generator (the paper's name), acc, ap, r_acc, f_acc; paper's order."""
    found = pd.read_csv(_existing(root / "docs/paper/official_rerun.csv"))
    paper = paper_cells(root)
    for benchmark in ACCURACY.values():
        names = {_plain(name): name for name in _generators(paper, benchmark)}
        at = found["benchmark"] == benchmark
        plain = found.loc[at, "generator"].map(_plain)
        found.loc[at, "generator"] = [RENAMED.get((benchmark, name)) or names[name] for name in plain]
    order = {name: i for i, name in enumerate(dict.fromkeys([*paper["column"], *found["generator"]]))}
    suites = {name: i for i, name in enumerate([*ACCURACY.values(), *found["benchmark"]][::-1])}
    ranks = pd.DataFrame({"suite": -found["benchmark"].map(suites), "generator": found["generator"].map(order)})
    return found.loc[ranks.sort_values(["suite", "generator"], kind="stable").index].reset_index(drop=True)


def page(root: Path) -> str:
    """The text of docs/paper-tables.md for the repository at `root`.

    Raises UserError where docs/paper or results/mini lack a file.
    """
    cells, rerun = paper_cells(root), rerun_cells(root)
    ours = headline(read_detection(_existing(root / "results/mini/detection.csv")))
    parts = [INTRO, "## Side by side", _side_by_side(cells, rerun, ours), "## The paper's averages, recomputed"]
    for table, benchmark in {**ACCURACY, **PRECISION}.items():
        parts += [f"### Table {table}: {benchmark}", *_average_section(averages(cells, table), table)]
    parts += ["## Generator by generator"]
    for benchmark in ACCURACY.values():
        parts += [f"### {SUBJECT} on {benchmark}", _by_generator(cells, rerun, benchmark)]
    for benchmark in [name for name in in_order(rerun["benchmark"]) if name not in ACCURACY.values()]:
        own = rerun[rerun["benchmark"] == benchmark]
        parts += [
            f"### {SUBJECT} on {benchmark}",
            "In the re-run only; the paper has no table of it.",
            _rerun_only(own),
        ]
    parts += ["### Ours", "Embedded benchmark, profile `mini`: means over seeds.", _ours_by_generator(ours)]
    parts += ["## The paper's tables in full"]
    for table in (1, 2, 3):
        own = cells[(cells["table"] == table) & (cells["column"] != PRINTED)]
        wide = own.pivot(index="column", columns="method", values="value")
        wide = wide.loc[in_order(own["column"]), in_order(own["method"])]
        rows = [[str(name), *map(rounded_text, line)] for name, line in zip(wide.index, wide.to_numpy(), strict=True)]
        what = "average precision" if table in PRECISION else "accuracy on real images, and on fakes of each generator"
        parts += [f"### Table {table}: {what}", markdown_table(["", *wide.columns], rows)]
    return "\n\n".join(parts) + "\n"


def write_page(root: Path) -> Path:
    """Writes docs/paper-tables.md below `root` and returns its path; raises as `page` does."""
    (root / PAGE).write_text(page(root), encoding="utf-8", newline="\n")
    return root / PAGE


def _side_by_side(cells: pd.DataFrame, rerun: pd.DataFrame, ours: pd.DataFrame) -> str:
    rows = [line for benchmark in ACCURACY.values() for line in paper_lines(cells, benchmark)]
    rows += [line for benchmark in in_order(rerun["benchmark"]) for line in rerun_lines(rerun, benchmark)]
    for method in [name for name in OURS if name in set(ours["method"])]:
        own = ours[ours["method"] == method]
        for where, part in (("all", own), ("unseen", own[~own["seen"]])):
            rows.append(our_line(part, f"embedded, {where}"))
    note = (
        "Ours: mean over seeds ± half the 95 % interval. The paper's suites hold the generators of its training set, "
        'as "all" does here.'
    )
    return f"{markdown_table(SIDE_BY_SIDE, rows)}\n\n{note}"


def paper_lines(cells: pd.DataFrame, benchmark: str) -> list[list[str]]:
    """What the paper has of DGS-Net on a benchmark under the columns SIDE_BY_SIDE: a line, or none."""
    lines = []
    for table in [number for number, of in ACCURACY.items() if of == benchmark]:
        own = averages(cells, table).loc[SUBJECT]
        precise = [number for number, of in PRECISION.items() if of == benchmark]
        ap = averages(cells, precise[0]).loc[SUBJECT, "average"] if precise else np.nan
        numbers = [np.nan, *own[["r_acc", "f_acc", "balanced_acc", "average"]], ap]
        count = len(_generators(cells, benchmark))
        lines.append([f"paper, {SUBJECT}", benchmark, str(count), *(number_text(float(value)) for value in numbers)])
    return lines


def rerun_lines(rerun: pd.DataFrame, benchmark: str) -> list[list[str]]:
    """What the authors' re-run has of a benchmark under the columns SIDE_BY_SIDE: a line, or none."""
    part = rerun[rerun["benchmark"] == benchmark]
    return [[f"re-run, {SUBJECT}", benchmark, str(len(part)), *map(number_text, _summary(part))]] if len(part) else []


def our_line(part: pd.DataFrame, benchmark: str) -> list[str]:
    """One method's rows of a detection table, a row a seed and generator, under the columns SIDE_BY_SIDE."""
    by_seed = np.array([_summary(run) for _, run in part.groupby("seed")])
    found = [seed_interval(100.0 * column) for column in by_seed.T]
    shown = [
        rounded_text(value.mean) + (f" ±{rounded_text(value.high - value.mean)}" if value.known else "")
        for value in found
    ]
    return [f"ours, `{part['method'].iloc[0]}`", benchmark, str(part["generator"].nunique()), *shown]


def _summary(part: pd.DataFrame) -> list[float]:
    """The columns of SUMMARY from one row a generator (acc, r_acc, f_acc, ap)."""
    real, fake = part["r_acc"].mean(), part["f_acc"].mean()
    return [part["acc"].mean(), real, fake, (real + fake) / 2.0, paper_mean(part), part["ap"].mean()]


def _average_section(found: pd.DataFrame, table: int) -> list[str]:
    wrong = misprinted(found)
    named = ", ".join(f"{method} {rounded_text(gap, 2, sign=True)}" for method, gap in wrong.items())
    rows = []
    for method, line in found.iterrows():
        more = [line["r_acc"], line["f_acc"], line["balanced_acc"]] if table in ACCURACY else []
        rows.append(
            [str(method), rounded_text(line["average"], 2), rounded_text(line["printed"]), *map(number_text, more)]
        )
    kind = "mAcc" if table in ACCURACY else "mean AP"
    header = ["method", f"{kind}, recomputed", f"{kind}, printed"]
    header += ["R.Acc", "F.Acc, mean", "balanced acc."] if table in ACCURACY else []
    text = f"Printed averages that differ by more than rounding (printed minus recomputed): {named or 'none'}."
    return [markdown_table(header, rows), text]


def _by_generator(cells: pd.DataFrame, rerun: pd.DataFrame, benchmark: str) -> str:
    own = cells[(cells["method"] == SUBJECT) & (cells["benchmark"] == benchmark)]
    real = own.loc[own["metric"] == "r_acc", "value"].iloc[0]
    fakes = own[own["metric"] == "f_acc"].set_index("column")["value"]
    precision = own[own["metric"] == "ap"].set_index("column")["value"]
    again = rerun[rerun["benchmark"] == benchmark].set_index("generator")
    rows = []
    for name in _generators(cells, benchmark):
        line = again.loc[name] if name in again.index else pd.Series(np.nan, again.columns)
        numbers = [fakes[name], precision.get(name, np.nan), *(line[m] for m in ("f_acc", "ap", "r_acc", "acc"))]
        rows.append([name, *map(number_text, numbers)])
    header = ["generator", "paper F.Acc", "paper AP", "re-run F.Acc", "re-run AP", "re-run R.Acc", "re-run Acc"]
    absent = [name for name in fakes.index if name not in again.index]
    lowest = again["r_acc"].min()
    note = (
        f"The paper has one Real column, {rounded_text(real)}; the re-run has an R.Acc for each generator, the lowest "
        f"{rounded_text(lowest)} ({again.index[again['r_acc'] == lowest][0]})."
    )
    if absent:
        note += f" Missing from the re-run: {', '.join(absent)}."
    return f"{note}\n\n{markdown_table(header, rows)}"


def _rerun_only(part: pd.DataFrame) -> str:
    numbers = part[["f_acc", "ap", "r_acc", "acc"]].to_numpy()
    rows = [[name, *map(number_text, line)] for name, line in zip(part["generator"], numbers, strict=True)]
    return markdown_table(["generator", "re-run F.Acc", "re-run AP", "re-run R.Acc", "re-run Acc"], rows)


def _ours_by_generator(ours: pd.DataFrame) -> str:
    methods = [name for name in OURS if name in set(ours["method"])]
    rows = []
    for name in generators_in_order(ours):
        own = ours[ours["generator"] == name]
        for method in methods:
            means = 100.0 * own.loc[own["method"] == method, ["f_acc", "ap", "r_acc", "acc"]].to_numpy().mean(axis=0)
            rows.append(
                [f"{name} (in training)" if own["seen"].iloc[0] else name, f"`{method}`", *map(number_text, means)]
            )
    return markdown_table(["generator", "method", "F.Acc", "AP", "R.Acc", "Acc"], rows)


def _generators(cells: pd.DataFrame, benchmark: str) -> list[str]:
    own = cells[(cells["benchmark"] == benchmark) & (cells["metric"] == "f_acc")]
    return in_order(own["column"])


def number_text(value: float) -> str:
    """A rounded number, "–" for NaN."""
    return "–" if np.isnan(value) else rounded_text(value)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"Expected {path}, found none. Run from the repository; make repro makes results/mini.")
    return path


def main() -> None:
    """Writes the page of the repository that this module lies in."""
    print(write_page(Path(__file__).resolve().parents[2]))


if __name__ == "__main__":
    main()
