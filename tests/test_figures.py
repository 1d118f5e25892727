"""Every figure draws full and degenerate tables, keeps its text inside and legible, and says what the data say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from dgs.analysis.differences import difference_table, is_crossed
from dgs.analysis.figures import style
from dgs.analysis.figures.angles import angles_over_training
from dgs.analysis.figures.detection import (
    by_suites,
    condition_forest,
    detection_by_generator,
    detection_heatmap,
    difference_forest,
    reliability_diagram,
    risk_coverage,
    robustness_curves,
    score_histograms,
)
from dgs.analysis.figures.forgetting import forgetting_blocks, forgetting_measures, forgetting_plane
from dgs.analysis.figures.images import contact_sheet, patches_figure, tsne, tsne_panels
from dgs.analysis.figures.training import training_curves
from dgs.analysis.metrics import DETECTION_COLUMNS, per_seed_values
from dgs.data.suites import SUITES, full_name
from dgs.errors import UserError
from dgs.model.methods.registry import METHODS as ALL_METHODS

METHODS = ("probe", "lora", "dgs")
GENERATORS = (
    "transposed_adv", "upsample_kl", "bilinear", "ddpm_img2img", "pixel_shuffle", "splice", "super_resolution", "vq",
)  # fmt: skip
LEVEL = {"probe": 0.62, "lora": 0.72, "dgs": 0.74}


def grid(**levels: Iterable[Any]) -> pd.DataFrame:
    """A row for each combination of values, the last column's varying fastest."""
    return pd.MultiIndex.from_product(levels.values(), names=levels).to_frame(index=False)


def make_detection(
    methods: tuple[str, ...] = METHODS, seeds: int = 5, generators: tuple[str, ...] = GENERATORS, n_seen: int = 2,
    noise: float = 0.02, rho: float = 0.9,
) -> pd.DataFrame:  # fmt: skip
    """A detection table with made-up rates: each method at its `LEVEL`, later generators harder."""
    made = grid(method=methods, seed=range(seeds), generator=generators)
    place = made["generator"].map(generators.index)
    rate = made["method"].map(LEVEL).fillna(0.7) - 0.01 * place
    rate += np.random.default_rng(0).normal(0, noise, len(made))
    made = made.assign(**dict.fromkeys(("acc", "balanced_acc", "r_acc", "f_acc", "ap", "auroc"), rate))
    made = made.assign(seen=place < n_seen, n_real=400, n_fake=400, tpr_at_1fpr=0.2, tpr_at_5fpr=0.4, ece=0.1)
    made = made.assign(rho=rho, condition="native", applied_to="both")
    return made.merge(pd.DataFrame({"threshold_rule": ["0.5", "val"]}), how="cross")[DETECTION_COLUMNS]


@cache
def of_suites() -> dict[str, Figure]:
    """Figures of a detection table of the paper's 50 generators."""
    names = tuple(full_name(suite.name, known.column) for suite in SUITES for known in suite.generators)
    table = make_detection(seeds=2, generators=names)
    drawn = {"detection": detection_by_generator, "heatmap": detection_heatmap}
    return {key: figure for name, of in drawn.items() for key, figure in by_suites(name, of, table).items()}


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
    known = {
        "zero_shot:shape": 0.9, "zero_shot:background": 1.0, "linear_probe:shape": 0.95, "retrieval_at_1": 0.8,
        "cka_to_frozen": 1.0,
    }  # fmt: skip
    runs = grid(rho=[0.9], method=methods, seed=range(seeds))
    kept = runs["method"].map({"probe": 1.0, "lora": 0.6}).fillna(0.5)
    moved = np.random.default_rng(1).normal(0, noise, (len(known), len(runs))) * (kept < 1).to_numpy()
    made = {name: (value, value * kept + own) for (name, value), own in zip(known.items(), moved, strict=True)}
    made |= {"cosine_drift": (0.0, 1 - kept), "silhouette": (0.1, kept * 0 + 0.2)}
    made |= {f"cka_block:{k}": (1.0, kept ** (k / 4)) for k in (1, 2, 3, 4)}
    made |= {f"cosine_drift_block:{k}": (0.0, (1 - kept) * k / 4) for k in (1, 2, 3, 4)}
    parts = [runs.assign(measure=name, before=before, after=after) for name, (before, after) in made.items()]
    return pd.concat(parts, ignore_index=True)


def make_differences(detection: pd.DataFrame, forgetting: pd.DataFrame | None = None) -> pd.DataFrame:
    """Differences whose crossed intervals reach a point further than those over seeds, and p 0.02."""
    made = difference_table(per_seed_values(detection, forgetting), detection)
    crossed = is_crossed(made) & (made["n_seeds"] > 1)
    ends = {"low": made["low_seeds"] - 0.01, "high": made["high_seeds"] + 0.01, "p": 0.02, "p_holm": 0.04}
    return made.assign(**{name: made[name].where(~crossed, value) for name, value in ends.items()})


def forest(detection: pd.DataFrame, forgetting: pd.DataFrame | None = None) -> Figure:
    return difference_forest(make_differences(detection, forgetting), forgetting)


