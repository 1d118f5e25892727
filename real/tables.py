"""The tables of docs/real.md and of docs/running.md that come from results on real pictures: python -m real.tables."""

from __future__ import annotations

import json
from functools import cache, partial

import pandas as pd

from dgs.analysis.tuning import chosen, settings_text
from dgs.model.methods.registry import METHODS
from dgs.params import load_params
from dgs.stats import Interval, seed_interval
from dgs.tables import read_table
from dgs.workspace import find_root
from real.study import LEFT_OUT
from studies.tables import Cell, Table, current, number, told

DOCUMENTS = ("docs/real.md", "docs/running.md")
PROFILE = "real"
OTHER_COPY = "real-unmatched minus real"  # in study.csv
LABELS = {"probe": "probe", "lora": "LoRA", "dgs": "DGS"}  # others in code type
GENERATORS = {
    "dalle_mini": "`dalle_mini`", "glid3_xl": "`glid3_xl`", LEFT_OUT: "its other prompts [seeds]",
    "gpt4o_image": "`gpt4o_image`", "gemini_flash_image": "`gemini_flash_image`",
    "latent_diffusion": "`latent_diffusion`, seen", "shoes_midjourney": "`shoes_midjourney`, seen",
}  # fmt: skip
IN_COMMON = [  # by year
    "glid3_xl", "latent_diffusion", "dalle_mini", "sd15_finetune_grid", "shoes_midjourney", "gpt4o_image",
    "gemini_flash_image",
]  # fmt: skip
PAIRS = {
    "LoRA minus probe": "lora minus probe",
    "DGS minus probe": "dgs minus probe",
    "DGS minus LoRA": "dgs minus lora",
    "`distillation` minus LoRA": "distillation minus lora",
    "`product_of_experts` minus LoRA": "product_of_experts minus lora",
    "`dgs_plus` minus LoRA": "dgs_plus minus lora",
    "`dgs_plus` minus probe": "dgs_plus minus probe",
    "`pixel_cnn` minus probe": "pixel_cnn minus probe",
    "`pixel_cnn` minus LoRA": "pixel_cnn minus lora",
}
KEPT = {  # forgetting.csv's measure: column
    "cka_to_frozen": "CKA with the frozen features", "knn_overlap": "neighbours kept",
    "retrieval_at_1_aligned": "retrieval R@1, aligned text", "cosine_drift": "cosine drift",
}  # fmt: skip
SIDES = {"own": "CLIP's own", "contrast": "by contrast"} | {
    name: name for name in ("ridge: words", "ridge: WordLlama", "ridge: MiniLM")
}


@cache
def table(name: str, profile: str = PROFILE) -> pd.DataFrame:
    """results/<profile>/<name>.csv."""
    return read_table(find_root() / "results" / profile / f"{name}.csv")


def row(name: str, results: str = PROFILE, **where: str) -> pd.Series | None:
    """The row of results/<results>/<name>.csv that has these values; None where there is none."""
    rows = table(name, results)
    for column, value in where.items():
        rows = rows[rows[column] == value]
    return rows.iloc[0] if len(rows) else None


def percent(found: pd.Series | None, mean: str, low: str, high: str, sign: bool = False) -> str:
    """Three columns of a row as "81.2 [78.0, 84.1]"; "–" without a row."""
    return "–" if found is None else told(Interval(*(100.0 * found[[mean, low, high]].astype(float))), sign=sign)


def label(method: str) -> str:
    """A method's name in a table."""
    return LABELS.get(method, f"`{method}`")


def rate(
    method: str, pictures: str = "unseen", over: str = "seeds", name: str = "balanced_acc", profile: str = PROFILE
) -> str:
    """Per cent of study.csv, with its interval; "–" where it was not run. A difference's ends have signs."""
    found = row("study", profile=profile, method=method, pictures=pictures, rate=name, over=over)
    return percent(found, "mean", "low", "high", sign=" minus " in method or " minus " in profile)


def of_pictures(method: str, pictures: str) -> str:
    """`rate` over other pictures; over seeds for `LEFT_OUT`, for which study.csv has no other."""
    return rate(method, pictures, "seeds" if pictures == LEFT_OUT else "pictures")


def interval_alone(*what: str, **more: str) -> str:
    """`rate` without its mean, where a neighbour shows it."""
    return rate(*what, **more).partition(" ")[2]


def kept(method: str, measure: str) -> str:
    """A measure of forgetting after training, per cent: mean over seeds [95 %]; "–" for a method without a CLIP."""
    rows = table("forgetting")
    found = rows[(rows["method"] == method) & (rows["measure"] == measure)]["after"].astype(float)
    return told(seed_interval(100.0 * found.to_numpy()), sign=False) if len(found) else "–"


def settings(method: str) -> str:
    """What validation chose for a method."""
    return settings_text(chosen(table("tuning"), "val")[method])


