"""Figures of the gradient-angle analysis: what they say is what the tables say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from test_angles import noted
from test_figures import title

from dgs.analysis.angles import UNSEEN, WITHIN, angle_table, batch_table, one_sample, text_head_ranks
from dgs.analysis.figures import angles as figures
from dgs.analysis.figures.plane import VECTOR_COLOURS, surgery_sketch
from dgs.analysis.figures.style import FAMILIES, save
from dgs.model.surgery import suppress

Logged = tuple[pd.DataFrame, ...]


@pytest.fixture(scope="module")
def logged() -> Logged:
    """lora and dgs, three seeds, eight steps: real images 80 degrees from harm, fakes 60."""
    journals = []
    for method in ("lora", "dgs"):
        for seed in range(3):
            radians = torch.deg2rad(80.0 - 20.0 * torch.arange(8).remainder(2))
            task = torch.stack([radians.cos(), radians.sin(), torch.zeros(8)], dim=1)
            harm = torch.tensor([[1.0, 0.0, 0.0]]).repeat(8, 1)
            applied = suppress(task, harm, eps=0.0) if method == "dgs" else task
            vectors = {"task": task, "harmful": harm, "beneficial": -harm.roll(1, 1), "applied": applied}
            journals.append(noted(vectors, method, seed, range(0, 80, 10), ("0.q", "10.v", "2.k")))
    return tuple(
        pd.concat([getattr(journal, name) for journal in journals]) for name in ("samples", "layers", "batches")
    )


def said(fig: Figure) -> str:
    return " ".join(text.get_text() for text in fig.texts)


def test_ridges_part_real_from_fake(logged: Logged) -> None:
    fig = figures.angle_ridges(logged[0])
    assert title(fig) == "In dgs, task and harmful are 80° apart for real images, 60° for fakes"
    left = fig.axes[0]
    assert len(left.collections) == figures.RIDGES == len(left.get_yticks())
    real = left.collections[0].get_paths()[0].vertices
    assert real[np.argmax(real[:, 1]), 0] == pytest.approx(80, abs=0.6), "the filled ridge is of real images"
    fake = left.lines[0].get_xydata()
    assert fake[np.argmax(fake[:, 1]), 0] == pytest.approx(60, abs=0.6)


def test_the_sketch_draws_the_sample_it_names(logged: Logged) -> None:
    row = one_sample(logged[0], "dgs", 0)
    fig = surgery_sketch(logged[0], 0)
    apart = 60 if row["label"] == 1 else 80
    assert f"{apart}° from harm" in title(fig) and f"turned by {90 - apart}°" in title(fig)
    tips = [text.xy for text in fig.axes[0].texts]
    radians = np.radians(apart)
    assert any(np.allclose(tip, (np.cos(radians), np.sin(radians)), atol=1e-6) for tip in tips), "the task gradient"
    assert any(np.allclose(tip, (0, np.sin(radians)), atol=1e-6) for tip in tips), "what is applied"
    assert all(text.arrow_patch.shrinkB == 0 for text in fig.axes[0].texts), "an arrow ends where its vector does"
    across, up = (np.diff(axis.get_majorticklocs())[0] for axis in (fig.axes[0].xaxis, fig.axes[0].yaxis))
    assert across == pytest.approx(up), "one unit both ways"
    assert not set(VECTOR_COLOURS.values()) & set(FAMILIES), "no gradient has the colour of a method"


def test_the_layer_map_shows_methods_that_turn_and_orders_blocks_by_number(logged: Logged) -> None:
    table = angle_table(*logged[:2], ["task-applied"], 0.9)
    fig = figures.layer_heatmap(table)
    panel = fig.axes[0]
    assert panel.get_title(loc="left") == "dgs"
    assert [label.get_text() for label in panel.get_yticklabels()] == ["0 q", "2 k", "10 v"]
    assert title(fig).startswith("dgs turns the adapters' gradients by")
    assert "No method here turns" in said(figures.layer_heatmap(table[table["method"] == "lora"]))


def test_energies_and_ranks_over_training(logged: Logged) -> None:
    fig = figures.surgery_over_training(batch_table(logged[0], logged[2], 0.9))
    expected = 100 * np.mean([np.cos(np.radians(a)) ** 2 for a in (60, 80)])
    assert f"dgs removes {expected:.1f} % of the task gradients' energy and adds 0.0 %" in title(fig)
    assert fig.axes[1].get_title(loc="left") == "", "nothing is cut"
    assert "No gradients were logged" in said(figures.surgery_over_training(pd.DataFrame()))


def test_a_peak_that_is_cut_is_named(logged: Logged) -> None:
    table = batch_table(logged[0], logged[2], 0.9)
    table.loc[(table["method"] == "dgs") & (table["step"] == 0), "added"] = 3.0
    panel = figures.surgery_over_training(table).axes[1]
    assert panel.get_title(loc="left") == "cut: peaks reach 300 %" and panel.get_ylim()[1] < 300


def test_ranks_by_head() -> None:
    captions = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    ranks = text_head_ranks(captions, np.arange(64) % 2, seed=0, steps=10)
    fig = figures.rank_figure(ranks)
    mean = ranks.groupby("head")["effective_rank"].mean()
    assert title(fig) == (
        f"Effective rank of a batch's harmful directions: {mean['linear']:.1f} under a linear head (2 at most), "
        f"{mean['MLP']:.1f} under an MLP"
    )
    assert fig.axes[1].get_ylim()[0] < 0, "the linear head's angle of 0 is drawn above the axis"


def test_a_forest_counts_the_intervals_that_exclude_zero() -> None:
    rows = [("angle task-harmful", WITHIN, name, 10, 5, 0.5, low, 0.9) for name, low in ((UNSEEN, -0.3), ("a", 0.1))]
    columns = ["measure", "method", "generator", "runs", "seeds", "r", "low", "high"]
    table = pd.DataFrame(rows, columns=columns)
    fig = figures.correlation_forest(table)
    assert title(fig) == ("The task to harmful angle: 1 of 2 intervals exclude zero; on all unseen r = 0.50")
    assert "Too few runs" in said(figures.correlation_forest(table.assign(low=np.nan)))


def test_subspaces_name_the_mean_and_what_chance_would_give(tmp_path) -> None:  # type: ignore[no-untyped-def]
    rows = [
        (0.9, "lora", seed, other, 1 - seed if other == "lora" else seed, layer, "output", mean, 0.0, 78.0)
        for seed in (0, 1)
        for other, mean in (("dgs", 30.0 + 2 * seed), ("lora", 70.0))
        for layer in ("0.q", "0.k")
    ]
    columns = ["rho", "method", "seed", "other_method", "other_seed", "layer", "side", "mean", "smallest", "random"]
    fig = figures.subspace_figure(pd.DataFrame(rows, columns=columns))
    assert title(fig) == "dgs and lora write into subspaces 31° apart on average; random ones are 78° apart"
    first = save(fig, tmp_path / "a.png").read_bytes()
    again = save(figures.subspace_figure(pd.DataFrame(rows, columns=columns)), tmp_path / "b.png").read_bytes()
    assert first == again, "figures repeat to the byte"
    assert "Fewer than two runs" in said(figures.subspace_figure(pd.DataFrame(columns=columns)))
