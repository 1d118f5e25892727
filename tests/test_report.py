"""What REPORT.md says, and that it says it the same way each time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_figures import GENERATORS, METHODS, make_detection, make_differences, make_forgetting

from dgs.analysis.metrics import summary
from dgs.analysis.report import markdown_table, summary_sections, write_report

PARAMS = {"train": {"lr": 0.003, "epochs": 1}, "seeds": [0, 1]}
WARNING = (
    "**Methods were trained with different settings** (named below): their differences are not of the method alone."
)


def report(
    folder: Path,
    detection: pd.DataFrame,
    forgetting: pd.DataFrame | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    **more: Any,
) -> str:
    made = summary(detection, forgetting, "mini", "abc123")
    given = dict.fromkeys(METHODS, PARAMS) if settings is None else settings
    more = {"differences": make_differences(detection, forgetting), **more}
    return write_report(folder / "deep" / "REPORT.md", made, detection, forgetting, given, **more).read_text("utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report without noise: what it says can be told by hand."""
    tables = make_detection(noise=0.0), make_forgetting(noise=0.0)
    return report(
        tmp_path_factory.mktemp("whole"), *tables, figures=["figures/detection.png", Path("my figures/x.png")]
    )


def test_everything_a_reader_asks_for_is_there(whole: str) -> None:
    sections = [line[3:] for line in whole.splitlines() if line.startswith("## ")]
    assert sections == [
        "Headline", "Differences to lora", "Over unseen generators", "Operating points", "By generator", "Forgetting",
        "Figures", "How to read this", "What was run",
    ]  # fmt: skip
    assert "| profile | `mini` |" in whole and "| data hash | `abc123` |" in whole
    assert "| `train.lr` | `0.003` |" in whole and "| `seeds` | `[0, 1]` |" in whole
    assert "![Balanced accuracy by generator](figures/detection.png)" in whole and "(my%20figures/x.png)" in whole
    assert whole.startswith("# Report\n\n## Headline\n") and whole.index("Settings:") > whole.index("## What was run")
    for generator in GENERATORS:
        assert whole.count(f"\n| {generator} | ") == 4, (
            "one row in each of balanced Acc, which is Acc, R.Acc, F.Acc, AP"
        )
    assert "nan" not in whole and "None" not in whole
    assert "Robustness" not in whole and "oracle" not in whole


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    args = (make_detection(), make_forgetting())
    assert report(tmp_path / "a", *args) == report(tmp_path / "b", *args)


def test_numbers_by_hand(whole: str) -> None:
    # levels 62, 72, 74 % less 1 point a generator: the 2 seen average -0.5, the 6 unseen -4.5
    assert "| `lora` | 67.5 [67.5, 67.5] | 67.5 [67.5, 67.5] | 71.5 [71.5, 71.5] |" in whole
    operating = "| `lora` | 67.5 ±0.0 | 67.5 ±0.0 | 20.0 ±0.0 | 40.0 ±0.0 | 67.5 ±0.0 | 10.0 ±0.0 |"
    assert operating in whole, "operating points are those of the unseen generators"
    sure = "| 0.020 | 0.040 | 0.063 | 5 × 6 |"
    assert f"| `dgs` | balanced acc., unseen | +2.0 [+1.0, +3.0] | [+2.0, +2.0] {sure} higher |" in whole
    assert f"| `probe` | balanced acc., unseen | −10.0 [−11.0, −9.0] | [−10.0, −10.0] {sure} lower |" in whole
    assert "corrected for the 2 methods that are compared" in whole
    assert "| `dgs` | balanced acc., seen | +2.0 [+2.0, +2.0] | 5 | higher |" in whole.split("### Over seeds alone")[1]
    assert "| `dgs` | zero-shot kept | −10.0 [−10.0, −10.0] | 5 | lower |" in whole
    # unseen generators of lora: 70, 69, ..., 65 %; without noise their middle half has the mean of all
    assert "| `lora` | 67.5 | 67.5 | 65.0 ±0.0 |" in whole and "| `dgs` | 69.5 | 69.5 | 67.0 ±0.0 |" in whole
    # 74 % less 1 point a generator: the mean of 8 is 70.5, and so is that of R.Acc: (70.5 + 8 * 70.5) / 9
    line = next(line for line in whole.splitlines() if "(mAcc" in line)
    assert "mean [95 % interval]" in line and "`dgs` 70.5 [70.5, 70.5]." in line and "±" not in line


