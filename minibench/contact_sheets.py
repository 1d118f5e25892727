"""Contact sheets: photographs, what a generator made of them, and the amplified difference, as a figure a generator."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from dgs.analysis.figures.detection import DPI, style
from dgs.errors import UserError, did_you_mean
from dgs.stats import rounded_text
from minibench import audit, camera, generators, trivial_detectors
from minibench.degradations import decode, encode
from minibench.splits import REAL
from minibench.train_generators import psnr

Bytes = NDArray[np.uint8]

ZOOM = 2
GAP = 8  # pixels between cells
LABELS = 132  # pixels left of the cells
HEAD = 26  # pixels of one line of the title
AMPLIFY = 8  # factor of the difference
LARGEST = 150_000  # bytes of one sheet
COLOURS = (256, 128, 64, 32)  # palettes to try, from the finest


def contact_sheet(folder: Path, generator: str, count: int = 8) -> Figure:
    """The first `count` test fakes of a generator under their photographs, above the difference between the two.

    The photograph is shot anew from the scene's id and saved at the fake's own JPEG quality, as it would be if the
    scene were a real one: what differs is the generator's doing. The difference is grey plus `AMPLIFY` times (fake
    minus photograph). Pixels are drawn at twice their size, unsmoothed. Raises UserError for a generator without test
    fakes.
    """
    test = audit.tables(folder)["test"]
    makers = [str(name) for name in test["generator"].unique() if name != REAL]
    if generator not in makers:
        raise UserError(
            f"Expected a generator of the test pack ({', '.join(makers)}), found '{generator}'."
            f"{did_you_mean(generator, makers)} Name one of these."
        )
    rows = test[test["generator"] == generator].head(count)
    fakes = np.stack([decode(file) for file in rows["image"]])
    shot = photographs(rows)
    apart = (fakes.astype(np.int64) - shot) * AMPLIFY + 128
    difference = np.clip(apart, 0, 255).astype(np.uint8)
    quality = psnr(shot, fakes)
    title = (
        f"{generator}: {_decoder(generator)} These fakes are {rounded_text(quality)}\u00a0dB from photographs of their "
        "scenes."
    )
    labels = ("photograph", "fake", f"difference × {AMPLIFY}")
    return _figure([shot, fakes, difference], labels, title)


def write_sheets(folder: Path, out: Path) -> list[Path]:
    """One PNG a test generator, `<out>/<generator>.png`, below 150 kB and with bytes that repeat; returns the paths."""
    test = audit.tables(folder)["test"]
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in test["generator"].unique():
        if name != REAL:
            paths.append(out / f"{name}.png")
            paths[-1].write_bytes(png(contact_sheet(folder, str(name))))
    return paths


def png(fig: Figure) -> bytes:
    """A figure as PNG with the finest palette that keeps it below 150 kB; no date, no software entry.

    Raises UserError where even the coarsest palette does not.
    """
    with style():
        canvas = FigureCanvasAgg(fig)
        canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    for colours in COLOURS:
        buffer = io.BytesIO()
        picture.quantize(colours, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
        if buffer.tell() < LARGEST:
            return buffer.getvalue()
    raise UserError(f"Expected a sheet below {LARGEST} bytes, found {buffer.tell()}. Show fewer images.")


def source(scene: str) -> tuple[int, str, int]:
    """The (seed, split, index) of a scene's id: "1-test-000123" -> (1, "test", 123)."""
    seed, _, rest = scene.partition("-")
    split, _, index = rest.rpartition("-")
    return int(seed), split, int(index)


def photographs(rows: pd.DataFrame) -> Bytes:
    """Photographs of the scenes of a pack's rows, saved at the quality of the row's own file: (N, H, W, 3) uint8."""
    qualities = trivial_detectors.jpeg_quality(trivial_detectors.samples(rows))[:, 0]
    return np.stack(
        [
            decode(encode(camera.crop(camera.shoot(*source(scene), camera.MARGIN)[1]), int(quality)))
            for scene, quality in zip(rows["scene"], qualities, strict=True)
        ]
    )


def _decoder(generator: str) -> str:
    """The first line of the docstring of a generator's class."""
    return (type(generators.create(generator)).__doc__ or "").strip().splitlines()[0].replace("`", "")


def _figure(images: list[Bytes], labels: tuple[str, ...], title: str) -> Figure:
    count, side = len(images[0]), images[0].shape[1] * ZOOM
    width = LABELS + count * (side + GAP)
    lines = textwrap.wrap(title, max(20, width // 10))
    height = HEAD * len(lines) + 2 * GAP + len(images) * (side + GAP)
    with style(), mpl.rc_context({"font.size": 8.0}):
        fig = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
        fig.text(GAP / width, 1 - GAP / height, "\n".join(lines), va="top", weight="bold", linespacing=1.3)
        for row, (name, some) in enumerate(zip(labels, images, strict=True)):
            bottom = (len(images) - 1 - row) * (side + GAP) + GAP
            fig.text(GAP / width, (bottom + side / 2) / height, name.replace(" × ", "\n× "), va="center")
            for column, image in enumerate(some):
                # figimage puts pixels on the canvas as they are: axes would resample them.
                zoomed = image.repeat(ZOOM, 0).repeat(ZOOM, 1)
                fig.figimage(zoomed, xo=LABELS + column * (side + GAP), yo=bottom)
    return fig