def make_training(methods: tuple[str, ...] = METHODS, seeds: int = 5, validated: bool = True) -> pd.DataFrame:
    """A training log of 120 steps in 3 epochs; the probe's of 400, without losses of adapters, validated at its end."""
    rng = np.random.default_rng(2)
    lasts = {method: 400 if method == "probe" else 120 for method in methods}
    runs = [grid(method=[method], seed=range(seeds), step=range(last)) for method, last in lasts.items()]
    made = pd.concat(runs, ignore_index=True)
    probe, step = made["method"] == "probe", made["step"]
    checked = validated & (step % 40 == 39) & (~probe | (step == 399))
    rate = made["method"].map(LEVEL).fillna(0.7) + rng.normal(0, 0.02, len(made))
    loss = 0.7 * np.exp(-step / 60) + rng.normal(0, 0.02, len(made))
    own = {"loss_text": np.where(probe, np.nan, 0.5), "loss_alignment": np.where(probe, np.nan, 0.01)}
    return made.assign(epoch=step // 40, loss=loss, loss_task=loss, **own, val_balanced_acc=rate.where(checked))


def make_validation(methods: tuple[str, ...] = METHODS, seeds: int = 5) -> pd.DataFrame:
    """Validation at the end: with the shortcut lora leads, without it dgs does by 2 points."""
    made = grid(method=methods, seed=range(seeds), images=["as in training", "reweighted", "without shortcut"])
    biased = (made["method"] == "lora") & (made["images"] == "as in training")
    made["n_effective"] = made["images"].map({"as in training": 500.0, "reweighted": 169.6, "without shortcut": 500.0})
    return made.assign(balanced_acc=made["method"].map(LEVEL).fillna(0.7) + 0.1 * biased)


def make_scores(methods: tuple[str, ...] = METHODS, seeds: int = 3, sure: float = 3.0) -> pd.DataFrame:
    """Scores of a seen and an unseen generator; the logits of images that are right half the time grow with `sure`."""
    rng = np.random.default_rng(0)
    parts = []
    for i, method in enumerate(methods):
        for seed in range(seeds):
            for name in ("a", "b"):
                label = np.repeat([0, 1], 100)
                logit = sure * (1 + i) * rng.normal(size=200) + label
                part = pd.DataFrame({"generator": name, "label": label, "logit": logit})
                parts.append(part.assign(method=method, seed=seed))
    return pd.concat(parts, ignore_index=True).assign(split="test", condition="native", applied_to="both", rho=0.9)


def with_validation(scores: pd.DataFrame) -> pd.DataFrame:
    """With the seen generator's images once more, as the validation images."""
    return pd.concat([scores, scores[scores["generator"] == "a"].assign(split="val")], ignore_index=True)


def make_angles(methods: tuple[str, ...] = ("lora", "dgs"), seeds: int = 5, pairs: int = 3) -> pd.DataFrame:
    """Angles of one layer at 10 steps: the pairs lie at 90, 80, 70 ... degrees."""
    levels = {"method": methods, "seed": range(seeds), "step": range(0, 100, 10), "pair": list("abcdef")[:pairs]}
    made = grid(rho=[0.9], layer=["feature"], **levels)
    mean = 90.0 - 10 * made["pair"].map("abcdef".index)
    return made.assign(pair="task_" + made["pair"], mean=mean, p05=mean - 10, p95=mean + 10)


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
        x, y = (rng.normal(size=(len(names), 2)) + 2.0 * i * label[:, None]).T
        parts.append(pd.DataFrame({"method": method, "generator": names, "label": label, "x": x, "y": y}))
    return pd.concat(parts, ignore_index=True)


def image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(4).integers(0, 255, (height, width, 3)).astype(np.uint8)


MANY = (
    *METHODS, "suppression_only", "alignment_only", "distillation", "product_of_experts", "leace", "dgs_plus",
)  # fmt: skip
GENERATORS_24 = tuple(f"{name}_{i}" for i in range(3) for name in GENERATORS)
LONG = tuple(f"{name}-{'of-many-words-' * 4}"[:49] + str(i) for i, name in enumerate(GENERATORS))  # 50 characters each
ONE: dict[str, Any] = {"methods": ("dgs",), "seeds": 1}
MINE: dict[str, Any] = {**ONE, "generators": ("mine",), "n_seen": 1}


def lifted(table: pd.DataFrame, **by: float) -> pd.DataFrame:
    """The table with the balanced accuracy of methods raised."""
    return table.assign(balanced_acc=table["balanced_acc"] + table["method"].map(by).fillna(0.0))


def unsure(**by: float) -> pd.DataFrame:
    """Three seeds: dgs and probe lie 1, 3 and -1 points above lora, and t(0.975, 2) * 2 / sqrt(3) = 4.97 about 1."""
    made = make_detection(seeds=3, noise=0.0)
    gap = made["seed"].map({0: 0.01, 1: 0.03, 2: -0.01}).where(made["method"] != "lora", 0.0)
    return lifted(made.assign(balanced_acc=0.7 + gap), **by)


def apart() -> pd.DataFrame:
    """Two methods without a seed in common."""
    made = make_detection(("probe", "dgs"), seeds=2, noise=0.0)
    return made[(made["method"] == "dgs") == (made["seed"] == 0)]


def weak(table: pd.DataFrame) -> pd.DataFrame:
    """The table with one generator at which dgs is at chance."""
    at = (table["method"] == "dgs") & (table["generator"] == "vq")
    return table.assign(balanced_acc=table["balanced_acc"].mask(at, 0.5))


def angles_to_harm(**degrees: float) -> pd.DataFrame:
    """dgs is turned, and lora is not; each method's angle to the harmful direction."""
    made = make_angles(tuple(degrees)).replace({"pair": {"task_c": "task-harmful", "task_a": "task-applied"}})
    turned = made["method"].map({"lora": 1e-8}).fillna(6.0)
    made["mean"] = made["mean"].where(made["pair"] != "task-applied", turned)
    return made.assign(mean=made["mean"].where(made["pair"] != "task-harmful", made["method"].map(degrees)))


def angles_of_unequal_seeds() -> pd.DataFrame:
    """75.5 degrees over 10 steps of seed 0, and 76 over 9 of seed 1, whose first is missing."""
    made = make_angles(("dgs",), seeds=2).replace({"pair": {"task_c": "task-harmful"}})
    made["mean"] = made["mean"].where(made["pair"] != "task-harmful", 80.0 + made["seed"] - made["step"] / 10)
    return made[~((made["seed"] == 1) & (made["step"] == 0))]


def sheet(*kinds: str) -> Figure:
    return contact_sheet(True, {name: [image(32, 32)] * 4 for name in ("real", *kinds)})


# A figure, and its headline, which is a claim and follows the data ("*": whatever stands there).
FIGURES: dict[str, tuple[Callable[[], Figure], str]] = {
    "bars": (lambda: detection_by_generator(make_detection(noise=1e-4)),
        "Unseen generators: dgs is 2.0 points above lora; probe is 10.0 points below it"),
    "bars, the other way round": (
        lambda: detection_by_generator(make_detection(noise=1e-4).replace({"method": {"lora": "dgs", "dgs": "lora"}})),
        "Unseen generators: dgs is 2.0 points below lora; probe is 12.0 points below it"),
    "bars, no other method": (lambda: detection_by_generator(make_detection(("lora", "dgs"), noise=1e-4)),
        "Unseen generators: dgs is 2.0 points above lora"),
    "bars, a better other": (  # 75 less 1 a generator
        lambda: detection_by_generator(lifted(make_detection((*METHODS, "leace"), noise=1e-4), leace=0.05)),
        "*; leace is 3.0 points above it"),
    "bars, intervals across zero": (lambda: detection_by_generator(unsure()),
        "Unseen generators: dgs is not shown to differ from lora, nor is probe"),
    "bars, one across zero": (lambda: detection_by_generator(unsure(dgs=0.2)),
        "*above lora; probe is not shown to differ from it"),
    "bars, one seed": (lambda: detection_by_generator(make_detection(("lora", "dgs"), 1, noise=0.0)),
        "Unseen generators: dgs is 2.0 points above lora (one seed)"),
    "bars, without lora": (lambda: detection_by_generator(make_detection(("probe", "dgs"), noise=0.0)),
        "Unseen generators: dgs is 12.0 points above probe"),
    "bars, no shared seed": (lambda: detection_by_generator(apart()),
        "*dgs is not comparable (no shared seed) to probe*"),
    "bars, one method, one seed, no unseen": (lambda: detection_by_generator(make_detection(**MINE, noise=0.0)),
        "Seen generators: dgs reaches 74.0 % (one seed)"),
    "bars, nine methods": (lambda: detection_by_generator(make_detection(MANY, 2)), "*"),
    "bars, nothing seen": (lambda: detection_by_generator(make_detection(n_seen=0)), "*"),
    "bars, saturated": (lambda: detection_by_generator(make_detection().assign(balanced_acc=1.0)), "*"),
    "bars, two seeds": (lambda: detection_by_generator(make_detection(seeds=2, noise=0.2)), "*"),
    "bars, a suite": (lambda: of_suites()["detection-AIGIBench"], "*"),
    "bars, long names": (lambda: detection_by_generator(make_detection(generators=LONG)), "*"),
    "heatmap": (lambda: detection_heatmap(weak(make_detection(noise=0.0))),
        "Weakest generator: dgs is 15.0 points below lora*"),
    "heatmap, nine methods": (lambda: detection_heatmap(make_detection(MANY, 2)), "*"),
    "heatmap, 24 generators, nine methods": (lambda: detection_heatmap(make_detection(MANY, 2, GENERATORS_24)), "*"),
    "heatmap, a suite": (lambda: of_suites()["heatmap-AIGIBench"], "*"),
    "heatmap, long names": (lambda: detection_heatmap(make_detection(generators=LONG)), "*"),
    "heatmap, one cell": (lambda: detection_heatmap(make_detection(**MINE)), "*"),
    "forest": (lambda: forest(make_detection(noise=0.0), make_forgetting(noise=0.0)),
        "Balanced acc., unseen: 1 of 2 shown above lora, 1 below"),
    "forest, unsure": (lambda: forest(make_detection(("lora", "dgs"), noise=0.3)),
        "*0 of 1 shown above lora, 0 below"),
    "forest, one seed, nothing forgotten": (lambda: forest(make_detection(("lora", "dgs"), 1, noise=0.0)),
        "*0 of 1 shown above lora, 0 below (no interval)"),
    "forest, nine methods": (lambda: forest(make_detection(MANY, 2), make_forgetting(MANY, 2)), "*"),
    "forest, nothing unseen": (lambda: forest(make_detection(("lora", "dgs"), 2, ("mine",), 1)), "Balanced acc., s*"),
    "forest, conditions": (lambda: condition_forest({f"study-{rho}": make_differences(make_detection(MANY, noise=0.0))
        for rho in (50, 75, 90)}), "study-50: *"),
    "calibration": (lambda: reliability_diagram(make_scores(sure=50.0), {"a"}),
        "Unseen generators: where dgs says 100 % fake, 5*"),
    "calibration, never sure": (lambda: reliability_diagram(make_scores(sure=0.01), {"a"}), "*dgs is off by*"),
    "calibration, nothing unseen": (lambda: reliability_diagram(make_scores(**ONE), {"a", "b"}), "Seen generators*"),
    "calibration, nine methods": (lambda: reliability_diagram(make_scores(MANY, 1), {"a"}), "*"),
    "errors among the surest": (lambda: risk_coverage(make_scores().pipe(with_validation), {"a"}),
        "Unseen generators: dgs is wrong on * % of its surer half, * % of all"),
    "errors among the surest, nothing unseen": (
        lambda: risk_coverage(make_scores().pipe(with_validation), {"a", "b"}), "Seen generators*"),
    "errors among the surest, nine methods": (
        lambda: risk_coverage(make_scores(MANY, 1).pipe(with_validation), {"a"}), "*"),
    "scores": (lambda: score_histograms(make_scores(), {"a"}), "* of unseen fakes called real"),
    "scores, nothing unseen": (lambda: score_histograms(make_scores(**ONE), {"a", "b"}), "* seen fakes *"),
    "scores, nine methods": (lambda: score_histograms(make_scores(MANY, 1), {"a"}), "*"),
    "changed images": (lambda: robustness_curves(make_changed()), "*"),
    "changed images, nine methods": (lambda: robustness_curves(make_changed(MANY, 2)), "*"),
    "changed images, three kinds": (lambda: robustness_curves(make_changed(names="jpeg:50 blur:1 noise:4")), "*"),
    "changed images, one of one method": (lambda: robustness_curves(make_changed(("dgs",), 1, "jpeg:50")), "*"),
    "plane": (lambda: forgetting_plane(make_detection(noise=0.0), make_forgetting(noise=0.0)),
        "Zero-shot kept: dgs is 10.0 points below lora; unseen, over seeds: dgs is 2.0 points above lora"),
    "plane, unsure": (lambda: forgetting_plane(make_detection(noise=0.5), make_forgetting(noise=0.0)),
        "*10.0 points below lora; unseen, over seeds: dgs is not shown to differ*"),
    "plane, one seed": (lambda: forgetting_plane(make_detection(**ONE, noise=0.0), make_forgetting(**ONE, noise=0.0)),
        "Zero-shot kept: dgs reaches 50.0 % (one seed); unseen: dgs reaches 69.5 % (one seed)"),
    "plane, no unseen": (lambda: forgetting_plane(make_detection(**MINE), make_forgetting(**ONE)), "*; seen: *"),
    "plane, no named classes": (
        lambda: forgetting_plane(make_detection(), make_forgetting().query("measure == 'cka_to_frozen'")), "*"),
    "plane, nine methods": (lambda: forgetting_plane(make_detection(MANY, 2), make_forgetting(MANY, 2)), "*"),
    "plane, two seeds": (
        lambda: forgetting_plane(make_detection(seeds=2, noise=0.2), make_forgetting(seeds=2)), "*"),
    "plane, probe not measured": (lambda: forgetting_plane(make_detection(), make_forgetting(("lora", "dgs"))), "*"),
    "forgetting": (lambda: forgetting_measures(make_forgetting(noise=0.0)),
        "Zero-shot kept: dgs is 10.0 points below lora; probe is 40.0 points above it"),
    "forgetting, nothing": (lambda: forgetting_measures(make_forgetting().assign(after=lambda t: t["before"])),
        "Zero-shot kept: dgs is not shown to differ from lora, nor is probe"),
    "forgetting, two seeds": (lambda: forgetting_measures(make_forgetting(seeds=2, noise=0.3)), "*not shown*"),
    "forgetting, nine methods": (lambda: forgetting_measures(make_forgetting(MANY, 2)), "*"),
    "forgetting, one": (lambda: forgetting_measures(make_forgetting(**ONE)), "*"),
    "forgetting, long names": (
        lambda: forgetting_measures(make_forgetting().replace({"zero_shot:shape": f"zero_shot:{LONG[0]}"})), "*"),
    "blocks": (lambda: forgetting_blocks(make_forgetting()), "CKA after block 4: dgs is 10.0 points below lora*"),
    "blocks, nine methods": (lambda: forgetting_blocks(make_forgetting(MANY, 2)), "*"),
    "blocks, one method and seed": (lambda: forgetting_blocks(make_forgetting(**ONE)), "*"),
    "t-SNE": (lambda: tsne_panels(make_points()), "*"),
    "t-SNE, nine methods": (lambda: tsne_panels(make_points(MANY)), "*"),
    "t-SNE, one method and generator": (lambda: tsne_panels(make_points(("dgs",), ("mine",))), "*"),
    "t-SNE, long names": (lambda: tsne_panels(make_points(generators=LONG)), "*"),
    "t-SNE, too few images": (lambda: tsne_panels(make_points().assign(x=np.nan, y=np.nan)),
        "No map of features: fewer than 5 images"),
    "training": (lambda: training_curves(make_training().assign(rho=0.9), make_validation()),  # the least biased
        "Validation images without shortcut: dgs is 2.0 points above lora*"),
    "training, biased": (
        lambda: training_curves(make_training(), make_validation().query("images == 'as in training'")),
        "*as in training: dgs is 8.0 points below lora*"),
    "training, validated on the way": (lambda: training_curves(make_training()), "Validation on seen generators: *"),
    "training, nine methods": (
        lambda: training_curves(make_training(MANY, 2).assign(rho=0.9), make_validation(MANY)), "*"),
    "training, one": (lambda: training_curves(make_training(**ONE)), "*"),
    "training, not validated": (lambda: training_curves(make_training(validated=False)), "*"),
    "training, two steps": (
        lambda: training_curves(make_training(seeds=2).query("step < 2 or step == 399")), "*"),
    "training, probe alone": (lambda: training_curves(make_training(("probe",))), "*"),
    "angles": (lambda: angles_over_training(make_angles()),
        "Over training, task c is farthest from orthogonal in lora: 70.0°"),
    "angles, orthogonal": (lambda: angles_over_training(make_angles(pairs=1)), "*orthogonal to within 1°*"),
    "angles to harm, of the method with surgery": (lambda: angles_over_training(angles_to_harm(lora=60.0, dgs=70.0)),
        "Over training, task and harmful gradient are 70.0° apart in dgs"),
    "angles to harm, of any name": (
        lambda: angles_over_training(angles_to_harm(lora=60.0, mine=70.0)), "*apart in mine"),
    "angles to harm, no surgery": (
        lambda: angles_over_training(angles_to_harm(lora=60.0)), "*60.0° apart in lora"),
    "angles, means of a seed's steps, then over seeds": (lambda: angles_over_training(angles_of_unequal_seeds()),
        "*are 75.8° apart*"),
    "angles, real pairs": (lambda: angles_over_training(named_angles()), "*"),
    "angles, one step": (lambda: angles_over_training(named_angles().query("step == 0")), "*"),
    "angles, one": (lambda: angles_over_training(make_angles(("dgs",), 1, 1)), "*"),
    "contact sheet": (lambda: sheet("a, seen", "b, unseen", "c, unseen"),
        "Test images: real ones, and fakes of 1 seen and 2 unseen generators"),
    "contact sheet of one": (
        lambda: sheet("a, seen"), "Test images: real ones, and fakes of 1 seen generator"),
    "contact sheet, long names": (lambda: contact_sheet(True, {name: [image(32, 32)] * 8 for name in LONG}), "*"),
    "patches": (lambda: patches_figure(True, image(256, 256), image(224, 224), 32),
        "Patch selection shows the model 49 of 64 patches of 32 × 32 px, in a new order"),
    "patches, few": (lambda: patches_figure(True, image(64, 96), image(224, 224), 32), "*from only 6 patches*"),
    "patches, small": (lambda: patches_figure(True, image(64, 80), image(32, 32), 8), "*16 of 80 patches of 8 × 8 px*"),
}  # fmt: skip


NAMED = {style.plain(method): method for method in ALL_METHODS}


def title(fig: Figure) -> str:
    """The figure's headline on one line, with plain spaces."""
    return fig.get_suptitle().replace("\n", " ").replace("\u00a0", " ")


def labels(ax: Axes) -> list[str]:
    return [label.get_text().replace("\n", " ") for label in ax.get_yticklabels()]


def in_colour(ax: Axes, method: str) -> list[mpl.lines.Line2D]:
    return [line for line in ax.lines if line.get_color() == style.colour(method) and len(np.asarray(line.get_xdata()))]


def test_by_generator_the_title_goes_by_crossed_intervals_where_there_are_some() -> None:
    table = make_detection(("probe", "lora", "dgs"), noise=1e-4)
    row = {"other": "lora", "rate": "balanced_acc", "pictures": "unseen", "mean": 0.05, "low": -0.02, "high": 0.12,
           "low_seeds": 0.04, "high_seeds": 0.06}  # fmt: skip
    rows = [{**row, "method": "probe"}, {**row, "method": "dgs", "low": 0.01}]
    figure = detection_by_generator(table, differences=pd.DataFrame(rows))
    assert figure.get_suptitle() == "Unseen generators: 1 of 2 shown above lora, 0 below"
    without = pd.DataFrame(rows).assign(low=np.nan, high=np.nan)
    assert "points" in detection_by_generator(table, differences=without).get_suptitle()
    assert "points" in detection_by_generator(table, "GenImage", differences=pd.DataFrame(rows)).get_suptitle()


@pytest.mark.parametrize("name", FIGURES)
def test_a_headline_follows_the_data_text_is_legible_and_methods_look_alike_everywhere(name: str) -> None:
    draw, claim = FIGURES[name]
    fig = draw()
    assert fnmatchcase(title(fig), claim)
    fig.draw_without_rendering()
    renderer = FigureCanvasAgg(fig).get_renderer()
    assert len(title(fig)) > 10 and fig.get_suptitle().count("\n") < 3 and "[" not in title(fig)
    whole, (width, height) = fig.get_tightbbox(renderer), fig.get_size_inches()
    assert whole.x0 > -0.01 and whole.y0 > -0.01 and whole.x1 < width + 0.01 and whole.y1 < height + 0.01
    panels = [ax.get_tightbbox(renderer) for ax in fig.axes if ax.axison]
    heading = fig._suptitle.get_window_extent(renderer)  # type: ignore[attr-defined]
    for extent in (heading, *(legend.get_window_extent(renderer) for legend in fig.legends)):
        assert all(extent.y0 >= panel.y1 - 1 or extent.y1 <= panel.y0 + 1 for panel in panels)
    for legend in fig.legends:
        for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True):
            if (method := NAMED.get(text.get_text())) and isinstance(handle, mpl.lines.Line2D):
                assert (handle.get_color(), handle.get_marker()) == (style.colour(method), style.marker(method))
    words = [text for text in fig.findobj(mpl.text.Text) if text.get_text()]
    assert min(text.get_fontsize() for text in words) * 400 / width / 72 >= 9.0, "pixels when shown 400 px wide"
    if name.startswith(("bars", "heatmap", "forgetting")):
        for box in (ax.get_position() for ax in fig.axes):
            assert box.width > 0.45 and box.height * height > 0.35, "labels leave the plot its room"
    if "long names" in name:
        shown = {text.get_text() for text in words}
        assert not any(long in word for long in LONG for word in shown)
        assert sum("…" in word for word in shown) == (1 if name.startswith("forgetting") else len(LONG))


