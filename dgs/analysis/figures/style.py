"""The look of all figures: a family of methods has one colour, a member one marker; dots, curves, legends and titles.

Every figure is a function of tables: no inference, no files, no pyplot state. A title states what the data show and is
computed from them; intervals stand in the picture. At half the width of a README column (some 400 px) the smallest text
is still about 9 px high.
"""

from __future__ import annotations

import io
import re
import textwrap
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dgs.data.suites import abbreviated
from dgs.stats import paired_difference, rounded_text, seed_interval

WIDTH = 6.0  # inches; at 150 dpi 900 px, shown at half of it or less
DPI = 150
SUBJECT, BASELINE = "dgs", "lora"  # what titles compare where both are there
CHANCE = 50.0  # per cent balanced accuracy
LONGEST = 20  # characters of a name in a figure
NOT_SHOWN = "not shown to differ from"  # a difference whose interval spans zero
SEEDS = "mean over seeds, 95 % interval; faint dots: seeds"  # what `dots` draws
BANDS = "mean over seeds; band or bar: 95 % interval"  # and `curves`
CURVE = 3  # points that make a curve with a band; fewer have bars

# Okabe & Ito's colours and two of similar spacing, told apart under red-green blindness: a colour a family.
FAMILIES: dict[str, tuple[str, ...]] = {
    "#7f7f7f": ("probe", "leace", "null_space", "levels_probe", "weighed_probe"),
    "#e69f00": ("lora", "lp_ft", "wise_ft", "swad", "l2_sp", "effort", "weighed_lora"),
    "#0072b2": (
        "dgs", "suppression_only", "alignment_only", "per_sample", "paper_order", "signed", "random_direction",
        "random_alignment", "shuffled_captions",
    ),
    "#009e73": ("distillation", "pcgrad", "prograd", "levels_distillation"),
    "#d55e00": (
        "product_of_experts", "poe_probe", "poe_distillation", "poe_swad", "levels_poe", "levels_poe_probe",
        "levels_poe_distillation",
    ),
    "#332288": ("dgs_plus",),
    "#56b4e9": ("pixel_cnn", "content_pixel_cnn", "late_fusion"),
    "#7a3cf0": ("content_poe_distillation", "content_probe"),
}  # fmt: skip
_OTHERS = "#cc79a7"  # of a method that no family lists: an external checkpoint, one of the reader's own
_MARKERS = "oDsv^X><Pphd*"
_FIRST = dict(zip(FAMILIES, "sDovX>P^", strict=True))  # heads of families differ in marker too
# Kinds of image (real, generators) are no methods: black and eight colours that no family has.
REAL_COLOUR, REAL_MARKER = "#000000", "o"
GENERATOR_COLOURS = ("#d400d4", "#a8b400", "#7a0000", "#00cfe8", "#ff7f86", "#144729", "#6b0f5b", "#5c7000")
_GENERATOR_MARKERS = "^vD<>PX"
LINE: dict[str, Any] = {"color": "#333333", "linewidth": 1.0, "linestyle": "--", "zorder": 1}  # chance, 90 degrees

_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # shipped with matplotlib: the same glyphs on every machine
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "legend.title_fontsize": 10,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.titlesize": 12.5,
    "figure.titleweight": "bold",
    "figure.facecolor": "white",
    "figure.dpi": DPI,
    "svg.hashsalt": "dgs",
}


@contextmanager
def style(**more: Any) -> Iterator[None]:
    """The look, for a plot (`with style():`) or a function (`@style()`); `more`: matplotlib settings, "__" for "."."""
    with mpl.rc_context(_RC | {name.replace("__", "."): value for name, value in more.items()}):
        yield


