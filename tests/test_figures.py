"""Every figure draws full and degenerate tables, keeps its text inside, says what the data say, repeats its bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from dgs.analysis.figures import detection as figures
from dgs.analysis.figures.robustness import robustness_curves
from dgs.analysis.metrics import DETECTION_COLUMNS
from dgs.data.suites import SUITES, full_name
from dgs.errors import UserError

METHODS = ("probe", "lora", "dgs")
GENERATORS = (
    "transposed_adv", "upsample_kl", "bilinear", "ddpm_img2img", "pixel_shuffle", "splice", "super_resolution", "vq",
)  # fmt: skip
LEVEL = {"probe": 0.62, "lora": 0.72, "dgs": 0.74}


def make_detection(
    methods: tuple[str, ...] = METHODS, seeds: int = 5, generators: tuple[str, ...] = GENERATORS, n_seen: int = 2,
    noise: float = 0.02, rho: float = 0.9,
) -> pd.DataFrame:  # fmt: skip
    """A detection table with made-up rates: each method at its `LEVEL`, later generators harder."""
    rng = np.random.default_rng(0)
    rows = []
    for method in methods:
        for seed in range(seeds):
            for i, generator in enumerate(generators):
                rate = LEVEL.get(method, 0.7) - 0.01 * i + rng.normal(0, noise)
                rates = dict.fromkeys(("acc", "balanced_acc", "r_acc", "f_acc", "ap", "auroc"), rate)
                rates |= {"tpr_at_1fpr": 0.2, "tpr_at_5fpr": 0.4, "ece": 0.1}
                for rule in ("0.5", "val"):
                    key = (rho, method, seed, generator, i < n_seen, "native", "both", 400, 400)
                    rows.append((*key, *rates.values(), rule))
    return pd.DataFrame(rows, columns=DETECTION_COLUMNS)


def of_suites() -> pd.DataFrame:
    """A detection table of the paper's 50 generators."""
    names = tuple(full_name(suite.name, known.column) for suite in SUITES for known in suite.generators)
    return make_detection(seeds=2, generators=names)


def make_changed(
    methods: tuple[str, ...] = METHODS, seeds: int = 5,
    names: str = "jpeg:95 jpeg:30 blur:1 blur:4 resize:1.5 noise:8 png",
    fragile: float = 0.05, shift: float = 0.08, noise: float = 0.0, **more: Any,
) -> pd.DataFrame:  # fmt: skip
    """A detection table with changed images: each costs `fragile`, and makes images look real by `shift`."""
    native = make_detection(methods, seeds, noise=noise, **more)
    parts = [native]
    for name in names.split():
        for applied_to, moved in (("both", -fragile), ("fake", -shift - fragile / 2), ("real", shift - fragile / 2)):
            rates = native[["balanced_acc", "auroc", "f_acc", "r_acc"]] + moved
            parts.append(native.assign(condition=name, applied_to=applied_to, **rates))
    return pd.concat(parts, ignore_index=True)


def make_forgetting(methods: tuple[str, ...] = METHODS, seeds: int = 5, noise: float = 0.02) -> pd.DataFrame:
    """A forgetting table: the probe keeps all, lora 60 %, any other method 50 %."""
    rng = np.random.default_rng(1)
    before = {
        "zero_shot:shape": 0.9,
        "zero_shot:background": 1.0,
        "linear_probe:shape": 0.95,
        "retrieval_at_1": 0.8,
        "cka_to_frozen": 1.0,
    }
    rows = []
    for method in methods:
        kept = {"probe": 1.0, "lora": 0.6}.get(method, 0.5)
        for seed in range(seeds):
            rows += [
                (0.9, method, seed, name, value, value * kept + (rng.normal(0, noise) if kept < 1 else 0.0))
                for name, value in before.items()
            ]
            rows.append((0.9, method, seed, "cosine_drift", 0.0, 1 - kept))
            rows.append((0.9, method, seed, "silhouette", 0.1, 0.2))
            rows += [(0.9, method, seed, f"cka_block:{k}", 1.0, kept ** (k / 4)) for k in (1, 2, 3, 4)]
            rows += [(0.9, method, seed, f"cosine_drift_block:{k}", 0.0, (1 - kept) * k / 4) for k in (1, 2, 3, 4)]
    return pd.DataFrame(rows, columns=["rho", "method", "seed", "measure", "before", "after"])


