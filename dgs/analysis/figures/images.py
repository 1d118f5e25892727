"""Pictures of images: grids of examples and mistakes, patch selection, an image as a model sees it, feature maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from dgs.analysis.figures import style as look
from dgs.analysis.figures.style import DPI, plain, short_names, style
from dgs.data.suites import abbreviated
from dgs.stats import rounded_text

Array = NDArray[np.uint8]
P = ParamSpec("P")
HIDDEN = "Pictures of these images are not shown (data.show_images: false)."
GAP = 8  # pixels between the cells of a grid
LABELS = 290  # pixels left of the cells, for a name of 20 characters
LINE = 27  # pixels of a line of a grid's title
NOTE = 24  # pixels of a note above a cell
NEIGHBOURS = 10  # of a point in a t-SNE panel
FEWEST = 5  # images that make a t-SNE map
_FLAT, _BUSY = "#00cfe8", "#d400d4"  # the two halves of patch selection


def of_images(draw: Callable[P, Figure]) -> Callable[Concatenate[bool, P], Figure]:
    """A figure made of pictures of the data: the one place where data.show_images, its first argument, is decided.

    Where it is false, the figure says so instead, and no pixel of an image gets into it.
    """

    @wraps(draw)
    def drawn(show_images: bool, *args: P.args, **more: P.kwargs) -> Figure:
        return draw(*args, **more) if show_images else look.nothing(HIDDEN)

    return drawn


@style()
def picture_grid(
    rows: Mapping[str, Sequence[Array]],
    title: str,
    side: int | None = None,
    labels: int = LABELS,
    notes: Mapping[str, Sequence[str]] | None = None,
) -> Figure:
    """A row of pictures a name, which stands at its left; every picture is drawn pixel by pixel, unsmoothed by axes.

    A picture whose longer side divides `side` is enlarged by repeating pixels, so that nothing is added to it; others
    are resampled. To be saved at 150 dpi.

    Args:
        rows: {name: (H, W, 3) uint8 arrays}; a name may have lines.
        side: of a cell in pixels; None: as large as the common width allows.
        labels: pixels left of the cells.
        notes: by name, a short text above each picture.
    """
    columns = max(map(len, rows.values()))
    side = side or (round(look.WIDTH * DPI) - labels) // columns - GAP
    width = labels + columns * (side + GAP)
    lines = look.title_lines(title, width / DPI)
    pitch = side + GAP + (NOTE if notes else 0)
    height = LINE * len(lines) + 2 * GAP + len(rows) * pitch
    fig = Figure(figsize=(width / DPI, height / DPI))
    fig.suptitle("\n".join(lines), x=GAP / width, y=1 - GAP / height, ha="left", va="top")
    for line, (name, pictures) in enumerate(rows.items()):
        bottom = (len(rows) - 1 - line) * pitch + GAP
        fig.text((labels - 12) / width, (bottom + side / 2) / height, name, ha="right", va="center", fontsize=10)
        for column, picture in enumerate(pictures):
            scale = side / max(picture.shape[:2])
            size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
            how = Image.Resampling.NEAREST if scale == int(scale) else Image.Resampling.LANCZOS
            left = labels + column * (side + GAP)
            fig.figimage(np.asarray(Image.fromarray(picture).resize(size, how)), xo=left, yo=bottom)
            if notes:
                at = ((left + side / 2) / width, (bottom + side + 3) / height)
                fig.text(*at, notes[name][column], ha="center", va="bottom", fontsize=9)
    return fig


@of_images
def contact_sheet(images: Mapping[str, Sequence[Array]]) -> Figure:
    """A row of examples a kind of image, named at its left: `images` = {name: (H, W, 3) uint8 arrays}.

    Names are those of `manifest.examples`: "real", "<generator>, real", and "<generator>, seen" or "..., unseen" fakes.
    """
    short = short_names(images)
    short |= {name: abbreviated(name).replace(", ", "\n") for name in images if abbreviated(name) != name}  # of suites
    counts = {kind: sum(name.endswith(f", {kind}") for name in images) for kind in ("seen", "unseen")}
    said = " and ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    fakes = f": real ones, and fakes of {said} generator{'s' if sum(counts.values()) > 1 else ''}" if said else ""
    return picture_grid({short[name]: row for name, row in images.items()}, f"Test images{fakes}")


@of_images
def mistakes_sheet(mistakes: pd.DataFrame, images: Sequence[Array]) -> Figure:
    """The most confident mistakes, a row a generator: each image with the probability that the model gave.

    `mistakes`: the table of `explore.confident_mistakes`; `images`: one a row of it.
    """
    if mistakes.empty:
        return look.nothing("No mistakes to show: none among the scores, or no scores yet (dvc repro makes them).")
    short = short_names(mistakes["group"].unique())
    table = mistakes.assign(image=pd.Series(list(images), mistakes.index, object), group=mistakes["group"].map(short))
    table["note"] = [f"{rounded_text(value, 0)} %" for value in 100.0 / (1.0 + np.exp(-table["logit"]))]
    rows, notes = ({str(n): list(part) for n, part in table.groupby("group", sort=False)[c]} for c in ("image", "note"))
    surest = table["group"].iloc[int(table["logit"].abs().to_numpy().argmax())]
    title = f"Most confident mistakes, with the probability of being generated; the surest is of {surest}"
    return picture_grid(rows, title, notes=notes)


@of_images
@style(axes__grid=False)
def patches_figure(image: Array, canvas: Array, size: int) -> Figure:
    """Patch selection before and after: the image with its grid of patches, and the canvas a model sees.

    `image`: (H, W, 3) uint8; `canvas`: (n * size, n * size, 3) uint8, as `dgs.data.patches.select_patches` returns it;
    `size`: of a patch, px. Raises ValueError for a canvas that is not a square of patches.
    """
    if canvas.ndim != 3 or canvas.shape[0] != canvas.shape[1] or canvas.shape[0] % size or canvas.shape[0] == 0:
        raise ValueError(f"expected a canvas of shape (n * {size}, n * {size}, 3), found {canvas.shape}")
    fig, axes = look.panels(2, 4.0)
    for ax, (title, pixels) in zip(axes, {"Before": image, "After": canvas}.items(), strict=True):
        _picture(ax, pixels, title)
        rows, columns = pixels.shape[0] // size, pixels.shape[1] // size
        ax.hlines(np.arange(rows + 1) * size - 0.5, -0.5, columns * size - 0.5, "white", linewidth=0.6)
        ax.vlines(np.arange(columns + 1) * size - 0.5, -0.5, rows * size - 0.5, "white", linewidth=0.6)
        ax.set_xlabel(f"{pixels.shape[1]} × {pixels.shape[0]} px")
    found, count = ((pixels.shape[0] // size) * (pixels.shape[1] // size) for pixels in (image, canvas))
    patches = f"{found} patches of {size} × {size} px"
    shows = f"shows the model {count} of {patches}, in a new order"
    return look.finish(
        fig, f"Patch selection {shows if found >= count else f'fills {count} cells from only {patches}'}"
    )


@of_images
@style(axes__grid=False)
def portrait(
    image: Array, view: Array, title: str, caption: str, patches: NDArray[np.int32] | None, patch_size: int
) -> Figure:
    """An image with the patches that selection keeps outlined, and beside it what the model sees.

    `image`: (H, W, 3) uint8; `view`: (S, S, 3) uint8; `patches`: indices of patches, the flattest half first, or None.
    """
    fig, (left, right) = look.panels(2, 3.3)
    _picture(left, image, f"{image.shape[1]} × {image.shape[0]} px")
    _picture(right, view, "what the model sees")
    if patches is None:
        fig.supxlabel(f"“{caption}”", fontsize=10)
        return look.finish(fig, title)
    for place, index in enumerate(patches):
        y, x = divmod(int(index), image.shape[1] // patch_size)
        hue = _FLAT if place < len(patches) // 2 else _BUSY
        corner, side = (x * patch_size, y * patch_size), patch_size - 1
        left.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=hue, linewidth=1.1))
    handles = [look.handle("flattest patches", color=_FLAT), look.handle("busiest patches", color=_BUSY)]
    return look.finish(fig, title, f"“{caption}”", more=handles)


def _picture(ax: Axes, pixels: Array, title: str) -> None:
    ax.imshow(pixels, interpolation="nearest")
    ax.set(title=title, xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def tsne(features_by_method: Mapping[str, tuple[np.ndarray, pd.DataFrame]], seed: int) -> pd.DataFrame:
    """Points of a t-SNE map a method (van der Maaten & Hinton 2008; scikit-learn, PCA start).

    `features_by_method`: method -> (features, rows), (N, D) floats and a table of the same N images with the columns
    generator and label (0 real, 1 fake). Returns columns method, generator, label, x, y (float64, arbitrary units).
    Fewer than 5 images make no map: their rows are kept with NaN for x and y, and `tsne_panels` says so in their
    place. One thread and one seed: the same points each time. Raises ValueError for lengths that differ.
    """
    parts = []
    for method, (features, rows) in features_by_method.items():
        data = np.asarray(features, dtype=np.float64)
        if data.ndim != 2 or len(data) != len(rows):
            raise ValueError(f"expected (N, D) features of {len(rows)} rows, found {data.shape}")
        place = np.full((len(data), 2), np.nan)
        if len(data) >= FEWEST and (data == data[0]).all():
            place[:] = 0.0  # a collapsed tower: the PCA start would divide by a variance of 0
        elif len(data) >= FEWEST:
            with threadpool_limits(limits=1):  # sums over threads depend on their number
                perplexity = min(30.0, (len(data) - 1) / 3.0)
                map_of = TSNE(n_components=2, init="pca", perplexity=perplexity, random_state=seed)
                place = map_of.fit_transform(data).astype(np.float64)
        points = rows[["generator", "label"]].reset_index(drop=True)
        parts.append(points.assign(method=method, x=place[:, 0], y=place[:, 1]))
    return pd.concat(parts, ignore_index=True)[["method", "generator", "label", "x", "y"]]


@style(axes__grid=False, axes__spines__top=True, axes__spines__right=True)
def tsne_panels(points: pd.DataFrame, seed: int | None = None) -> Figure:
    """t-SNE maps side by side, a panel a method (the paper's figure 1): reals black dots, each generator its own look.

    `points`: columns method, generator, label (0 real, 1 fake), x, y, as `tsne` returns them; `seed`: that of the
    checkpoints whose features they are, named in the title ("one seed" where it is not given). A panel's number is the
    share of the 10 nearest neighbours in the map that are of a point's own class, averaged over reals and over fakes:
    50 % = mixed, 100 % = apart. A method without a map (NaN: fewer than 5 images) gets a panel that says so. Colours
    and markers of kinds are no method's, so that a colour means one thing in all figures.
    """
    methods = list(points["method"].unique())
    generators = list(points.loc[points["label"] == 1, "generator"].unique())
    short = short_names(generators)
    real: dict[str, Any] = {"marker": look.REAL_MARKER, "color": look.REAL_COLOUR}
    looks = {generator: look.generator_look(i) for i, generator in enumerate(generators)}
    mapped = points.dropna(subset=["x", "y"])
    apart = {str(m): _neighbour_agreement(part) for m, part in mapped.groupby("method", sort=False)}
    columns = min(3, len(methods))
    fig, axes = look.panels(len(methods), 0.6, 2.2 if columns == 3 else 2.8, columns)
    for ax, method in zip(axes, methods, strict=True):
        part = mapped[mapped["method"] == method]
        reals, fakes = part[part["label"] == 0], part[part["label"] == 1]
        ax.scatter(reals["x"], reals["y"], s=5, alpha=0.7, linewidths=0, **real)
        for generator, its in looks.items():
            fake = fakes[fakes["generator"] == generator]
            ax.scatter(fake["x"], fake["y"], s=13, alpha=0.75, linewidths=0, **its)
        share = f": {rounded_text(apart[method], 0)} %" if method in apart else ""
        if not share:
            ax.text(0.5, 0.5, f"fewer than\n{FEWEST} images", transform=ax.transAxes, ha="center", va="center")
        named = look.title_lines(method.replace("_", " ") + share, look.WIDTH / columns)
        ax.set_title("\n".join(named), loc="center")
        ax.set(xticks=[], yticks=[], box_aspect=1.0)
    names = {"real": real} | {short[generator]: its for generator, its in looks.items()}
    handles = [look.handle(name, linestyle="", **its) for name, its in names.items()]
    in_legend = 3 if max(map(len, short.values()), default=0) < 16 else 2
    claim = _neighbours_takeaway(apart, "one seed" if seed is None else f"seed {seed}")
    return look.finish(fig, claim, "t-SNE axes have no unit", more=handles, columns=in_legend)


def _neighbour_agreement(part: pd.DataFrame) -> float:
    label = part["label"].to_numpy()
    place = part[["x", "y"]].to_numpy(dtype=np.float64)
    count = min(NEIGHBOURS, len(part) - 1)
    nearest = NearestNeighbors(n_neighbors=count).fit(place).kneighbors(return_distance=False)
    same = (label[nearest] == label[:, None]).mean(axis=1)
    return float(100.0 * np.mean([same[label == value].mean() for value in np.unique(label)]))


def _neighbours_takeaway(apart: Mapping[str, float], seed: str) -> str:
    """One sentence on the shares (%) of neighbours of the same class, {method: share}: numbers, no winner."""
    if not apart:
        return f"No map of features: fewer than {FEWEST} images"
    shares = [f"{plain(method)}\u00a0{rounded_text(value, 0)}\u00a0%" for method, value in apart.items()]
    text = f"Neighbours of the same class: {', '.join(shares)} ({seed})"
    if len(look.title_lines(text)) <= 2:
        return text  # else the panels name them
    low, high = (rounded_text(end, 0) for end in (min(apart.values()), max(apart.values())))
    return f"Neighbours of the same class: {low} to {high} % in {len(shares)} maps ({seed})"