def panels(
    count: int, height: float, each: float = 0.0, columns: int = 2, x: str = "", y: str = "", **shared: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of the common width with `count` panels in lines of at most `columns`; places left over stay empty.

    Args:
        height: of the figure in inches, without its legend. each: what a line of panels adds to it.
        x, y: labels below the lowest panel of each column and beside the first of each line.
        shared: for `Figure.subplots`.
    """
    columns = min(columns, count)
    lines = -(-count // columns)
    fig = Figure(figsize=(WIDTH, height + each * lines), layout="constrained")
    axes = list(fig.subplots(lines, columns, squeeze=False, **shared).flat)
    for ax in axes[count:]:
        ax.remove()
    for ax in axes[count - columns : count]:
        ax.tick_params(labelbottom=True)  # shared axes hide it above an empty place
        ax.set_xlabel(x)
    for ax in axes[:count:columns]:
        ax.set_ylabel(y)
    return fig, axes[:count]


def finish(
    fig: Figure, title: str, note: str = "", methods: Iterable[str] = (), more: Iterable[Artist] = (), columns: int = 3
) -> Figure:
    """The figure with its takeaway at the left edge and, where it has entries, a legend below the panels.

    Args:
        note: what is drawn, above the entries.
        methods: whose colours and markers are entries, before `more`.
    """
    fig.suptitle("\n".join(title_lines(title)), x=0.01, ha="left")
    handles: list[Artist] = [handle(plain(method), **method_look(method)) for method in methods]
    if handles := [*handles, *more]:
        fig.set_figheight(fig.get_figheight() + 0.45 + 0.25 * -(-len(handles) // columns))
        fig.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)), title=note)
    return fig


def handle(label: str, **look: Any) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], label=label, **{"linewidth": 2.0, "markersize": 7, **look})


@style()
def nothing(why: str) -> Figure:
    """A figure that says in a sentence why there is nothing to draw."""
    fig = Figure(figsize=(WIDTH, 1.2))
    fig.text(0.5, 0.5, "\n".join(title_lines(why)), ha="center", va="center")
    return fig


def png(fig: Figure, dpi: int = DPI) -> bytes:
    """A figure as PNG bytes that repeat: no software or date entry."""
    buffer = io.BytesIO()
    with style():
        FigureCanvasAgg(fig)
        fig.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    plt.close(fig)  # no-op for the figures of this package, which pyplot does not know
    return buffer.getvalue()


def save(fig: Figure, path: str | Path) -> Path:
    """Writes `fig` as PNG at 150 dpi; parent folders are made. Returns the path."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(png(fig))
    return target


def show(fig: Figure, path: str | Path | None = None) -> None:
    """A figure in a notebook, and as a file where a path is given."""
    from IPython.display import Image, display

    display(Image(png(fig) if path is None else save(fig, path)))


def colour(method: str) -> str:
    """The colour of the method's family as "#rrggbb"; names that no family lists share one."""
    return next((hue for hue, members in FAMILIES.items() if method in members), _OTHERS)


def marker(method: str) -> str:
    """The method's marker (matplotlib code), its own in its family; an unlisted name always gets the same one."""
    hue = colour(method)
    if hue == _OTHERS:
        return _MARKERS[zlib.crc32(method.encode()) % len(_MARKERS)]
    first = _MARKERS.index(_FIRST[hue])
    return _MARKERS[(first + FAMILIES[hue].index(method)) % len(_MARKERS)]


def method_look(method: str) -> dict[str, Any]:
    """Colour and marker of a method, as matplotlib's keywords."""
    return {"color": colour(method), "marker": marker(method)}


def generator_look(i: int) -> dict[str, Any]:
    """Colour and marker of the i-th generator, as matplotlib's keywords."""
    colours, markers = GENERATOR_COLOURS, _GENERATOR_MARKERS
    return {"color": colours[i % len(colours)], "marker": markers[i % len(markers)]}


def subject_of(methods: Iterable[str]) -> str:
    """The method to talk about: dgs where it is there, else the last."""
    names = list(methods)
    return SUBJECT if SUBJECT in names else names[-1]


def plain(method: str) -> str:
    """A method's name as figures print it; its words are not parted at the end of a line."""
    return method.replace("_", "\u00a0")


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Names as figures print them: {name: at most 20 characters}, long ones cut in the middle ("…"), all distinct.

    Suites are abbreviated ("AIGI/SDXL"). Names alike at both ends are numbered in order: "diffusion-model-…2".
    """
    given = {str(name): abbreviated(str(name)) for name in names}
    short = {name: label for name, label in given.items() if len(label) <= LONGEST}
    for name, whole in given.items():
        if name in short:
            continue
        label, number = f"{whole[:12]}…{whole[-7:]}", 1
        while label in short.values():
            number += 1
            label = f"{whole[: LONGEST - 1 - len(str(number))]}…{number}"
        short[name] = label
    return {name: short[name] for name in given}


def ends(low: float = -np.inf, high: float = np.inf) -> Callable[[Sequence[float]], tuple[float, float]]:
    """`errorbar=` for seaborn: ends of the 95 % t interval over seeds, within [low, high], never short of the mean."""

    def cut(values: Sequence[float]) -> tuple[float, float]:
        interval = seed_interval(np.asarray(values))
        return min(max(interval.low, low), interval.mean), max(min(interval.high, high), interval.mean)

    return cut


def by_method(methods: Sequence[str], column: str = "method") -> dict[str, Any]:
    """seaborn's keywords for a colour a method, without a legend."""
    palette = {method: colour(method) for method in methods}
    return {"hue": column, "hue_order": methods, "palette": palette, "legend": False}


def dots(
    ax: Axes, table: pd.DataFrame, row: str, methods: Sequence[str], cut: tuple[float, float] = (0, 100), **look: Any
) -> None:
    """Rows of dots, one a method: mean of "value" over seeds with its 95 % interval, faint dots the single seeds.

    Args:
        table: one row a seed.
        row: column of what is told apart along y; "method": each method has a row of its own.
        cut: where whiskers end at the latest.
        look: further keywords for the means.
    """
    names = methods if row == "method" else list(table[row].unique())
    beside = row != "method" and len(methods) > 1
    common = {"data": table, "x": "value", "y": row, "order": names, "orient": "h", "ax": ax, **by_method(methods)}
    labels: dict[str, Any] = {"xlabel": ax.get_xlabel(), "ylabel": ax.get_ylabel()}
    sns.stripplot(**common, dodge=beside, jitter=False, size=3, alpha=0.55, zorder=2)
    sns.pointplot(
        **common, dodge=0.8 - 0.8 / len(methods) if beside else False, errorbar=ends(*cut), linestyle="none",
        markers=[marker(method) for method in methods], err_kws={"linewidth": 1.4},
        **{"markersize": 6, "markeredgewidth": 1.2, "zorder": 3, **look},
    )  # fmt: skip
    ax.set(ylim=(len(names) - 0.5, -0.5), **labels)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    for i in range(1, len(names) if beside else 0):
        ax.axhline(i - 0.5, color="#e3e3e3", linewidth=0.7, zorder=0)


def curves(ax: Axes, table: pd.DataFrame, x: str, value: str, methods: Sequence[str], top: float = np.inf) -> None:
    """A curve a method: mean over seeds of `value` at each x with its 95 % band within [0, top].

    Fewer than 3 points have the interval as a bar. One row a method, seed and x.
    """
    known = table.dropna(subset=[value])
    few = known.groupby("method")[x].transform("nunique") < CURVE
    labels: dict[str, Any] = {"xlabel": ax.get_xlabel(), "ylabel": ax.get_ylabel()}
    for part, bars in ((known[few], True), (known[~few], False)):
        drawn = [method for method in methods if (part["method"] == method).any()]
        if not drawn:
            continue
        common = {"data": part, "x": x, "y": value, "ax": ax, "errorbar": ends(0.0, top), **by_method(drawn)}
        look = {"markers": [marker(method) for method in drawn], "markersize": 7, "linewidth": 1.8}
        if bars:
            sns.pointplot(**common, **look, native_scale=True, err_kws={"linewidth": 1.4})
            continue
        sns.lineplot(**common, **look, style="method", style_order=drawn, dashes=False, markeredgewidth=0.5)
        for line in ax.lines:
            line.set_markevery(max(1, len(np.asarray(line.get_xdata())) // 5))
    ax.set(**labels)


def title_lines(text: str, inches: float = WIDTH) -> list[str]:
    """A title's lines in a figure of that width; units stay with their numbers, methods' names in one piece."""
    unbroken = re.sub(r" (%|points|px|×)", "\u00a0\\1", text).replace("× ", "×\u00a0")  # no unit on a line of its own
    return textwrap.wrap(unbroken, int(inches * 9.0))  # characters of the bold title font that fit into an inch


def takeaway(what: str, values: pd.Series, others: bool = True) -> str:
    """The sentence of a title on per-seed values in per cent: dgs against lora, and the best of the others.

    Without dgs or lora it is about the best two. Differences are means over the seeds that both have; one whose 95 %
    interval spans zero is said not to be shown. `values`: index (method, seed). `others`: whether the best other method
    has a clause.
    """
    means = values.groupby("method", sort=False).mean().sort_values(ascending=False, kind="stable")
    names = [str(name) for name in means.index]
    seeds = "" if values.groupby("method").size().max() > 1 else " (one seed)"
    if len(names) == 1:
        return f"{what}: {plain(names[0])} reaches {rounded_text(means.iloc[0])} %{seeds}"
    compared = {SUBJECT, BASELINE} <= set(names)
    first, second = (SUBJECT, BASELINE) if compared else names[:2]
    found = relation(values, first, second)
    text = f"{what}: {plain(first)} is {found} {plain(second)}"
    rest = next((name for name in names if name not in (first, second)), None) if compared and others else None
    if rest is not None:
        other = relation(values, rest, second)
        nor = found == other == NOT_SHOWN
        text += f", nor is {plain(rest)}" if nor else f"; {plain(rest)} is {other} it"
    return text + seeds


def relation(values: pd.Series, first: str, second: str) -> str:
    """How one method compares to another by per-seed per cent, in words that stand before the other's name."""
    both = pd.concat([values[first], values[second]], axis=1).dropna().to_numpy()
    if not both.size:
        return "not comparable (no shared seed) to"
    gap = paired_difference(*both.T)
    if gap.known and gap.spans_zero:
        return NOT_SHOWN
    return f"{rounded_text(abs(gap.mean))} points {'above' if gap.mean > 0 else 'below'}"