def test_the_oracle_is_marked_as_a_bound(tmp_path: Path) -> None:
    made = make_detection(noise=0.0)
    best = made[made["threshold_rule"] == "0.5"].assign(threshold_rule="oracle", balanced_acc=0.75)
    text = report(tmp_path, pd.concat([made, best])).split("## Operating points")[1].split("\n## ")[0]
    assert "upper bound" in text and "best (oracle) |" in text
    assert "| `lora` | 67.5 ±0.0 | 67.5 ±0.0 | 75.0 ±0.0 |" in text


def test_an_interval_across_zero_reads_no_difference_shown(tmp_path: Path) -> None:
    text = report(tmp_path, make_detection(("lora", "dgs"), noise=0.2))
    line = next(line for line in text.splitlines() if line.startswith("| `dgs` | balanced acc., unseen | "))
    assert line.endswith("| no difference shown |")
    assert "## Forgetting" not in text


def test_one_seed_is_said_to_be_one_seed(tmp_path: Path) -> None:
    text = report(tmp_path, make_detection(seeds=1), make_forgetting(seeds=1))
    assert "one seed: no interval" in text and "comes from one seed" in text
    assert "±" not in text.replace("± half the 95 % interval", "")
    assert "nan" not in text and "| – | – | – | – | 1 × 6 | one seed: no interval |" in text
    assert "[" not in text.split("(mAcc")[1].split(": `")[1].split("\n")[0]


def test_what_is_unseen_by_accident_is_said_at_the_top(tmp_path: Path) -> None:
    detection = make_detection()
    made = summary(detection, None, "mini", "abc123") | {"cautions": ["No tested generator was trained on: ..."]}
    text = write_report(tmp_path / "REPORT.md", made, detection, None, {}).read_text("utf-8")
    assert "**Caution:** No tested generator was trained on: ..." in summary_sections(text).split("## Headline")[0]
    assert "**Caution:**" not in report(tmp_path, detection)


@pytest.mark.parametrize(("seeds", "words"), [(1, "**One seed only:** "), (2, "**Only 2 seeds:** "), (3, None)])
def test_fewer_than_3_seeds_are_said_at_the_top_which_is_the_summary(
    tmp_path: Path, seeds: int, words: str | None
) -> None:
    text = report(tmp_path, make_detection(seeds=seeds), make_forgetting(seeds=seeds))
    top = text.split("\n## ")[0]
    assert top.strip() == "# Report" if words is None else f"# Report\n\n{words}" in top
    found = summary_sections(text)
    assert text.startswith(found.rstrip("\n")) and found.startswith(top.rstrip()) and found.rstrip().endswith("|")
    assert [line for line in found.splitlines() if line.startswith("#")] == [
        "# Report", "## Headline", "## Differences to lora", "### Over seeds alone",
    ]  # fmt: skip


@pytest.mark.parametrize("count", [1, 2])
def test_a_method_with_fewer_seeds_than_the_others_is_named_and_does_not_speak_for_them(
    count: int, tmp_path: Path
) -> None:
    made = make_detection()
    text = report(tmp_path, made[(made["method"] != "dgs") | (made["seed"] < count)]).split("\n## ")[0]
    assert f"**Fewer seeds than the others' 5** of `dgs` ({count}): " in text
    assert "**Only" not in text and "**One seed" not in text


