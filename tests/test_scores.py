"""The table of scores: one schema, small, the same bytes each time, and errors that say what to do."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from dgs.analysis.scores import SCORES, read_scores, write_scores
from dgs.errors import UserError


@pytest.fixture(scope="module")
def scores() -> pd.DataFrame:
    """Two methods and three seeds on 1,200 images."""
    ids = [f"test/{name}/{number:05d}.png" for name in ("real", "vq", "splice") for number in range(400)]
    images = pd.DataFrame({"id": ids, "sha256": [hashlib.sha256(name.encode()).hexdigest() for name in ids]})
    images = images.assign(split="test", generator=[name.split("/")[1] for name in ids], rho=0.9, profile="mini")
    images = images.assign(label=(images["generator"] != "real").astype(int), condition="native", applied_to="both")
    rng = np.random.default_rng(0)
    runs = [(method, seed) for method in ("lora", "dgs") for seed in range(3)]
    parts = [images.assign(method=name, seed=seed, logit=rng.normal(size=len(ids))) for name, seed in runs]
    return pd.concat(parts, ignore_index=True).sample(frac=1, axis=1, random_state=0).assign(extra=1)


def test_what_is_written_is_read_in_the_schema_s_order_and_types(scores: pd.DataFrame, tmp_path: Path) -> None:
    write_scores(scores, tmp_path / "a.parquet")
    found = read_scores(tmp_path / "a.parquet")
    assert list(found) == list(SCORES)
    assert found.dtypes[["label", "rho", "logit", "seed"]].astype(str).tolist() == [
        "int64",
        "float64",
        "float32",
        "int64",
    ]
    assert found["id"].tolist() == scores["id"].tolist(), "rows keep their order"
    assert found["logit"].to_numpy() == pytest.approx(scores["logit"].to_numpy(), rel=1e-6)
    write_scores(found, tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_names_are_kept_once_and_logits_take_4_bytes(scores: pd.DataFrame, tmp_path: Path) -> None:
    write_scores(scores, tmp_path / "a.parquet")
    columns = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0)
    sizes = {(own := columns.column(i)).path_in_schema: own.total_compressed_size for i in range(len(SCORES))}
    assert sizes["sha256"] < 64 * 1200, "less than its text, once"
    assert sizes["logit"] < 4.2 * len(scores) and sizes["method"] + sizes["split"] + sizes["generator"] < 2000


def test_a_table_that_is_no_scores_is_refused_in_a_sentence(scores: pd.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    with pytest.raises(UserError, match=r"Expected scores at .*found none. Evaluate first"):
        read_scores(path)
    path.write_text("no table")
    with pytest.raises(UserError, match=r"found another file .*Evaluate again"):
        read_scores(path)
    scores.drop(columns=["sha256", "rho"]).to_parquet(path)
    with pytest.raises(UserError, match=r"found none called sha256, rho"):
        read_scores(path)
    for wrong in (scores.assign(label="fake"), scores.assign(method=7)):
        with pytest.raises(UserError, match="Expected scores with"):
            write_scores(wrong, tmp_path / "b.parquet")
    assert not (tmp_path / "b.parquet").exists()