class TestStyle:
    def test_the_same_table_gives_the_same_bytes(self, tmp_path: Path) -> None:
        first, second = (
            style.save(forgetting_blocks(make_forgetting(seeds=2)), tmp_path / name)
            for name in ("a/deep/1.png", "2.png")
        )
        assert first.read_bytes() == second.read_bytes()
        with Image.open(first) as picture:
            assert picture.size[0] == 900 and "Software" not in picture.info

    def test_saving_forgets_a_pyplot_figure(self, tmp_path: Path) -> None:
        import matplotlib.pyplot as plt

        fig = plt.figure()
        style.save(fig, tmp_path / "x.png")
        assert not plt.fignum_exists(fig.number)

    def test_it_ends_with_its_context(self) -> None:
        before = dict(mpl.rcParams)
        with style.style():
            assert mpl.rcParams["figure.dpi"] == 150
        assert dict(mpl.rcParams) == before

    def test_no_two_methods_look_alike_and_a_family_shares_a_colour(self) -> None:
        looks = {name: (style.colour(name), style.marker(name)) for name in ALL_METHODS}
        hues = {hue for hue, _ in looks.values()} - {style.colour("of no family")}
        assert len(set(looks.values())) == len(looks) and hues == set(style.FAMILIES)
        assert style.colour("dgs") == style.colour("signed") != style.colour("lora")
        heads = [members[0] for members in style.FAMILIES.values()]
        assert len({style.marker(name) for name in heads}) == len(heads)
        assert style.colour("mine") not in style.FAMILIES and style.marker("mine") == style.marker("mine")

    def test_short_names(self) -> None:
        assert style.short_names(["vq", "a" * 20]) == {"vq": "vq", "a" * 20: "a" * 20}
        assert list(style.short_names(["stable-diffusion-xl-base-1.0"]).values()) == ["stable-diffu…ase-1.0"]
        names = [f"{'a' * 20}{i:02d}{'b' * 28}" for i in range(15)] + ["aaaaaaaaaaaa…bbbbbbb"]
        short = style.short_names(names)
        assert list(short) == names and short == style.short_names(names)
        assert len(set(short.values())) == 16 and max(map(len, short.values())) == 20, "alike at both ends, distinct"


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

    kinds = (style.REAL_COLOUR, *style.GENERATOR_COLOURS)
    # Machado, Oliveira & Fernandes 2009, severity 1: deuteranopia, protanopia
    blind = (
        np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
        np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    )

    def test_no_kind_has_the_colour_of_a_method(self) -> None:
        assert distances(self.kinds, list(style.FAMILIES)).min() > 20.0
        assert distances(self.kinds, [style.colour("somebody_elses")]).min() > 15.0

    def test_the_four_generators_of_the_figure_and_reals_differ_also_for_the_colour_blind(self) -> None:
        for sight in (None, *self.blind):
            apart = distances(self.kinds[:5], self.kinds[:5], sight)
            assert apart[~np.eye(5, dtype=bool)].min() > 25.0

    def test_neighbours_in_the_list_have_different_markers_and_none_is_that_of_reals(self) -> None:
        looks = [style.generator_look(i) for i in range(16)]
        assert len({(look["color"], look["marker"]) for look in looks}) == 16
        assert len({look["marker"] for look in looks[:7]}) == 7
        assert style.REAL_MARKER not in {look["marker"] for look in looks}

    def test_they_are_what_is_drawn(self) -> None:
        fig = tsne_panels(make_points(("frozen", "dgs")))
        drawn = {mpl.colors.to_hex(points.get_facecolor()[0]) for ax in fig.axes for points in ax.collections}
        assert drawn == set(self.kinds)
        legend = [mpl.colors.to_hex(handle.get_color()) for handle in fig.legends[0].legend_handles]  # type: ignore[union-attr]
        assert legend == list(self.kinds)