def test_measures_are_named_in_words_beside_their_keys(tmp_path: Path) -> None:
    forgetting = make_forgetting(noise=0.0)
    drift = forgetting["measure"] == "cosine_drift"
    forgetting.loc[drift, "after"] = forgetting.loc[drift, "after"].where(forgetting["method"] != "probe", -1e-9)
    text = report(tmp_path, make_detection(), forgetting)
    assert "| zero-shot shape (`zero_shot:shape`) | 90.0 | 90.0 ±0.0 | 54.0 ±0.0 | 45.0 ±0.0 |" in text
    assert "| caption retrieval at 1 (`retrieval_at_1`) | 80.0 |" in text
    assert "| CKA to frozen (`cka_to_frozen`) | 100.0 |" in text
    assert "| cosine drift (`cosine_drift`) | 0.0 | 0.0 ±0.0 |" in text
    assert "| linear probe, shape (`linear_probe:shape`) | 95.0 | 95.0 ±0.0 | 57.0 ±0.0 | 47.5 ±0.0 |" in text
    whole, blocks = text.split("## Forgetting")[1].split("\n## ")[0].split("### By vision block")
    assert "| silhouette, real against fake (`silhouette`) | 10.0 |" in whole and "_block:" not in whole
    assert "| CKA, block 4 (`cka_block:4`) | 100.0 | 100.0 ±0.0 | 60.0 ±0.0 | 50.0 ±0.0 |" in blocks
    assert "| cosine drift, block 2 (`cosine_drift_block:2`) | 0.0 | 0.0 ±0.0 | 20.0 ±0.0 | 25.0 ±0.0 |" in blocks
    assert not re.search(r"[-−]0\.0\b", whole + blocks), "what changed by nothing has no sign"


def test_a_users_own_folder_has_no_unseen_columns(tmp_path: Path) -> None:
    text = report(tmp_path, make_detection(("dgs",), 2, ("mine",), 1, rho=float("nan")))
    assert "| method | balanced acc., seen | AP, seen |" in text
    assert "## Differences" not in text, "there is neither lora nor the probe to compare with"
    assert "| unseen generators | none |" in text and "rho" not in text
    summarised = summary_sections(text)
    assert "## Headline" in summarised and "## Differences" not in summarised and "## Operating" not in summarised


def test_links_are_relative(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="relative"):
        report(tmp_path, make_detection(), figures=["/tmp/x.png"])


def test_a_pipe_or_a_new_line_in_a_name_does_not_break_the_table() -> None:
    assert markdown_table(["a", "b"], [["x|y", "1"]]).splitlines() == ["| a | b |", "| --- | ---: |", "| x\\|y | 1 |"]
    assert markdown_table(["a"], [["x\ny"]]).splitlines()[2:] == ["| x\\ny |"]


# Rates of five seeds whose mean is the key exactly; floats of it differ in the last bits with the order of the sum.
TIES = {0.6955: (0.6950, 0.6960, 0.6940, 0.6970, 0.6955), 0.9825: (0.9800, 0.9850, 0.9775, 0.9875, 0.9825)}


