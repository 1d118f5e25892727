"""What prepare saves is what the later stages open; an output is whole or absent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import ImageTree, structured_image
from copies import snapshot
from settings import DataParams, validate

from dgs.atomic import replacing
from dgs.data.manifest import ImageSource, build_manifest, data_hash
from dgs.data.patches import patch_indices
from dgs.data.prepared import TRAINING, Prepared, compute_patches, load_prepared, load_training, save_prepared
from dgs.errors import UserError

PARAMS = validate({"patches": {"enabled": True, "size": 8, "count": 49}})


@pytest.fixture
def root(image_tree: ImageTree) -> Path:
    """Images of two sizes (20 and 56 patches), one of them twice."""
    root = image_tree()
    large = structured_image(555, 64, 56)
    large.save(root / "train" / "alpha" / "0_real" / "large.png")
    large.save(root / "train" / "beta" / "0_real" / "same.png")
    return root


@pytest.fixture
def manifest(root: Path) -> pd.DataFrame:
    """Five captions by turns."""
    table = build_manifest(root, DataParams(layout="folders", root=str(root), rho=None))
    return table.assign(caption=[f"caption {index % 5}" for index in range(len(table))])


def embeddings_of(manifest: pd.DataFrame) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {text: rng.normal(size=6).astype(np.float32) for text in manifest["caption"].unique()}


def saved(folder: Path, manifest: pd.DataFrame, **parts: Any) -> Path:
    """A prepare output of images that lie in the folder which `load_prepared` is told to be the repository."""
    folder.mkdir()
    values: dict[str, Any] = {
        "info": {"data_hash": data_hash(manifest), "images": len(manifest), "rho": None, "seen": ["alpha", "beta"]},
        "captions": embeddings_of(manifest),
        "prompts": {},
        "patches": None,
        "params": validate({"data": {"layout": "folders", "root": ".", "rho": None}}),
    } | parts
    save_prepared(folder, manifest, **values)
    return folder


@pytest.fixture
def reopened(tmp_path: Path, root: Path, manifest: pd.DataFrame) -> Callable[..., Prepared]:
    """What is opened after it was saved with other parts."""
    return lambda **parts: load_prepared(saved(tmp_path / "out", manifest, **parts), root)


class TestRoundTrip:
    def test_the_manifest_the_facts_about_it_and_its_images(
        self, reopened: Callable[..., Prepared], root: Path, manifest: pd.DataFrame
    ) -> None:
        prepared = reopened()
        pd.testing.assert_frame_equal(prepared.manifest[manifest.columns], manifest)
        assert data_hash(prepared.manifest) == prepared.info["data_hash"] == data_hash(manifest)
        assert prepared.info["rho"] is None and prepared.info["seen"] == ["alpha", "beta"]
        assert prepared.patches is None and prepared.prompts == {} and prepared.cautions == []
        row = manifest.iloc[3]
        assert prepared.source.read(row["file"], row["row"]) == (root / row["file"]).read_bytes()

    def test_every_row_gets_the_embedding_of_its_caption_and_a_splits_rows_still_point_to_theirs(
        self, reopened: Callable[..., Prepared], manifest: pd.DataFrame
    ) -> None:
        embeddings = embeddings_of(manifest)
        prepared = reopened(captions=embeddings)
        assert prepared.caption_embeddings.shape == (len(manifest), 6)
        rows = prepared.split("test")
        assert len(rows) == 18 and set(rows["split"]) == {"test"}
        for some in (manifest, rows):
            for index, caption in zip(some.index, some["caption"], strict=True):
                assert np.array_equal(prepared.caption_embeddings[index], embeddings[caption])

    def test_prompts_keep_their_values_and_order(self, reopened: Callable[..., Prepared]) -> None:
        matrix = np.arange(12, dtype=np.float32).reshape(4, 3)
        prompts = {"shape": (["ring", "disc", "star"], matrix.T), "colour": (["red"], matrix[:1])}  # .T: not contiguous
        found = reopened(prompts=prompts).prompts
        assert list(found) == list(prompts)
        for name, (values, embedding) in prompts.items():
            assert found[name][0] == values and np.array_equal(found[name][1], embedding)

    def test_patch_indices_of_different_lengths(
        self, reopened: Callable[..., Prepared], manifest: pd.DataFrame
    ) -> None:
        hashes = sorted(manifest["sha256"].unique())
        rng = np.random.default_rng(0)
        patches = {sha: rng.permutation(50)[: 1 + index].astype(np.int32) for index, sha in enumerate(hashes[::-1])}
        found = reopened(patches=patches).patches
        assert found is not None and set(found) == set(hashes)
        for sha, kept in patches.items():
            assert found[sha].dtype == np.int32 and found[sha].tolist() == kept.tolist()

    def test_equal_inputs_give_equal_bytes(self, tmp_path: Path, root: Path, manifest: pd.DataFrame) -> None:
        patches = compute_patches(manifest, ImageSource(root), PARAMS)
        assert patches is not None
        first = saved(tmp_path / "a", manifest, patches=patches)
        second = saved(tmp_path / "b", manifest, patches=dict(reversed(patches.items())))
        assert snapshot(first) == snapshot(second) and f"{TRAINING}/patches.safetensors" in snapshot(first)


class TestWhatTrainingOpens:
    def test_is_all_but_test_images(self, tmp_path: Path, root: Path, manifest: pd.DataFrame) -> None:
        embeddings = embeddings_of(manifest)
        patches = {sha: np.arange(3, dtype=np.int32) for sha in manifest["sha256"]}
        folder = saved(tmp_path / "out", manifest, captions=embeddings, patches=patches)
        training, whole = load_training(folder, root), load_prepared(folder, root)
        expected = manifest[manifest["split"] != "test"].reset_index(drop=True)
        pd.testing.assert_frame_equal(training.manifest[manifest.columns], expected)
        for embedding, caption in zip(training.caption_embeddings, expected["caption"], strict=True):
            assert np.array_equal(embedding, embeddings[caption])
        assert training.patches is not None and set(training.patches) == set(expected["sha256"])
        assert training.info.items() <= whole.info.items()
        assert set(whole.info) - set(training.info) == {"data_hash", "images"}
        assert training.info["training_hash"] == data_hash(expected) != whole.info["data_hash"]
        assert (training.source.root, training.info["rho"]) == (whole.source.root, None)

    @pytest.mark.parametrize(("split", "same"), [("test", True), ("val", False), ("train", False)])
    def test_depends_on_no_test_image(self, split: str, same: bool, tmp_path: Path, manifest: pd.DataFrame) -> None:
        """To the byte, so that DVC trains nothing again where other images are tested on, nor more of them."""
        (row,) = manifest.index[manifest["split"] == split][:1]
        changed = manifest.copy()
        changed.loc[row, ["sha256", "caption"]] = "0" * 64, "another"
        changed = pd.concat([changed, changed.loc[[row]].assign(id="one more", sha256="1" * 64)])
        captions = {text: np.full(6, len(text), np.float32) for text in [*manifest["caption"], "another"]}
        parts = []
        for name, some in (("mine", manifest), ("theirs", changed.sort_values(["split", "id"], ignore_index=True))):
            patches = {sha: np.arange(len(some), dtype=np.int32) for sha in some["sha256"]}
            patches |= {sha: np.arange(3, dtype=np.int32) for sha in manifest["sha256"]}
            parts.append(saved(tmp_path / name, some, captions=captions, patches=patches) / TRAINING)
        assert (snapshot(parts[0]) == snapshot(parts[1])) is same


def test_data_patches_clip_and_root_are_those_of_prepare_and_the_rest_is_the_runs(
    reopened: Callable[..., Prepared], root: Path, tmp_path: Path
) -> None:
    """By hand, prepare may be given other data than params.yaml names: later notebooks must go on with those."""
    used = validate(
        {
            "data": {"layout": "folders", "root": str(root), "rho": None},
            "patches": {"enabled": True, "size": 8},
            "model": {"clip": "another/clip", "lora": {"rank": 3}},
            "train": {"batch_size": 7},
        }
    )
    run = validate({"model": {"lora": {"rank": 5}}, "train": {"batch_size": 9}, "seeds": [4]})
    prepared = reopened(params=used)
    adopted = prepared.with_prepared(run)
    assert (adopted.data, adopted.patches, adopted.model.clip) == (used.data, used.patches, "another/clip")
    assert (adopted.model.lora.rank, adopted.train.batch_size, adopted.seeds) == (5, 9, [4])
    kept = prepared.overridden(run)
    assert "model.clip stays 'another/clip', as prepared, not 'data/clip': to change it, prepare again." in kept
    assert not any("lora" in note or "batch_size" in note for note in kept)
    assert prepared.overridden(adopted) == []
    assert load_prepared(tmp_path / "out", tmp_path / "elsewhere").source.root == root


class TestPatches:
    def test_one_entry_a_distinct_image_as_selected_by_entropy(self, root: Path, manifest: pd.DataFrame) -> None:
        patches = compute_patches(manifest, ImageSource(root), PARAMS)
        assert patches is not None and set(patches) == set(manifest["sha256"]) and len(patches) == len(manifest) - 1
        large = manifest.loc[manifest["file"].str.endswith("large.png"), "sha256"].iloc[0]
        pixels = np.array(structured_image(555, 64, 56))
        assert patches[large].tolist() == patch_indices(pixels, 8, 49).tolist()
        assert sorted({len(kept) for kept in patches.values()}) == [40, 49]  # 20 patches: 20 lowest + 20 highest

    def test_an_image_under_one_patch_is_named(self, root: Path, manifest: pd.DataFrame) -> None:
        small = manifest[~manifest["file"].str.contains("large|same")]
        with pytest.raises(UserError) as error:
            compute_patches(small, ImageSource(root), validate({"patches": {"enabled": True, "size": 48}}))
        message = str(error.value)
        assert small["file"].iloc[0] in message and "48 x 48 px" in message and "\n" not in message


@pytest.mark.parametrize("before", [True, False])
def test_a_failure_leaves_what_was_there(tmp_path: Path, before: bool) -> None:
    target = tmp_path / "build" / "prepare"
    if before:
        with replacing(target) as draft:
            (draft / "old.txt").write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(target) as draft:
        (draft / "half.txt").write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in target.parent.iterdir()] == (["prepare"] if before else [])
    assert not before or [path.name for path in target.iterdir()] == ["old.txt"]


class TestFewerTrainingImages:
    @pytest.fixture
    def prepared(self, tmp_path: Path) -> Prepared:
        cells = {("a", 0): 40, ("a", 1): 40, ("b", 1): 16, ("real", 0): 32}
        rows = [(*cell, number) for cell, size in cells.items() for number in range(size)]
        table = pd.DataFrame(rows, columns=["generator", "label", "number"]).assign(split="train")
        table.loc[table.index[:2], "split"] = ["val", "test"]
        table["id"] = [f"{row.generator}/{row.label}/{row.number}" for row in table.itertuples()]
        return Prepared(table, {}, np.zeros((len(table), 3), np.float32), {}, None, ImageSource(tmp_path))

    @staticmethod
    def drawn(prepared: Prepared, count: int, seed: int = 0) -> set[str]:
        return set(prepared.with_training_images(count, seed).split("train")["id"])

    def test_draws_of_a_seed_are_nested_and_another_seed_draws_others(self, prepared: Prepared) -> None:
        few, more = self.drawn(prepared, 16), self.drawn(prepared, 63)
        assert (len(few), len(more)) == (16, 63) and few < more
        assert few == self.drawn(prepared, 16) != self.drawn(prepared, 16, seed=1)

    @pytest.mark.parametrize("count", [8, 16, 63])
    def test_each_generator_and_label_keeps_its_share(self, prepared: Prepared, count: int) -> None:
        rows = prepared.split("train")
        whole = rows.groupby(["generator", "label"]).size()
        kept = rows[rows["id"].isin(self.drawn(prepared, count))].groupby(["generator", "label"]).size()
        assert (kept - whole * count / len(rows)).abs().max() <= 1

    def test_other_splits_and_embeddings_stay(self, prepared: Prepared) -> None:
        less = prepared.with_training_images(16, 0)
        for split in ("val", "test"):
            pd.testing.assert_frame_equal(less.split(split), prepared.split(split))
        assert less.caption_embeddings is prepared.caption_embeddings
        assert prepared.with_training_images(None, 0) is prepared

    def test_more_than_there_are_is_a_sentence(self, prepared: Prepared) -> None:
        with pytest.raises(UserError, match=r"at most 126, the training images there are, found 127"):
            prepared.with_training_images(127, 0)
