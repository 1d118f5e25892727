"""The committed manifest of real pictures, and the rule that cut validation from training."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from dgs.errors import UserError
from real.layout import lay_out
from real.manifest import COLUMNS, read_manifest, validation_groups

COMMIT, SHA = "0" * 40, "0" * 64
LABELS = {"0": "0_real", "1": "1_fake"}


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return read_manifest()


def test_every_picture_has_a_place_a_source_at_a_commit_and_a_hash(rows: pd.DataFrame) -> None:
    assert tuple(rows.columns) == COLUMNS and len(rows) == 1114
    for row in rows.itertuples():
        assert str(row.path).startswith(f"{row.split}/{row.generator}/{LABELS[str(row.label)]}/")
        assert re.fullmatch(r"[0-9a-f]{40}", str(row.commit)) and re.fullmatch(r"[0-9a-f]{64}", str(row.sha256))
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", str(row.repository)) and row.licence
    assert not rows["sha256"].duplicated().any(), "no picture twice, in no two splits"


def test_groups_are_numbers_that_hold_no_text(rows: pd.DataFrame) -> None:
    assert rows["group"].str.fullmatch(r"\d+").all()


def test_no_group_is_both_trained_and_validated_on(rows: pd.DataFrame) -> None:
    groups = {split: set(part["group"]) for split, part in rows.groupby("split")}
    assert not groups["train"] & groups["val"]


def test_the_committed_validation_is_the_rules(rows: pd.DataFrame) -> None:
    known = rows[rows["split"] != "test"]
    assert set(known.loc[known["split"] == "val", "group"]) == validation_groups(known)
    sizes = known.assign(val=known["split"] == "val").groupby(["generator", "label"])["val"].mean()
    assert sizes.between(0.12, 0.16).all()


def test_the_marked_images_are_those_of_glid3_xl_whose_prompt_training_has(rows: pd.DataFrame) -> None:
    test, known = rows[rows["split"] == "test"], rows[rows["split"] != "test"]
    marked = test["prompt_trained_on"] == "1"
    assert (marked == test["group"].isin(known.loc[known["generator"] == "latent_diffusion", "group"])).all()
    assert set(test.loc[marked, "generator"]) == {"glid3_xl"} and marked.sum() == 39
    assert (known["prompt_trained_on"] == "0").all()


def written(folder: Path, *lines: str, columns: str = "") -> Path:
    file, named = folder / "m.csv", ["path,repository,commit,source_path,sha256", *([columns] if columns else [])]
    file.write_text("\n".join([",".join(named), *lines]) + "\n")
    return file


def make_rows() -> pd.DataFrame:
    """Ten pictures alone, and twelve in groups of four."""
    groups = [str(number) for number in range(10)] + [str(10 + number // 4) for number in range(12)]
    label = ["0"] * 10 + ["1"] * 12
    return pd.DataFrame({"generator": "g", "label": label, "group": groups, "sha256": [f"{n:064x}" for n in range(22)]})


def test_whole_groups_are_taken_until_the_share_is_reached_in_each_label() -> None:
    rows = make_rows()
    taken = rows["group"].isin(validation_groups(rows, share=0.2))
    assert taken.groupby(rows["label"]).sum().to_dict() == {"0": 2, "1": 4}
    assert rows.loc[taken, "group"].nunique() == 3


def test_the_seed_draws_and_the_order_of_rows_does_not_matter() -> None:
    rows = make_rows()
    draws = [validation_groups(rows, seed, 0.2) for seed in range(5)]
    assert len({frozenset(draw) for draw in draws}) > 1
    assert validation_groups(rows.iloc[::-1], 3, 0.2) == draws[3]


def test_a_manifest_that_cannot_be_used_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found none that can be read"):
        read_manifest(tmp_path / "none.csv")
    (tmp_path / "few.csv").write_text("path,sha256\na,b\n")
    with pytest.raises(UserError, match="found no repository"):
        read_manifest(tmp_path / "few.csv")
    with pytest.raises(UserError, match="found a twice"):
        read_manifest(written(tmp_path, f"a,b/c,{COMMIT},e,{SHA}", f"a,b/c,{COMMIT},e,{SHA}"))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (f"a,b/c,--upload-pack=x,e,{SHA}", "every commit in .* to be a hash, found '--upload-pack=x'"),
        (f"a,b/c,{COMMIT},e", "every sha256 in .* to be a hash, found ''"),
        (f"a,b/..,{COMMIT},e,{SHA}", "every repository in .* to lie in a folder"),
        (f"a,b/c,{COMMIT},/etc/e,{SHA}", "every source_path in .* to lie in a folder"),
        (f"../a,b/c,{COMMIT},e,{SHA}", "every path in .* to lie in a folder"),
    ],
)
def test_a_line_that_reaches_elsewhere_or_is_too_short_is_a_sentence(tmp_path: Path, line: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read_manifest(written(tmp_path, line))


def test_what_lies_nowhere_is_all_missing(rows: pd.DataFrame, tmp_path: Path) -> None:
    found = lay_out(rows, tmp_path / "pictures")
    assert not found.is_whole and found.missing == tuple(rows["path"]) and not (tmp_path / "pictures").exists()


def test_names_like_na_stay_as_they_are(tmp_path: Path) -> None:
    rows = read_manifest(written(tmp_path, f"a,b/c,{COMMIT},e,{SHA},NA", columns="generator"))
    assert rows["generator"].tolist() == ["NA"]
