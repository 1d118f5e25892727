"""Contact sheets: photographs, what a generator made of them, and the amplified difference, as a figure a generator."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from dgs.analysis.figures.images import picture_grid
from dgs.analysis.figures.style import style
from dgs.errors import UserError, did_you_mean
from dgs.stats import rounded_text
from minibench import audit, camera, generators, trivial_detectors
from minibench.camera import Bytes
from minibench.degradations import decode, encode
from minibench.splits import REAL
from minibench.train_generators import psnr

ZOOM = 2
LABELS = 160  # pixels left of the cells
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
    labels = ("photograph", "fake", f"difference\n× {AMPLIFY}")
    pictures = {name: list(some) for name, some in zip(labels, (shot, fakes, difference), strict=True)}
    return picture_grid(pictures, title, ZOOM * shot.shape[1], LABELS)


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