def validated(method: str) -> str:
    """Balanced accuracy on validation images at each rate that was tried."""
    rows = table("tuning")
    own = rows[rows["method"] == method]
    rates = [next(iter(json.loads(text).values())) for text in own["candidate"]]
    return ", ".join(f"{one:g}: {number(100 * value)}" for one, value in sorted(zip(rates, own["val"], strict=True)))


def by_words(generator: str, reader: str = "words", name: str = "balanced_acc") -> str:
    """How well test captions alone tell the label, per cent."""
    found = row("text_alone", reader=reader, pictures="test", generator=generator)
    return percent(found, name, f"{name}_low", f"{name}_high")


def carried_over(trained_on: str, tested_on: str) -> str:
    """AUROC of a frozen probe for one generator on another, per cent."""
    found = row("in_common", trained_on=trained_on, tested_on=tested_on)
    return "–" if found is None else number(100.0 * float(found["auroc"]), 0)


def embedded(profile: str, text: str) -> str:
    """R@1 of a text side among captions held out, per cent; "–" where a tower has none of its own."""
    return percent(row("text_sides", profile, text=text), "r1", "r1_low", "r1_high")


def pool(profile: str) -> str:
    """Captions held out, and what chance finds of them."""
    first = table("text_sides", profile).iloc[0]
    return f"{first['pool']} ({number(100 * float(first['chance1']))} %)"


def of_methods(methods: dict[str, str], what: str, **fixed: str) -> dict[str, Cell]:
    """A column of `rate` for each method, by its label; a row is given to `rate` as `what`."""
    return {shown: partial(lambda of, own: rate(own, **{what: of}, **fixed), own=own) for shown, own in methods.items()}


@cache
def tables() -> dict[str, Table]:
    """The tables by their marks."""
    methods = load_params(PROFILE, find_root()).methods
    rows = {label(name): name for name in METHODS if name in methods}
    tuned = {label(name): name for name in METHODS if name in methods and METHODS[name].adapters}
    few = {label(name): name for name in ("probe", "lora", "dgs")} | {"DGS minus LoRA": "dgs minus lora"}
    ordered = {shown: name for shown, name in few.items() if name != "dgs"}
    return {
        "real-headline": (
            "method",
            rows,
            {
                "balanced acc., unseen [seeds]": rate,
                "[generators]": partial(interval_alone, over="generators"),
                "[pictures]": partial(interval_alone, over="pictures"),
                "AUROC, unseen": partial(rate, name="auroc"),
                "AP, unseen": partial(rate, name="ap"),
                "balanced acc., seen": partial(rate, pictures="seen"),
            },
        ),
        "real-differences": (
            "unseen",
            PAIRS,
            {
                "balanced acc. [crossed]": partial(rate, over="crossed"),
                "[seeds]": interval_alone,
                "AP [crossed]": partial(rate, name="ap", over="crossed"),
                "AUROC [seeds]": partial(rate, name="auroc"),
            },
        ),
        "real-generators": (
            "generator",
            {shown: name for name, shown in GENERATORS.items()},
            {shown: partial(of_pictures, own) for shown, own in rows.items()},
        ),
        "real-kept": ("method", tuned, {shown: partial(kept, measure=name) for name, shown in KEPT.items()}),
        "real-images": (
            "training pictures",
            {"64": "real-64", "128": "real-128", "256": "real-256", "549": PROFILE},
            of_methods(few, "profile")
            | {f"{shown}, AUROC": of for shown, of in of_methods(ordered, "profile", name="auroc").items()},
        ),
        "real-format": (
            "unseen",
            few,
            {
                "matched": rate,
                "as the sources have them": partial(rate, profile="real-unmatched"),
                "the latter minus the former": partial(rate, profile=OTHER_COPY),
                "[generators]": partial(interval_alone, over="generators", profile=OTHER_COPY),
                "AUROC, likewise": partial(rate, name="auroc", profile=OTHER_COPY),
            },
        ),
        "real-rates": ("method", rows, {"chosen": settings, "validation, by rate": validated}),
        "real-words": (
            "test captions",
            {"all": "all"} | {f"`{name}`": name for name in IN_COMMON if name != "sd15_finetune_grid"},
            {"balanced acc.": by_words, "AUROC": partial(by_words, name="auroc")},
        ),
        "real-in-common": (
            "probe for ... (rows), AUROC on ...",
            {f"`{name}`": name for name in IN_COMMON},
            {f"`{name}`": partial(carried_over, tested_on=name) for name in IN_COMMON},
        ),
        "text-sides": (
            "tower, captions",
            {"embedded CLIP, 5,000 drawings": "mini", "ViT-B/16, 549 real pictures": PROFILE},
            {"held out (chance)": pool} | {shown: partial(embedded, text=name) for name, shown in SIDES.items()},
        ),
    }  # fmt: skip


def main() -> None:
    """Bring the tables of `DOCUMENTS` up to date."""
    for path in [find_root() / name for name in DOCUMENTS]:
        path.write_text(current(path.read_text(encoding="utf-8"), tables()), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