def make_training(methods: tuple[str, ...] = METHODS, seeds: int = 5, validated: bool = True) -> pd.DataFrame:
    """A training log of 120 steps in 3 epochs; the probe's of 400, without losses of adapters, validated at its end."""
    rng = np.random.default_rng(2)
    rows = []
    for method in methods:
        for seed in range(seeds):
            probe = method == "probe"
            for step in range(400 if probe else 120):
                check = validated and (step == 399 if probe else step % 40 == 39)
                rate = LEVEL.get(method, 0.7) + rng.normal(0, 0.02) if check else np.nan
                loss = 0.7 * np.exp(-step / 60) + rng.normal(0, 0.02)
                others = (np.nan, np.nan) if probe else (0.5, 0.01)
                rows.append((method, seed, step // 40, step, loss, loss, *others, rate))
    names = ["method", "seed", "epoch", "step", "loss", "loss_task", "loss_text", "loss_alignment", "val_balanced_acc"]
    return pd.DataFrame(rows, columns=names)


def make_angles(methods: tuple[str, ...] = ("lora", "dgs"), seeds: int = 5, pairs: int = 3) -> pd.DataFrame:
    """Angles of one layer at 10 steps: the pairs lie at 90, 80, 70 ... degrees."""
    rows = [
        (0.9, method, seed, step, "feature", f"task_{'abcdef'[i]}", 90.0 - 10 * i, 80.0 - 10 * i, 100.0 - 10 * i)
        for method in methods
        for seed in range(seeds)
        for step in range(0, 100, 10)
        for i in range(pairs)
    ]
    return pd.DataFrame(rows, columns=["rho", "method", "seed", "step", "layer", "pair", "mean", "p05", "p95"])


def named_angles() -> pd.DataFrame:
    """`make_angles` with the names of the pairs that training logs."""
    names = {"task_a": "task-harmful", "task_b": "task-beneficial", "task_c": "task-applied"}
    return make_angles().replace({"pair": names})


def make_points(
    methods: tuple[str, ...] = ("frozen", "lora", "dgs"), generators: tuple[str, ...] = GENERATORS
) -> pd.DataFrame:
    """Map points: reals and fakes mixed in the first method, further apart in each later one."""
    rng = np.random.default_rng(3)
    names = ["real"] * 40 + [name for name in generators for _ in range(40 // len(generators))]
    label = np.array([name != "real" for name in names]).astype(int)
    parts = []
    for i, method in enumerate(methods):
        place = rng.normal(size=(len(names), 2)) + 2.0 * i * label[:, None]
        parts.append(
            pd.DataFrame({"method": method, "generator": names, "label": label, "x": place[:, 0], "y": place[:, 1]})
        )
    return pd.concat(parts, ignore_index=True)


def image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(4).integers(0, 255, (height, width, 3)).astype(np.uint8)


MANY = tuple(figures.METHOD_COLOURS)
GENERATORS_24 = tuple(f"{name}_{i}" for i in range(3) for name in GENERATORS)
LONG = tuple(f"{name}-{'of-many-words-' * 4}"[:49] + str(i) for i, name in enumerate(GENERATORS))  # 50 characters each
DRAWINGS: dict[str, Callable[[], Figure]] = {
    "bars": lambda: figures.detection_bars(make_detection()),
    "bars, nine methods": lambda: figures.detection_bars(make_detection(MANY, 2)),
    "bars, one method, one seed, no unseen": lambda: figures.detection_bars(make_detection(("dgs",), 1, ("mine",), 1)),
    "bars, nothing seen": lambda: figures.detection_bars(make_detection(n_seen=0)),
    "bars, saturated": lambda: figures.detection_bars(make_detection().assign(balanced_acc=1.0)),
    "heatmap": lambda: figures.detection_heatmap(make_detection()),
    "heatmap, nine methods": lambda: figures.detection_heatmap(make_detection(MANY, 2)),
    "heatmap, 24 generators": lambda: figures.detection_heatmap(make_detection(seeds=2, generators=GENERATORS_24)),
    "heatmap, 24 generators, nine methods": lambda: figures.detection_heatmap(
        make_detection(MANY, 2, generators=GENERATORS_24)
    ),
    "detection, a suite": lambda: figures.detection_figures(of_suites())["detection-AIGIBench"],
    "heatmap, a suite": lambda: figures.detection_figures(of_suites())["heatmap-AIGIBench"],
    "heatmap, long names": lambda: figures.detection_heatmap(make_detection(generators=LONG)),
    "bars, long names": lambda: figures.detection_bars(make_detection(generators=LONG)),
    "t-SNE, long names": lambda: figures.tsne_panels(make_points(generators=LONG)),
    "t-SNE, too few images": lambda: figures.tsne_panels(make_points().assign(x=np.nan, y=np.nan)),
    "t-SNE, too few images in one": lambda: figures.tsne_panels(
        make_points().assign(x=lambda t: t["x"].where(t["method"] != "lora"))
    ),
    "forgetting, long names": lambda: figures.forgetting_bars(
        make_forgetting().replace({"zero_shot:shape": f"zero_shot:{LONG[0]}"})
    ),
    "contact sheet, long names": lambda: figures.contact_sheet({name: [image(32, 32)] * 8 for name in LONG}),
    "heatmap, one cell": lambda: figures.detection_heatmap(make_detection(("dgs",), 1, ("mine",), 1)),
    "plane": lambda: figures.forgetting_plane(make_detection(), make_forgetting()),
    "plane, no named classes": lambda: figures.forgetting_plane(
        make_detection(), make_forgetting().query("measure == 'cka_to_frozen'")
    ),
    "plane, nine methods": lambda: figures.forgetting_plane(make_detection(MANY, 2), make_forgetting(MANY, 2)),
    "plane, one seed, no unseen": lambda: figures.forgetting_plane(
        make_detection(("dgs",), 1, ("mine",), 1), make_forgetting(("dgs",), 1)
    ),
    "plane, probe not measured": lambda: figures.forgetting_plane(make_detection(), make_forgetting(("lora", "dgs"))),
    "forgetting": lambda: figures.forgetting_bars(make_forgetting()),
    "forgetting, nine methods": lambda: figures.forgetting_bars(make_forgetting(MANY, 2)),
    "forgetting, one": lambda: figures.forgetting_bars(make_forgetting(("dgs",), 1)),
    "t-SNE": lambda: figures.tsne_panels(make_points()),
    "t-SNE, one method and generator": lambda: figures.tsne_panels(make_points(("dgs",), ("mine",))),
    "training": lambda: figures.training_curves(make_training()),
    "training, one": lambda: figures.training_curves(make_training(("dgs",), 1)),
    "training, not validated": lambda: figures.training_curves(make_training(validated=False)),
    "training, two steps": lambda: figures.training_curves(make_training(seeds=2).query("step < 2 or step == 399")),
    "training, probe alone": lambda: figures.training_curves(make_training(("probe",))),
    "angles, real pairs": lambda: figures.angles_over_training(named_angles()),
    "angles, one step": lambda: figures.angles_over_training(named_angles().query("step == 0")),
    "angles, two steps": lambda: figures.angles_over_training(named_angles().query("step <= 10")),
    "bars, two seeds": lambda: figures.detection_bars(make_detection(seeds=2, noise=0.2)),
    "plane, two seeds": lambda: figures.forgetting_plane(
        make_detection(seeds=2, noise=0.2), make_forgetting(seeds=2, noise=0.2)
    ),
    "forgetting, two seeds": lambda: figures.forgetting_bars(make_forgetting(seeds=2, noise=0.2)),
    "angles": lambda: figures.angles_over_training(make_angles()),
    "angles, one": lambda: figures.angles_over_training(make_angles(("dgs",), 1, 1)),
    "changed images": lambda: robustness_curves(make_changed()),
    "changed images, nine methods": lambda: robustness_curves(make_changed(MANY, 2)),
    "changed images, three kinds": lambda: robustness_curves(make_changed(names="jpeg:50 blur:1 noise:4")),
    "changed images, one of one method": lambda: robustness_curves(make_changed(("dgs",), 1, "jpeg:50")),
    "patches": lambda: figures.patches_figure(image(256, 320), image(224, 224)),
    "patches, few": lambda: figures.patches_figure(image(64, 96), image(224, 224)),
}


def title(fig: Figure) -> str:
    """The figure's headline on one line, with plain spaces."""
    return fig.get_suptitle().replace("\n", " ").replace("\u00a0", " ")


@pytest.mark.parametrize("name", DRAWINGS)
def test_every_figure_has_a_headline_and_keeps_its_text_inside_and_apart(name: str) -> None:
    fig = DRAWINGS[name]()
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    renderer = canvas.get_renderer()
    assert len(title(fig)) > 10
    whole = fig.get_tightbbox(renderer)
    width, height = fig.get_size_inches()
    assert whole.x0 > -0.01 and whole.y0 > -0.01 and whole.x1 < width + 0.01 and whole.y1 < height + 0.01
    panels = [ax.get_tightbbox(renderer) for ax in fig.axes if ax.axison]
    heading = fig._suptitle.get_window_extent(renderer)  # type: ignore[attr-defined]
    others = [heading, *(legend.get_window_extent(renderer) for legend in fig.legends)]
    for extent in others:
        assert all(extent.y0 >= panel.y1 - 1 or extent.y1 <= panel.y0 + 1 for panel in panels)


@pytest.mark.parametrize("name", DRAWINGS)
def test_text_is_legible_at_half_the_width_of_a_readme(name: str) -> None:
    fig = DRAWINGS[name]()
    FigureCanvasAgg(fig).draw()
    shown = 400 / fig.get_figwidth() / 72  # pixels a point when the figure is shown 400 px wide
    sizes = [text.get_fontsize() for text in fig.findobj(mpl.text.Text) if text.get_text()]
    assert min(sizes) * shown >= 9.0


@pytest.mark.parametrize("name", [name for name in DRAWINGS if name.startswith(("bars", "heatmap", "forgetting"))])
def test_labels_leave_the_plot_its_room(name: str) -> None:
    fig = DRAWINGS[name]()
    FigureCanvasAgg(fig).draw()
    for ax in fig.axes:
        box = ax.get_position()
        assert box.width > 0.45
        assert box.height * fig.get_figheight() > 0.35, "inches"


class TestShortNames:
    def test_short_ones_stay(self) -> None:
        assert figures.short_names(["vq", "a" * 20]) == {"vq": "vq", "a" * 20: "a" * 20}

    def test_long_ones_keep_both_ends(self) -> None:
        assert figures.short_names(["stable-diffusion-xl-base-1.0"])["stable-diffusion-xl-base-1.0"] == (
            "stable-diffu…ase-1.0"
        )

    def test_what_is_alike_at_both_ends_stays_distinct(self) -> None:
        names = [f"{'a' * 20}{i:02d}{'b' * 28}" for i in range(15)] + ["aaaaaaaaaaaa…bbbbbbb"]
        short = figures.short_names(names)
        assert list(short) == [*names]
        assert len(set(short.values())) == 16 and max(map(len, short.values())) == 20
        assert short == figures.short_names(names)

    @pytest.mark.parametrize("name", [name for name in DRAWINGS if "long names" in name])
    def test_figures_use_them(self, name: str) -> None:
        fig = DRAWINGS[name]()
        FigureCanvasAgg(fig).draw()
        words = {text.get_text() for text in fig.findobj(mpl.text.Text)}
        assert not any(long in word for long in LONG for word in words)
        assert sum("…" in word for word in words) == (1 if name.startswith("forgetting") else len(LONG))


def test_the_same_table_gives_the_same_bytes(tmp_path: Path) -> None:
    first = figures.save(figures.detection_bars(make_detection()), tmp_path / "a" / "deep" / "one.png")
    second = figures.save(figures.detection_bars(make_detection()), tmp_path / "two.png")
    assert first.read_bytes() == second.read_bytes()
    with Image.open(first) as picture:
        assert picture.size[0] == 900
        assert "Software" not in picture.info


def test_saving_forgets_a_pyplot_figure(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    fig = plt.figure()
    figures.save(fig, tmp_path / "x.png")
    assert not plt.fignum_exists(fig.number)


def test_a_method_has_one_colour_everywhere() -> None:
    assert len(set(figures.METHOD_COLOURS.values())) == len(set(figures.METHOD_MARKERS.values())) == len(MANY)
    assert figures.colour("dgs") == figures.METHOD_COLOURS["dgs"]
    assert figures.colour("somebody_elses") == figures.colour("somebody_elses")
    few, many = figures.detection_bars(make_detection(("dgs",))), figures.detection_bars(make_detection(MANY, 2))
    wanted = mpl.colors.to_rgba(figures.METHOD_COLOURS["dgs"])
    for fig in (few, many):
        handles = dict(zip([t.get_text() for t in fig.legends[0].texts], fig.legends[0].legend_handles, strict=True))
        assert handles["dgs"].get_facecolor() == wanted  # type: ignore[union-attr]


def lab(rgb: np.ndarray, sight: np.ndarray | None = None) -> np.ndarray:
    """CIELAB (D65) of (N, 3) sRGB fractions, through a matrix on linear RGB where sight is impaired."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    if sight is not None:
        linear = np.clip(linear @ sight.T, 0.0, 1.0)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / to_xyz.sum(axis=1)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def distances(a: Sequence[str], b: Sequence[str], sight: np.ndarray | None = None) -> np.ndarray:
    """Differences of colours (CIE 1976), (len(a), len(b)); 2 can just be seen side by side."""
    first, second = (lab(np.array([mpl.colors.to_rgb(name) for name in names]), sight) for names in (a, b))
    return np.linalg.norm(first[:, None] - second[None], axis=-1)


class TestKindsOfImage:
    """Real and generators in t-SNE panels: no method's colour, and told apart by everyone."""

    kinds = (figures._REAL_COLOUR, *figures._GENERATOR_COLOURS)
    # Machado, Oliveira & Fernandes 2009, severity 1: deuteranopia, protanopia
    blind = (
        np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
        np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    )

    def test_no_kind_has_the_colour_of_a_method(self) -> None:
        assert distances(self.kinds, list(figures.METHOD_COLOURS.values())).min() > 20.0
        assert distances(self.kinds, figures._SPARE_COLOURS).min() > 15.0

    def test_the_four_generators_of_the_figure_and_reals_differ_also_for_the_colour_blind(self) -> None:
        for sight in (None, *self.blind):
            apart = distances(self.kinds[:5], self.kinds[:5], sight)
            assert apart[~np.eye(5, dtype=bool)].min() > 25.0

    def test_neighbours_in_the_list_have_different_markers_and_none_is_that_of_reals(self) -> None:
        looks = [figures.generator_look(i) for i in range(16)]
        assert len({(look["color"], look["marker"]) for look in looks}) == 16
        assert len({look["marker"] for look in looks[:7]}) == 7
        assert figures._REAL_MARKER not in {look["marker"] for look in looks}

    def test_they_are_what_is_drawn(self) -> None:
        fig = figures.tsne_panels(make_points(("frozen", "dgs")))
        drawn = {mpl.colors.to_hex(points.get_facecolor()[0]) for ax in fig.axes for points in ax.collections}
        assert drawn == set(self.kinds)
        legend = [mpl.colors.to_hex(handle.get_color()) for handle in fig.legends[0].legend_handles]  # type: ignore[union-attr]
        assert legend == list(self.kinds)


def test_forgetting_bars_show_memory_alone() -> None:
    shown = [
        text.get_text().replace("\n", " ")
        for text in figures.forgetting_bars(make_forgetting()).axes[0].get_yticklabels()
    ]
    assert shown == [
        "zero-shot shape", "zero-shot background", "linear probe shape", "caption retrieval at 1", "CKA to frozen",
    ]  # fmt: skip


def test_the_style_ends_with_its_context() -> None:
    before = dict(mpl.rcParams)
    with figures.style():
        assert mpl.rcParams["figure.dpi"] == 150
    assert dict(mpl.rcParams) == before


class TestHeadlines:
    """A headline is a claim, so it follows the data."""

    def test_detection_is_about_dgs_against_lora(self) -> None:
        made = make_detection(noise=1e-4)
        found = title(figures.detection_bars(made))
        assert found == "dgs: higher than lora (unseen +2.0 points [+2.0, +2.0]); probe −10.0 [−10.0, −10.0]"
        swapped = made.assign(method=made["method"].map({"probe": "probe", "lora": "dgs", "dgs": "lora"}))
        found = title(figures.detection_bars(swapped))
        assert found == "dgs: lower than lora (unseen −2.0 points [−2.0, −2.0]); probe −12.0 [−12.0, −12.0]"
        alone = title(figures.detection_bars(made[made["method"] != "probe"]))
        assert alone == "dgs: higher than lora (unseen +2.0 points [+2.0, +2.0])"

    def test_detection_names_the_best_of_the_others(self) -> None:
        made = make_detection((*METHODS, "leace"), noise=1e-4)
        made.loc[made["method"] == "leace", "balanced_acc"] += 0.05  # 75 less 1 a generator
        assert "; leace +3.0 [" in title(figures.detection_bars(made))

    def test_an_interval_across_zero_is_no_difference_shown(self) -> None:
        gap = {0: 0.0, 1: 0.02, 2: -0.02}  # t(0.975, 2) * 2 / sqrt(3) = 4.97 points
        made = make_detection(("lora", "dgs"), seeds=3, noise=0.0).assign(balanced_acc=0.7)
        made["balanced_acc"] += made["seed"].map(gap).where(made["method"] == "dgs", 0.0) + 0.0
        assert (
            title(figures.detection_bars(made)) == "dgs: no difference shown to lora (unseen +0.0 points [−5.0, +5.0])"
        )

    def test_differences_are_paired_by_seed(self) -> None:
        made = make_detection(("lora", "dgs"), noise=0.0)
        made["balanced_acc"] += 0.05 * made["seed"]  # moves both alike
        assert title(figures.detection_bars(made)) == "dgs: higher than lora (unseen +2.0 points [+2.0, +2.0])"

    def test_without_dgs_or_lora_the_best_two_are_compared(self) -> None:
        made = make_detection(("probe", "lora"), noise=1e-4)
        found = title(figures.detection_bars(made))
        assert found.startswith("On unseen generators, lora leads probe by 10.0 points [+")
        assert "no difference shown in balanced accuracy: " in title(
            figures.detection_bars(make_detection(("probe", "mine"), noise=0.5))
        )

    def test_one_seed_claims_no_interval(self) -> None:
        found = title(figures.detection_bars(make_detection(seeds=1, noise=0.0)))
        assert found == "dgs to lora: unseen +2.0 points (one seed: no interval); probe −10.0 (one seed)"
        assert "(one seed: no interval)" in title(figures.detection_bars(make_detection(("probe", "lora"), seeds=1)))

    def test_without_a_seed_in_common_nothing_is_compared(self) -> None:
        made = make_detection(("lora", "dgs"))
        apart = made[(made["method"] == "lora") == (made["seed"] < 2)]
        assert "share no seed" in title(figures.detection_bars(apart))

    def test_without_unseen_generators_it_says_seen(self) -> None:
        assert "(seen +" in title(figures.detection_bars(make_detection(n_seen=8, noise=1e-4)))

    def test_the_longest_still_fit_two_lines(self) -> None:
        made = make_detection(("lora", "dgs", "product_of_experts"), seeds=2, noise=0.0).assign(balanced_acc=0.6)
        worst = made.assign(balanced_acc=lambda t: t["balanced_acc"] - 0.2 * t["seed"] * (t["method"] != "lora"))
        fig = figures.detection_bars(worst)
        assert fig.get_suptitle().count("\n") <= 1
        assert title(fig) == "dgs: no difference shown to lora (unseen −10.0 points [−137.1, +117.1])"
        assert figures.tsne_panels(make_points(MANY)).get_suptitle().count("\n") <= 1

    def test_forgetting(self) -> None:
        found = title(figures.forgetting_bars(make_forgetting(noise=0.0)))
        assert found == "dgs: lower than lora (zero-shot kept −10.0 points [−10.0, −10.0]); probe +40.0 [+40.0, +40.0]"
        same = title(figures.forgetting_bars(make_forgetting().assign(after=lambda t: t["before"])))
        assert same.startswith("dgs: no difference shown to lora (zero-shot kept +0.0 points [+0.0, +0.0])")
        other = title(figures.forgetting_bars(make_forgetting(("probe", "lora"), noise=0.0)))
        assert other == "After fine-tuning, probe leads lora by 40.0 points [+40.0, +40.0] of zero-shot kept"
        alone = title(figures.forgetting_bars(make_forgetting(("dgs",), noise=0.0)))
        assert alone == "dgs: zero-shot kept 50.0 % [50.0, 50.0]"

    def test_forgetting_across_zero_is_no_difference_shown(self) -> None:
        assert "no difference shown" in title(figures.forgetting_bars(make_forgetting(seeds=2, noise=0.3)))

    def test_plane(self) -> None:
        found = title(figures.forgetting_plane(make_detection(noise=0.0), make_forgetting(noise=0.0)))
        assert found == "dgs to lora: zero-shot kept −10.0 points [−10.0, −10.0]; unseen +2.0 points [+2.0, +2.0]"
        other = figures.forgetting_plane(
            make_detection(("probe", "lora"), noise=0.0), make_forgetting(("lora", "probe"), noise=0.0)
        )
        assert title(other) == (
            "probe to lora: zero-shot kept +40.0 points [+40.0, +40.0]; unseen −10.0 points [−10.0, −10.0]"
        )
        alone = figures.forgetting_plane(make_detection(("dgs",), 1, noise=0.0), make_forgetting(("dgs",), 1, 0.0))
        assert title(alone) == "dgs: zero-shot kept 50.0 % (one seed), balanced accuracy on unseen 69.5 % (one seed)"

    def test_plane_across_zero_is_no_difference_shown(self) -> None:
        found = title(figures.forgetting_plane(make_detection(noise=0.5), make_forgetting(noise=0.0)))
        assert "; unseen no difference shown, " in found and "kept −10.0 points" in found
        found = title(figures.forgetting_plane(make_detection(noise=0.0), make_forgetting(seeds=2, noise=0.5)))
        assert "zero-shot kept no difference shown, " in found

    def test_training_says_what_was_validated(self) -> None:
        made = make_training(("lora", "dgs"))
        found = title(figures.training_curves(made.assign(rho=0.9)))
        assert found.startswith("Final validation (seen generators, training's shortcut), ")
        for none in (made, made.assign(rho=0.5), made.assign(rho=np.nan)):
            assert title(figures.training_curves(none)).startswith("Final validation (seen generators), ")
        close = made.assign(val_balanced_acc=made["val_balanced_acc"].where(made["method"] == "x", 0.7))
        found = title(figures.training_curves(close))
        assert "no difference shown in balanced accuracy: " in found

    def test_angles(self) -> None:
        found = title(figures.angles_over_training(make_angles()))
        assert found == "Over training, task c is farthest from orthogonal in lora: 70.0° [70.0, 70.0]"
        assert "orthogonal to within 1°" in title(figures.angles_over_training(make_angles(pairs=1)))

    def test_angles_to_the_harmful_direction_are_those_of_the_method_with_surgery(self) -> None:
        angles = make_angles().replace({"pair": {"task_c": "task-harmful", "task_a": "task-applied"}})
        angles.loc[angles["pair"] == "task-applied", "mean"] = angles["method"].map({"lora": 1e-8, "dgs": 6.0})
        harmful = angles["pair"] == "task-harmful"
        angles.loc[harmful, "mean"] = angles["method"].map({"lora": 60.0, "dgs": 70.0})
        found = title(figures.angles_over_training(angles))
        assert found == "Over training, task and harmful gradient are 70.0° [70.0, 70.0] apart in dgs"
        other = angles.replace({"method": {"dgs": "mine"}})
        assert title(figures.angles_over_training(other)).endswith("apart in mine")
        assert title(figures.angles_over_training(angles[angles["method"] == "lora"])).endswith(
            "60.0° [60.0, 60.0] apart in lora"
        )

    def test_angles_are_means_of_all_steps_of_each_seed_then_over_seeds(self) -> None:
        angles = make_angles(("dgs",), seeds=2).replace({"pair": {"task_c": "task-harmful"}})
        harmful = angles["pair"] == "task-harmful"
        angles.loc[harmful, "mean"] = 80.0 + angles["seed"] - angles["step"] / 10  # 75.5 and 76.5 over 10 steps
        angles = angles[~((angles["seed"] == 1) & (angles["step"] == 0))]  # seed 1: 76.0 over 9
        half = 12.7062 * 0.25  # t(0.975, 1) * sd / sqrt(2)
        found = title(figures.angles_over_training(angles))
        assert f"75.8° [{75.75 - half:.1f}, {75.75 + half:.1f}] apart in dgs" in found
        assert "energy" not in found

    def test_one_seed_of_angles_has_no_interval(self) -> None:
        angles = make_angles(("dgs",), seeds=1).replace({"pair": {"task_c": "task-harmful"}})
        assert title(figures.angles_over_training(angles)).endswith("70.0° (one seed) apart in dgs")

    def test_a_tie_prints_as_in_the_report(self) -> None:
        for noise in (-1e-13, 0.0, 1e-13):
            made = make_detection(("dgs",), noise=0.0).assign(balanced_acc=0.6955 + noise)
            assert "reaches 69.6 % balanced accuracy [69.6, 69.6]" in title(figures.detection_bars(made))
            heat = figures.detection_heatmap(made)
            assert {text.get_text() for text in heat.axes[0].texts} >= {"69.6\n±0.0"}
            assert not any("69.5" in text.get_text() for text in heat.axes[0].texts)
            pair = make_detection(("lora", "dgs"), noise=0.0)
            pair["balanced_acc"] = pair["method"].map({"lora": 0.5, "dgs": 0.5205 + noise})
            assert "+2.1 points [+2.1, +2.1]" in title(figures.detection_bars(pair))

    def test_maps(self) -> None:
        made = figures.tsne_panels(make_points(), seed=3)
        shares = [ax.get_title("center").replace(":", "") for ax in made.axes]  # "dgs: 70 %"
        assert title(made) == f"Neighbours of the same class: {', '.join(shares)} (seed 3)"
        assert shares[0].startswith("frozen ") and shares[2].startswith("dgs ")
        assert made.get_suptitle().count("\n") <= 1
        assert title(figures.tsne_panels(make_points())).endswith(" (one seed)")
        many = title(figures.tsne_panels(make_points(MANY)))
        assert " % in 9 maps (one seed)" in many and "dgs" not in many

    def test_patches(self) -> None:
        found = title(figures.patches_figure(image(256, 256), image(224, 224)))
        assert found == "Patch selection shows the model 49 of 64 patches of 32 × 32 px, in a new order"
        assert "from only 6 patches" in title(figures.patches_figure(image(64, 96), image(224, 224)))

    def test_contact_sheet(self) -> None:
        names = ("real", "a, seen", "b, unseen", "c, unseen")
        sheet = {name: [image(32, 32)] for name in names}
        assert (
            title(figures.contact_sheet(sheet)) == "Test images: real ones, and fakes of 1 seen and 2 unseen generators"
        )
        one = {name: sheet[name] for name in names[:2]}
        assert title(figures.contact_sheet(one)) == "Test images: real ones, and fakes of 1 seen generator"


def lines(ax: mpl.axes.Axes) -> dict[str, mpl.lines.Line2D]:
    """{colour: the curve in it}."""
    return {mpl.colors.to_hex(line.get_color()): line for line in ax.lines}


class TestCurves:
    def test_steps_of_the_head_do_not_squeeze_the_adapters(self) -> None:
        fig = figures.training_curves(make_training())
        head, adapters, *_ = fig.axes
        assert [ax.get_title() or ax.get_title("left") for ax in (head, adapters)] == [
            "Stage 1: head", "Stage 2: adapters",
        ]  # fmt: skip
        assert head.get_xlim()[1] > 390 and adapters.get_xlim()[1] < 130
        assert set(lines(head)) == {figures.colour("probe")}
        assert set(lines(adapters)) == {figures.colour("lora"), figures.colour("dgs")}
        assert "means over 7" in fig.axes[2].get_xlabel() and "means over 2" in fig.axes[3].get_xlabel()

    def test_one_stage_has_no_empty_panels(self) -> None:
        assert len(figures.training_curves(make_training(("probe",))).axes) == 2
        assert len(figures.training_curves(make_training().drop(columns="loss_text")).axes) == 2

    def test_a_short_log_is_not_averaged(self) -> None:
        every = make_training(("dgs",))
        fig = figures.training_curves(every[every["step"] % 10 == 9])
        assert "means" not in fig.axes[1].get_xlabel()
        assert np.asarray(lines(fig.axes[0])[figures.colour("dgs")].get_xdata()).tolist()[:2] == [9, 19]

    @pytest.mark.parametrize(("steps", "marked"), [(1, True), (2, True), (3, False)])
    def test_fewer_than_3_points_are_marked(self, steps: int, marked: bool) -> None:
        made = make_training(("dgs",), validated=False)
        curve = figures.training_curves(made[made["step"] < steps]).axes[0].lines[0]
        assert (curve.get_marker() != "None") == marked

    @pytest.mark.parametrize("steps", [1, 2])
    def test_few_steps_of_angles_are_marked_in_a_sensible_range(self, steps: int) -> None:
        fig = figures.angles_over_training(make_angles().query(f"step < {10 * steps}"))
        low, high = fig.axes[0].get_xlim()
        assert -10 < low < 0 and 10 * (steps - 1) < high < 10 * steps
        curves = [line for line in fig.axes[0].lines if mpl.colors.to_hex(line.get_color()) != "#333333"]
        assert {line.get_marker() for line in curves} == {figures.marker("lora"), figures.marker("dgs")}
        assert len({float(np.asarray(line.get_xdata())[0]) for line in curves}) == 2, "side by side"
        assert fig.axes[0].collections, "the percentiles"
        assert fig.legends[0].get_title().get_text().startswith("bar: 5th to 95th percentile of samples, mean over")

    def test_angles_are_named_in_words(self) -> None:
        fig = figures.angles_over_training(named_angles())
        assert [ax.get_title("left") for ax in fig.axes] == [
            "task vs harmful", "task vs beneficial", "task vs applied:\nhow far it was turned",
        ]  # fmt: skip
        note = fig.legends[0].get_title().get_text()
        assert note.startswith("band: 5th to 95th percentile of samples, mean over seeds")
        assert fig.axes[0].lines[0].get_marker() == "None"


class TestWhiskers:
    """Two seeds give intervals far beyond 0 and 100 %; axes of per cent do not follow them."""

    two = (
        make_detection(seeds=2, noise=0.2).assign(balanced_acc=lambda t: t["balanced_acc"].clip(0.0, 1.0)),
        make_forgetting(seeds=2, noise=0.2).assign(after=lambda t: t["after"].clip(0.0, t["before"])),
    )

    def drawn(self, fig: Figure) -> list[tuple[float, float]]:
        """Ends of all horizontal whiskers."""
        return [
            (segment[0][0], segment[-1][0])
            for ax in fig.axes
            for bars in ax.containers
            if isinstance(bars, mpl.container.ErrorbarContainer)
            for segment in bars.lines[2][0].get_segments()
        ]

    @pytest.mark.parametrize("name", ["bars", "plane", "forgetting"])
    def test_are_cut_and_said_to_be(self, name: str) -> None:
        detection, forgetting = self.two
        fig = {
            "bars": lambda: figures.detection_bars(detection),
            "plane": lambda: figures.forgetting_plane(detection, forgetting),
            "forgetting": lambda: figures.forgetting_bars(forgetting),
        }[name]()
        FigureCanvasAgg(fig).draw()
        ends = np.array(self.drawn(fig))
        assert len(ends) and ends.min() >= -1e-9 and ends.max() <= 100.0 + 1e-9
        assert ends.min() < 1e-9 or ends.max() > 100.0 - 1e-9
        limits = np.array([ax.get_xlim() for ax in fig.axes] + ([fig.axes[0].get_ylim()] if name == "plane" else []))
        assert limits.min() >= -4.0 and limits.max() <= 104.0
        assert fig.legends[0].get_title().get_text().endswith("95 % interval, cut at 0 and 100 %")

    def test_that_stay_within_are_drawn_whole(self) -> None:
        fig = figures.detection_bars(make_detection())
        assert fig.legends[0].get_title().get_text() == "dots: seeds; whiskers: 95 % interval"
        low, high = fig.axes[0].get_xlim()
        ends = np.array(self.drawn(fig))
        assert low < ends.min() and ends.max() < high

    def test_what_is_kept_beyond_100_is_drawn(self) -> None:
        more = make_forgetting(noise=0.0).assign(after=lambda t: t["before"] * 1.2)
        fig = figures.forgetting_plane(make_detection(), more)
        assert fig.axes[0].get_xlim()[1] > 120.0

    def test_bands_of_validation_are_cut(self) -> None:
        made = make_training(("dgs",), seeds=2)
        made["val_balanced_acc"] += 0.25 * (made["seed"] - 0.5)
        low, high = figures.training_curves(made).axes[1].get_ylim()
        assert low > -10.0 and high < 110.0


def test_a_map_repeats_and_keeps_its_rows() -> None:
    rows = pd.DataFrame({"generator": ["real"] * 10 + ["vq"] * 10, "label": [0] * 10 + [1] * 10}, index=range(5, 25))
    given = {"frozen": (np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32), rows)}
    points = figures.tsne(given, seed=1)
    assert list(points.columns) == ["method", "generator", "label", "x", "y"]
    assert points["generator"].tolist() == rows["generator"].tolist()
    pd.testing.assert_frame_equal(points, figures.tsne(given, seed=1))
    with pytest.raises(ValueError, match="features of 20 rows"):
        figures.tsne({"frozen": (np.zeros((3, 4)), rows)}, seed=1)


@pytest.mark.parametrize("count", [1, 4])
def test_fewer_than_5_images_are_said_instead_of_drawn(count: int) -> None:
    rows = pd.DataFrame({"generator": ["real", "vq"] * 10, "label": [0, 1] * 10})
    features = np.random.default_rng(0).normal(size=(20, 4))
    points = figures.tsne({"frozen": (features[:count], rows[:count]), "dgs": (features, rows)}, seed=0)
    assert points.groupby("method").size().to_dict() == {"frozen": count, "dgs": 20}
    assert points.loc[points["method"] == "frozen", ["x", "y"]].isna().all(axis=None)
    assert points.loc[points["method"] == "dgs", ["x", "y"]].notna().all(axis=None)
    fig = figures.tsne_panels(points)
    words = [[text.get_text() for text in ax.texts] for ax in fig.axes]
    assert words == [["fewer than\n5 images"], []]
    assert fig.axes[0].get_title("center") == "frozen" and fig.axes[1].get_title("center").startswith("dgs: ")
    none = figures.tsne_panels(points[points["method"] == "frozen"])
    assert title(none) == "No map of features: fewer than 5 images"


def test_features_that_are_all_the_same_make_one_place() -> None:
    rows = pd.DataFrame({"generator": ["real", "vq"] * 5, "label": [0, 1] * 5})
    points = figures.tsne({"frozen": (np.ones((10, 4)), rows)}, seed=0)
    assert (points[["x", "y"]] == 0.0).all(axis=None)
    figures.tsne_panels(points)


def test_five_images_make_a_map() -> None:
    rows = pd.DataFrame({"generator": ["real", "vq", "real", "vq", "vq"], "label": [0, 1, 0, 1, 1]})
    points = figures.tsne({"frozen": (np.random.default_rng(0).normal(size=(5, 4)), rows)}, seed=0)
    assert points.notna().all(axis=None)
    assert not figures.tsne_panels(points).axes[0].texts


def test_what_cannot_be_drawn_is_refused() -> None:
    mixed = pd.concat([make_detection(rho=0.5), make_detection(rho=0.9)])
    with pytest.raises(UserError, match="mixes rho"):
        figures.detection_bars(mixed)
    with pytest.raises(UserError, match="no rows with condition"):
        figures.detection_heatmap(make_detection().assign(condition="blur"))
    drift = make_forgetting().query("measure == 'cosine_drift'")
    with pytest.raises(UserError, match="no measure to draw"):
        figures.forgetting_bars(drift)
    with pytest.raises(UserError, match="no zero_shot"):
        figures.forgetting_plane(make_detection(), drift)
    with pytest.raises(ValueError, match="canvas"):
        figures.patches_figure(image(64, 64), image(64, 64))