def test_a_tie_prints_as_in_the_report() -> None:
    for noise in (-1e-13, 0.0, 1e-13):
        made = make_detection(("dgs",), noise=0.0).assign(balanced_acc=0.6955 + noise)
        assert title(detection_by_generator(made)).endswith("dgs reaches 69.6 %")
        words = {text.get_text() for text in detection_heatmap(made).axes[0].texts}
        assert "69.6\n±0.0" in words and not any("69.5" in word for word in words)
        pair = make_detection(("lora", "dgs"), noise=0.0)
        pair["balanced_acc"] = pair["method"].map({"lora": 0.5, "dgs": 0.5205 + noise})
        assert title(detection_by_generator(pair)).endswith("dgs is 2.1 points above lora")


class TestForest:
    def test_a_row_a_method_and_a_panel_a_measure(self) -> None:
        fig = forest(make_detection(noise=0.0), make_forgetting(noise=0.0))
        assert [ax.get_title(loc="left") for ax in fig.axes] == [
            "Balanced acc., unseen", "AP, unseen", "Worst generator", "Zero-shot kept",
        ]  # fmt: skip
        assert labels(fig.axes[0]) == ["probe", "dgs"]
        (mean,) = [line for line in in_colour(fig.axes[0], "dgs") if line.get_marker() == style.marker("dgs")]
        xs, ys = (np.asarray(values) for values in mean.get_data())
        assert (xs[np.isfinite(xs)].tolist(), ys[np.isfinite(xs)].tolist()) == ([pytest.approx(2.0)], [1])

    def test_a_hollow_marker_says_that_no_difference_is_shown(self) -> None:
        tables = [
            make_detection(("lora", "dgs"), seeds, noise=noise) for seeds, noise in ((5, 0.0), (5, 0.3), (1, 0.0))
        ]
        sure, *others = (in_colour(forest(table).axes[0], "dgs") for table in tables)
        assert {line.get_markerfacecolor() for line in sure} == {style.colour("dgs")}
        assert all("white" in {line.get_markerfacecolor() for line in lines} for lines in others)

    def test_equal_methods_are_not_blown_up(self) -> None:
        made = make_detection(noise=0.0).assign(ap=0.5)
        panel = difference_forest(difference_table(per_seed_values(made), made)).axes[1]
        low, high = panel.get_xlim()
        assert panel.get_title(loc="left") == "AP, unseen" and high - low >= 2.0

    def test_the_thick_bar_is_crossed_and_the_thin_one_over_seeds(self) -> None:
        panels = forest(make_detection(noise=0.0), make_forgetting(noise=0.0)).axes
        for panel, crossed in ((panels[0], [1.0, 3.0]), (panels[3], [np.nan, np.nan])):
            thick, thin, _ = in_colour(panel, "dgs")
            assert thick.get_linewidth() > 3 * thin.get_linewidth()
            assert np.asarray(thick.get_xdata()).tolist() == pytest.approx(crossed, nan_ok=True)
            assert np.isfinite(np.asarray(thin.get_xdata())).all()

    @pytest.mark.parametrize("methods", [("dgs", "distillation"), ("lora",)])
    def test_without_a_pair_it_says_so(self, methods: tuple[str, ...]) -> None:
        (said,) = forest(make_detection(methods)).texts
        assert said.get_text() == "No method can be compared with lora or the probe here."

    def test_without_lora_the_probe_is_what_others_are_compared_with(self) -> None:
        fig = forest(make_detection(("probe", "dgs"), noise=0.0))
        assert title(fig) == "Balanced acc., unseen: 1 of 1 shown above probe, 0 below"