class TestRounding:
    """Exact ties of the first decimal, whose sums carry different noise."""

    @pytest.mark.parametrize(("exact", "printed"), [(0.6955, "69.6"), (0.9825, "98.3")])
    def test_equal_values_print_alike_in_every_section(self, tmp_path: Path, exact: float, printed: str) -> None:
        rates = ["acc", "balanced_acc", "r_acc", "f_acc", "ap", "auroc", "tpr_at_1fpr", "tpr_at_5fpr", "ece"]
        detection = make_detection(noise=0.0)
        for i, method in enumerate(METHODS):  # each method meets the same rates in another order of seeds
            own = TIES[exact][i:] + TIES[exact][:i]
            for seed, value in enumerate(own):
                noisy = value + (-1) ** seed * i * 1e-13
                detection.loc[(detection["method"] == method) & (detection["seed"] == seed), rates] = noisy
        jpeg = detection.assign(condition="jpeg:50")
        text = report(tmp_path, pd.concat([detection, jpeg]))
        assert text.count("| `jpeg:50` | +0.0 ±0.0 | +0.0 ±0.0 | +0.0 ±0.0 |") == 2
        text = text.replace("+0.0 ±0.0", "")
        tables = text.split("## Headline")[1].split("## How to read")[0]
        cells = re.findall(r"(?<![\d.±+−\[])(\d+\.\d)(?= [±\[])", tables)
        assert len(cells) == (4 + 1) * 3 + 3 + 6 * 3 + (3 * 10 + 1) * 3 + 2 * 3 + 3 and set(cells) == {printed}
        macc = next(line for line in text.splitlines() if "(mAcc" in line)
        assert [macc.count(f"`{method}` {printed}") for method in METHODS] == [1, 1, 1]
        assert len(set(re.findall(r"±(\d+\.\d)", tables))) == 1, "half intervals print alike too"

    def test_the_means_ends_and_differences_of_a_tie(self, tmp_path: Path) -> None:
        detection = make_detection(("lora", "dgs"), noise=0.0)
        detection["balanced_acc"] = detection["method"].map({"lora": 0.6955 - 1e-14, "dgs": 0.6955 + 0.0205 + 1e-14})
        text = report(tmp_path, detection)
        assert "| `lora` | 69.6 [69.6, 69.6] | 67.5 [67.5, 67.5] | 69.6 [69.6, 69.6] |" in text
        assert text.count("+2.1 [+2.1, +2.1]") == 2, "seen, worst"
        assert "| +2.1 [+1.1, +3.1] | [+2.1, +2.1] |" in text

    def test_the_differences_are_of_the_numbers_before_rounding(self, tmp_path: Path) -> None:
        detection = make_detection(("lora", "dgs"), noise=0.0)
        detection["balanced_acc"] = detection["method"].map({"lora": 0.5 + 4.9e-7, "dgs": 0.5205 - 4.9e-7})
        assert "| `dgs` | balanced acc., unseen | +2.0 [+1.0, +3.0] | [+2.0, +2.0] |" in report(tmp_path, detection)


class TestSettings:
    def test_what_differs_is_named_in_the_order_of_methods_with_a_warning_above(
        self, whole: str, tmp_path: Path
    ) -> None:
        given = {"dgs": {"train": {"lr": 0.05}, "seeds": [0, 1]}, "probe": PARAMS, "lora": PARAMS}
        text = report(tmp_path, make_detection(), settings=given)
        assert "| `train.lr` | `dgs: 0.05; probe: 0.003; lora: 0.003` |" in text and "| `seeds` | `[0, 1]` |" in text
        assert "| `train.epochs` | `dgs: –; probe: 1; lora: 1` |" in text, "a setting that one method lacks"
        lines = text.splitlines()
        assert lines.index(WARNING) < lines.index("## Headline") < lines.index("| setting | value |")
        assert text.count(WARNING) == 1
        assert whole.count("| `train.lr` | `0.003` |") == 1 and "different settings" not in whole

    def test_what_does_not_enter_training_is_named_without_a_warning(self, tmp_path: Path) -> None:
        given = {name: {"compute": {"jobs": jobs}} for name, jobs in (("lora", 1), ("dgs", 2))}
        text = report(tmp_path, make_detection(), settings=given)
        assert "| `compute.jobs` | `lora: 1; dgs: 2` |" in text and WARNING not in text

    def test_no_settings_no_table_and_settings_of_no_method_are_refused(self, tmp_path: Path) -> None:
        assert "Settings:" not in report(tmp_path, make_detection(), settings={})
        with pytest.raises(ValueError, match="each method"):
            report(tmp_path, make_detection(), settings={"profile": "mini"})  # type: ignore[dict-item]
