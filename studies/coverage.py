"""How often an interval holds the truth: simulated scores of two methods with known effects of seeds, generators and
images. The table is results/study/coverage.csv; `python -m studies.coverage` writes it (about a minute of CPU)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from numpy.typing import NDArray
from scipy.special import ndtr

from dgs.commands import for_users
from dgs.crossed import BLOCKS, RATES, crossed_interval
from dgs.stats import seed_interval, share_interval
from dgs.workspace import find_root

SIZES = ((5, 7), (3, 4))  # seeds and generators
IMAGES = 200  # fakes of each generator, and photographs that all share
GROUPS = np.repeat(np.arange(IMAGES), 1 + np.arange(IMAGES) % 11)[:IMAGES]  # 1 to 11 images, where images have groups
DRAWS = 500  # of every case


@dataclass(frozen=True)
class Effects:
    """Spread (sd) of a method's margin, in units in which single images spread by 1, beside its two means.

    A margin is a logit with the sign of the label: above 0 the verdict is right.

    means: of both methods. seed: training again. threshold: the same, but what fakes gain photographs lose. generator,
    both: of fakes, by generator, and by seed and generator. own: the share of an image's spread that one method alone
    has, in every seed; new: that each seed has anew; the rest both methods share.
    """

    means: tuple[float, float]
    seed: float
    threshold: float
    generator: float
    both: float
    own: float
    new: float
    grouped: bool = False  # images of one of `GROUPS` are alike but for `new`


# Their parts of the variance are about those of `mini`: dgs minus lora (alike), dgs_plus minus lora (apart). In the
# third case generators differ by chance alone, and the fourth has groups, as the real pictures.
CASES = {
    "alike": Effects((0.48, 0.53), 0.02, 0.10, 0.05, 0.05, 0.15, 0.10),
    "apart": Effects((0.75, 0.53), 0.02, 0.10, 0.20, 0.08, 0.45, 0.15),
    "no generator effect": Effects((0.53, 0.53), 0.02, 0.10, 0.0, 0.0, 0.25, 0.10),
    "groups": Effects((0.75, 0.53), 0.02, 0.10, 0.20, 0.08, 0.45, 0.15, grouped=True),
}


def truth(effects: Effects) -> float:
    """The difference in balanced accuracy, a fraction: a margin is normal, so that its sign has a closed form."""
    alike = 1.0 + effects.seed**2 + effects.threshold**2
    spreads = (alike, alike + effects.generator**2 + effects.both**2)
    first, second = (np.mean([ndtr(mean / np.sqrt(spread)) for spread in spreads]) for mean in effects.means)
    return float(first - second)


def logits(effects: Effects, seeds: int, generators: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """(methods, seeds, 1 + generators, images): of the shared photographs, then of each generator's fakes."""
    shape = (2, seeds, 1 + generators, IMAGES)
    margin = np.array(effects.means)[:, None, None, None] + effects.seed * rng.normal(size=(2, seeds, 1, 1))
    rest = np.sqrt(1 - effects.own - effects.new)
    one_of_each = np.searchsorted(GROUPS, GROUPS) if effects.grouped else np.arange(IMAGES)
    for spread, methods in ((rest, 1), (np.sqrt(effects.own), 2)):
        margin = margin + spread * rng.normal(size=(methods, 1, *shape[2:]))[..., one_of_each]
    margin = margin + np.sqrt(effects.new) * rng.normal(size=shape)
    margin[:, :, 1:] += effects.generator * rng.normal(size=(2, 1, generators, 1))
    margin[:, :, 1:] += effects.both * rng.normal(size=(2, seeds, generators, 1))
    threshold = effects.threshold * rng.normal(size=(2, seeds, 1, 1))
    sign = np.where(np.arange(1 + generators) == 0, -1.0, 1.0)[:, None]
    found: NDArray[np.float64] = sign * margin + threshold
    return found


def cells(scores: NDArray[np.float64], rate: str, grouped: bool = False) -> NDArray[np.float64]:
    """`crossed_interval`'s table of the first method minus the second."""
    of = GROUPS if grouped else np.arange(IMAGES) % BLOCKS
    blocks = int(of.max()) + 1
    _, seeds, makers, _ = scores.shape
    table = np.empty((2, seeds, makers - 1, 1 + blocks))
    for method, seed, maker in np.ndindex(table.shape[:3]):
        reals, fakes = scores[method, seed, 0], scores[method, seed, 1 + maker]
        table[method, seed, maker] = RATES[rate](reals, fakes, of, of, blocks)
    return np.moveaxis(table[0] - table[1], -1, 0)


def coverage(draws: int = DRAWS) -> Iterator[dict[str, Any]]:
    """A row for each case, size and rate: the share of intervals that hold the truth, with its 95 % Wilson interval.

    The truth of AP, which depends on the number of images, is the mean over all draws.
    """
    for (number, (case, effects)), (seeds, generators), rate in product(enumerate(CASES.items()), SIZES, RATES):
        rng = np.random.default_rng([number, seeds, generators])
        tables = [cells(logits(effects, seeds, generators, rng), rate, effects.grouped) for _ in range(draws)]
        crossed = np.array([crossed_interval(table).interval for table in tables])
        plain = np.array([seed_interval(table[0].mean(1)) for table in tables])
        known = truth(effects) if rate == "balanced_acc" else float(crossed[:, 0].mean())
        held = [int(((of[:, 1] <= known) & (known <= of[:, 2])).sum()) for of in (crossed, plain)]
        share = share_interval(held[0], draws)
        yield {
            "case": case, "rate": rate, "seeds": seeds, "generators": generators, "images": IMAGES, "draws": draws,
            "truth": known, "sd": crossed[:, 0].std(), "crossed": share.mean, "low": share.low, "high": share.high,
            "over_seeds": held[1] / draws, "width_crossed": np.median(crossed[:, 2] - crossed[:, 1]),
            "width_over_seeds": np.median(plain[:, 2] - plain[:, 1]),
        }  # fmt: skip


def main(
    out: Annotated[Path | None, typer.Option(help="table; default results/study/coverage.csv")] = None,
    draws: Annotated[int, typer.Option(min=2, help="of every case")] = DRAWS,
) -> None:
    """Write the table and print it."""
    table = pd.DataFrame(coverage(draws)).round(4)
    table.to_csv(out or find_root() / "results" / "study" / "coverage.csv", index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    with for_users():
        typer.run(main)