class TestReliability:
    def test_a_calibrated_detector_lies_on_the_diagonal(self) -> None:
        rng = np.random.default_rng(0)
        scores = pd.concat([make_scores(("dgs",), 1, sure=1.0)] * 50, ignore_index=True)
        scores["logit"] = rng.normal(0, 2, len(scores))
        scores["label"] = (rng.random(len(scores)) < 1 / (1 + np.exp(-scores["logit"]))).astype(int)
        (line,) = in_colour(reliability_diagram(scores, {"a"}).axes[0], "dgs")
        x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
        assert np.abs(x - y).max() < 7.0 and len(x) == 15

    def test_the_legend_has_each_error_with_its_interval(self) -> None:
        errors = [text.get_text() for text in reliability_diagram(make_scores(sure=50.0), {"a"}).legends[0].texts]
        assert [error.split(":")[0] for error in errors] == ["probe", "lora", "dgs"]
        assert all("[" in error for error in errors)

    def test_histograms_of_scores_say_how_many_fakes_lie_below_zero_and_have_a_panel_a_method(self) -> None:
        scores = make_scores(("lora", "dgs"), 2)
        reals, fakes = scores[scores["label"] == 0], scores[(scores["generator"] == "b") & (scores["label"] == 1)]
        scores.loc[reals.index, "logit"] = np.tile([1, -1], len(reals) // 2)
        scores.loc[fakes.index, "logit"] = np.where(
            fakes["method"] == "dgs", -1.0, np.tile([1.0, -1.0], len(fakes) // 2)
        )
        figure = score_histograms(scores, {"a"})
        said = [[text.get_text() for text in ax.texts] for ax in figure.axes]
        assert said == [["50 % missed", "50 % alarms"], ["100 % missed", "50 % alarms"]]
        assert title(figure).endswith("; 50 % (lora) to 100 % (dgs) of unseen fakes called real")
        assert [text.get_text() for text in figure.legends[0].texts] == ["real", "fake, generator seen", "fake, unseen"]
        densities = [patch.get_data() for patch in figure.axes[0].patches]
        assert len(densities) == 3
        assert all(sum(of.values * np.diff(of.edges)) == pytest.approx(1) for of in densities)


class TestForgetting:
    def test_measures_are_of_memory_alone(self) -> None:
        assert labels(forgetting_measures(make_forgetting()).axes[0]) == [
            "zero-shot shape", "zero-shot background", "linear probe, shape", "caption retrieval at 1", "CKA to frozen",
        ]  # fmt: skip

    def test_blocks_are_a_line_a_method(self) -> None:
        fig = forgetting_blocks(make_forgetting())
        x, y = in_colour(fig.axes[0], "lora")[0].get_data()
        assert list(x) == [1, 2, 3, 4] and y[-1] == pytest.approx(60.0)

    def test_blocks_compare_towers_that_moved_not_a_frozen_one(self) -> None:
        made = make_forgetting()
        frozen = (made["method"] == "probe") & made["measure"].str.startswith("cka_block:")
        made.loc[frozen, "after"] = 1.0 - 1e-6
        assert "probe" not in title(forgetting_blocks(made))

    def test_what_is_kept_beyond_100_is_drawn(self) -> None:
        more = make_forgetting(noise=0.0).assign(after=lambda t: t["before"] * 1.2)
        assert forgetting_plane(make_detection(), more).axes[0].get_xlim()[1] > 120.0


class TestCurves:
    def test_a_head_and_adapters_share_panels_by_the_share_of_training_done(self) -> None:
        fig = training_curves(make_training().assign(rho=0.9, loss_text_floor=0.37), make_validation())
        loss, text, validation, end = fig.axes
        assert [ax.get_xlabel() for ax in fig.axes[:3]] == ["Training done (%)"] * 3
        assert in_colour(loss, "probe") and in_colour(loss, "dgs") and not in_colour(text, "probe")
        for method in ("probe", "dgs"):
            x = np.asarray(in_colour(loss, method)[0].get_xdata())
            assert x[0] < 3 and 97 < x[-1] <= 100 and len(x) == 40
            assert np.asarray(in_colour(validation, method)[0].get_xdata())[-1] == 100
        floor = [line.get_ydata()[0] for line in text.lines if line.get_linestyle() == "--"]
        assert floor == [pytest.approx(0.37)] and text.get_title("left") == "dashed: converged"
        assert labels(end) == ["as in training (n 500)", "reweighted (n 170)", "without shortcut (n 500)"]

    def test_panels_without_data_are_left_out(self) -> None:
        assert len(training_curves(make_training(("probe",), validated=False)).axes) == 1
        assert len([ax for ax in training_curves(make_training()).axes if ax.axison]) == 3

    def test_few_steps_of_angles_are_marked_in_a_sensible_range(self) -> None:
        for steps in (1, 2):
            fig = angles_over_training(make_angles().query(f"step < {10 * steps}"))
            low, high = fig.axes[0].get_xlim()
            assert -10 < low < 0 and 10 * (steps - 1) < high < 10 * steps
            curves = [in_colour(fig.axes[0], method)[0] for method in ("lora", "dgs")]
            assert len({float(np.asarray(line.get_xdata())[0]) for line in curves}) == 2, "side by side"
            assert fig.axes[0].collections, "the percentiles"
            assert fig.legends[0].get_title().get_text().startswith("bar: 5th to 95th percentile of samples, mean over")

    def test_angles_are_named_in_words(self) -> None:
        fig = angles_over_training(named_angles())
        assert [ax.get_title("left") for ax in fig.axes] == [
            "task vs harmful", "task vs beneficial", "task vs applied:\nhow far it was turned",
        ]  # fmt: skip
        note = fig.legends[0].get_title().get_text()
        assert note.startswith("band: 5th to 95th percentile of samples, mean over seeds")


def test_intervals_stay_within_0_and_100_per_cent() -> None:
    """Two seeds give intervals far beyond; axes of per cent do not follow them, nor fall short of a mean."""
    assert style.ends(0.0, 100.0)([1.0, 99.0]) == (0.0, 100.0)
    assert style.ends(0.0, 100.0)([101.0, 103.0])[1] == 102.0
    low, high = style.ends()([1.0, 2.0, 3.0])
    assert (low, high) == (pytest.approx(2 - 2.484, abs=1e-3), pytest.approx(2 + 2.484, abs=1e-3))
    detection = make_detection(seeds=2, noise=0.2).assign(balanced_acc=lambda t: t["balanced_acc"].clip(0.0, 1.0))
    forgetting = make_forgetting(seeds=2, noise=0.2).assign(after=lambda t: t["after"].clip(0.0, t["before"]))
    plane = forgetting_plane(detection, forgetting)
    limits = [ax.get_xlim() for fig in (detection_by_generator(detection), plane) for ax in fig.axes]
    limits += [forgetting_measures(forgetting).axes[0].get_xlim(), plane.axes[0].get_ylim()]
    made = make_training(("dgs",), seeds=2)
    made["val_balanced_acc"] += 0.25 * (made["seed"] - 0.5)
    limits.append(training_curves(made).axes[2].get_ylim())
    assert np.min(limits) >= -10.0 and np.max(limits) <= 110.0


def test_maps_say_how_far_the_classes_lie_apart() -> None:
    made = tsne_panels(make_points(), seed=3)
    shares = [ax.get_title("center").replace(":", "").replace("\u00a0", " ") for ax in made.axes]  # "dgs: 70 %"
    assert title(made) == f"Neighbours of the same class: {', '.join(shares)} (seed 3)"
    assert shares[0].startswith("frozen ") and shares[2].startswith("dgs ")
    many = title(tsne_panels(make_points(MANY)))
    assert " % in 9 maps (one seed)" in many and "dgs" not in many


MAPPED = pd.DataFrame({"generator": ["real", "vq"] * 10, "label": [0, 1] * 10}, index=range(5, 25))
FEATURES = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)


def test_a_map_repeats_keeps_its_rows_and_gives_equal_features_one_place() -> None:
    points = tsne({"frozen": (FEATURES, MAPPED)}, seed=1)
    assert list(points.columns) == ["method", "generator", "label", "x", "y"]
    assert points["generator"].tolist() == MAPPED["generator"].tolist()
    pd.testing.assert_frame_equal(points, tsne({"frozen": (FEATURES, MAPPED)}, seed=1))
    with pytest.raises(ValueError, match="features of 20 rows"):
        tsne({"frozen": (np.zeros((3, 4)), MAPPED)}, seed=1)
    points = tsne({"frozen": (np.ones((20, 4)), MAPPED)}, seed=0)
    assert (points[["x", "y"]] == 0.0).all(axis=None)
    tsne_panels(points)


@pytest.mark.parametrize("count", [1, 4, 5])
def test_fewer_than_5_images_are_said_instead_of_drawn(count: int) -> None:
    points = tsne({"frozen": (FEATURES[:count], MAPPED[:count]), "dgs": (FEATURES, MAPPED)}, seed=0)
    assert points.groupby("method").size().to_dict() == {"frozen": count, "dgs": 20}
    mapped = points[["x", "y"]].notna().all(axis=1)
    assert mapped[points["method"] == "dgs"].all() and (mapped[points["method"] == "frozen"] == (count == 5)).all()
    fig = tsne_panels(points)
    words = [[text.get_text() for text in ax.texts] for ax in fig.axes]
    assert words == [[] if count == 5 else ["fewer than\n5 images"], []]
    assert fig.axes[0].get_title("center").startswith("frozen: " if count == 5 else "frozen")
    assert fig.axes[1].get_title("center").startswith("dgs: ")
    if count < 5:
        none = tsne_panels(points[points["method"] == "frozen"])
        assert title(none) == "No map of features: fewer than 5 images" and fig.axes[0].get_title("center") == "frozen"


DRIFT = make_forgetting().query("measure == 'cosine_drift'")


@pytest.mark.parametrize(
    ("draw", "why"),
    [
        (lambda: detection_by_generator(pd.concat([make_detection(rho=rho) for rho in (0.5, 0.9)])), "mixes rho"),
        (lambda: detection_heatmap(make_detection().assign(condition="blur")), "no rows with condition"),
        (lambda: forgetting_measures(DRIFT), "no measure to draw"),
        (lambda: forgetting_plane(make_detection(), DRIFT), "no zero_shot"),
        (lambda: forgetting_blocks(DRIFT), "no measures of single blocks"),
        (lambda: patches_figure(True, image(64, 64), image(64, 64), 24), "canvas"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw: Callable[[], Figure], why: str) -> None:
    with pytest.raises((UserError, ValueError), match=why):
        draw()
