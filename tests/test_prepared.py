"""What prepare saves is what the later stages open; an output is whole or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import ImageTree, structured_image
from copies import snapshot
from settings import DataParams, validate

from dgs.atomic import replacing
from dgs.data.manifest import build_manifest, data_hash
from dgs.data.patches import patch_entropy, select_indices
from dgs.data.prepared import TRAINING, compute_patches, load_prepared, load_training, save_prepared
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
    return build_manifest(root, DataParams(layout="folders", root=str(root), rho=None))


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


class TestRoundTrip:
    def test_the_manifest_and_the_facts_about_it(self, tmp_path: Path, root: Path, manifest: pd.DataFrame) -> None:
        prepared = load_prepared(saved(tmp_path / "out", manifest), root)
        pd.testing.assert_frame_equal(prepared.manifest[manifest.columns], manifest)
        assert data_hash(prepared.manifest) == prepared.info["data_hash"] == data_hash(manifest)
        assert prepared.info["rho"] is None and prepared.info["seen"] == ["alpha", "beta"]
        assert prepared.patches is None and prepared.prompts == {}

    def test_every_row_gets_the_embedding_of_its_caption(
        self, tmp_path: Path, root: Path, manifest: pd.DataFrame
    ) -> None:
        manifest = manifest.assign(caption=[f"caption {index % 5}" for index in range(len(manifest))])
        embeddings = embeddings_of(manifest)
        prepared = load_prepared(saved(tmp_path / "out", manifest, captions=embeddings), root)
        assert prepared.caption_embeddings.shape == (len(manifest), 6)
        for index, caption in enumerate(manifest["caption"]):
            assert np.array_equal(prepared.caption_embeddings[index], embeddings[caption])

    def test_a_splits_rows_still_point_into_the_embeddings(
        self, tmp_path: Path, root: Path, manifest: pd.DataFrame
    ) -> None:
        manifest = manifest.assign(caption=[f"caption {index}" for index in range(len(manifest))])
        embeddings = embeddings_of(manifest)
        prepared = load_prepared(saved(tmp_path / "out", manifest, captions=embeddings), root)
        rows = prepared.split("test")
        assert len(rows) == 18 and set(rows["split"]) == {"test"}
        for index, caption in zip(rows.index, rows["caption"], strict=True):
            assert np.array_equal(prepared.caption_embeddings[index], embeddings[caption])

    def test_prompts_keep_their_values_and_order(self, tmp_path: Path, root: Path, manifest: pd.DataFrame) -> None:
        matrix = np.arange(12, dtype=np.float32).reshape(4, 3)
        prompts = {"shape": (["ring", "disc", "star"], matrix.T), "colour": (["red"], matrix[:1])}  # .T: not contiguous
        prepared = load_prepared(saved(tmp_path / "out", manifest, prompts=prompts), root)
        assert {name: values for name, (values, _) in prepared.prompts.items()} == {
            "shape": ["ring", "disc", "star"],
            "colour": ["red"],
        }
        assert np.array_equal(prepared.prompts["shape"][1], matrix.T)
        assert np.array_equal(prepared.prompts["colour"][1], matrix[:1])

    def test_patch_indices_of_different_lengths(self, tmp_path: Path, root: Path, manifest: pd.DataFrame) -> None:
        hashes = sorted(manifest["sha256"].unique())
        rng = np.random.default_rng(0)
        patches = {sha: rng.permutation(50)[: 1 + index].astype(np.int32) for index, sha in enumerate(hashes[::-1])}
        prepared = load_prepared(saved(tmp_path / "out", manifest, patches=patches), root)
        assert prepared.patches is not None and set(prepared.patches) == set(hashes)
        for sha, kept in patches.items():
            assert prepared.patches[sha].dtype == np.int32
            assert prepared.patches[sha].tolist() == kept.tolist()

    def test_images_are_read_from_the_root(self, tmp_path: Path, root: Path, manifest: pd.DataFrame) -> None:
        prepared = load_prepared(saved(tmp_path / "out", manifest), root)
        row = manifest.iloc[3]
        assert prepared.source.read(row["file"], row["row"]) == (root / row["file"]).read_bytes()

    def test_equal_inputs_give_equal_bytes(self, tmp_path: Path, root: Path, manifest: pd.DataFrame) -> None:
        patches = compute_patches(manifest, load_prepared(saved(tmp_path / "a", manifest), root).source, PARAMS)
        shuffled = dict(reversed(patches.items()))
        first = saved(tmp_path / "b", manifest, patches=patches)
        second = saved(tmp_path / "c", manifest, patches=shuffled)
        assert snapshot(first) == snapshot(second) and f"{TRAINING}/patches.safetensors" in snapshot(first)


class TestWhatTrainingOpens:
    def test_is_all_but_test_images(self, tmp_path: Path, root: Path, manifest: pd.DataFrame) -> None:
        manifest = manifest.assign(caption=[f"caption {index % 5}" for index in range(len(manifest))])
        embeddings = embeddings_of(manifest)
        patches = {sha: np.arange(3, dtype=np.int32) for sha in manifest["sha256"]}
        folder = saved(tmp_path / "out", manifest, captions=embeddings, patches=patches)
        training, whole = load_training(folder, root), load_prepared(folder, root)
        expected = manifest[manifest["split"] != "test"].reset_index(drop=True)
        pd.testing.assert_frame_equal(training.manifest[manifest.columns], expected)
        for embedding, caption in zip(training.caption_embeddings, expected["caption"], strict=True):
            assert np.array_equal(embedding, embeddings[caption])
        assert training.patches is not None and set(training.patches) == set(expected["sha256"])
        assert training.info.items() <= whole.info.items() and set(whole.info) - set(training.info) == {
            "data_hash",
            "images",
        }
        assert training.info["training_hash"] == data_hash(expected) != whole.info["data_hash"]
        assert (training.source.root, training.info["rho"]) == (whole.source.root, None)

    @pytest.mark.parametrize(("split", "same"), [("test", True), ("val", False), ("train", False)])
    def test_depends_on_no_test_image(
        self, split: str, same: bool, tmp_path: Path, root: Path, manifest: pd.DataFrame
    ) -> None:
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


class TestWhatWasPreparedDecides:
    """By hand, prepare may be given other data than params.yaml names: later notebooks must go on with those."""

    def test_data_patches_and_clip_are_those_of_prepare_and_the_rest_is_the_runs(
        self, tmp_path: Path, root: Path, manifest: pd.DataFrame
    ) -> None:
        used = validate(
            {
                "data": {"layout": "folders", "root": ".", "rho": None},
                "patches": {"enabled": True, "size": 8},
                "model": {"clip": "another/clip", "lora": {"rank": 3}},
                "train": {"batch_size": 7},
            }
        )
        run = validate({"model": {"lora": {"rank": 5}}, "train": {"batch_size": 9}, "seeds": [4]})
        adopted = load_prepared(saved(tmp_path / "out", manifest, params=used), root).with_prepared(run)
        assert (adopted.data, adopted.patches, adopted.model.clip) == (used.data, used.patches, "another/clip")
        assert (adopted.model.lora.rank, adopted.train.batch_size, adopted.seeds) == (5, 9, [4])
        prepared = load_prepared(tmp_path / "out", root)
        kept = prepared.overridden(run)
        assert "model.clip stays 'another/clip', as prepared, not 'data/clip': to change it, prepare again." in kept
        assert not any("lora" in note or "batch_size" in note for note in kept)
        assert prepared.overridden(adopted) == []

    def test_images_are_read_from_the_root_that_was_prepared(
        self, tmp_path: Path, root: Path, manifest: pd.DataFrame
    ) -> None:
        used = validate({"data": {"layout": "folders", "root": str(root), "rho": None}})
        prepared = load_prepared(saved(tmp_path / "out", manifest, params=used), tmp_path / "elsewhere")
        assert prepared.source.root == root


class TestPatches:
    def test_one_entry_a_distinct_image_as_selected_by_entropy(
        self, tmp_path: Path, root: Path, manifest: pd.DataFrame
    ) -> None:
        source = load_prepared(saved(tmp_path / "out", manifest), root).source
        patches = compute_patches(manifest, source, PARAMS)
        assert set(patches) == set(manifest["sha256"]) and len(patches) == len(manifest) - 1
        large = manifest.loc[manifest["file"].str.endswith("large.png"), "sha256"].iloc[0]
        pixels = np.array(structured_image(555, 64, 56))
        assert patches[large].tolist() == select_indices(patch_entropy(pixels, 8), 49).tolist()
        assert sorted({len(kept) for kept in patches.values()}) == [40, 49]  # 20 patches: 20 lowest + 20 highest

    def test_an_image_under_one_patch_is_named(self, tmp_path: Path, root: Path, manifest: pd.DataFrame) -> None:
        source = load_prepared(saved(tmp_path / "out", manifest), root).source
        params = validate({"patches": {"enabled": True, "size": 48}})
        small = manifest[~manifest["file"].str.contains("large|same")]
        with pytest.raises(UserError) as error:
            compute_patches(small, source, params)
        message = str(error.value)
        assert small["file"].iloc[0] in message and "48 x 48 px" in message and "\n" not in message


class TestReplacing:
    def test_an_output_takes_its_place_when_the_block_ends_well(self, tmp_path: Path) -> None:
        target = tmp_path / "build" / "prepare"
        for content in ("old", "new"):
            with replacing(target) as draft:
                (draft / f"{content}.txt").write_text(content)
                assert draft != target
        assert [path.name for path in target.iterdir()] == ["new.txt"]
        assert [path.name for path in target.parent.iterdir()] == ["prepare"]

    @pytest.mark.parametrize("before", [True, False])
    def test_a_failure_leaves_what_was_there(self, tmp_path: Path, before: bool) -> None:
        target = tmp_path / "build" / "prepare"
        if before:
            target.mkdir(parents=True)
            (target / "old.txt").write_text("old")
        with pytest.raises(KeyboardInterrupt), replacing(target) as draft:
            (draft / "half.txt").write_text("half")
            raise KeyboardInterrupt
        assert [path.name for path in target.parent.iterdir()] == (["prepare"] if before else [])
        assert not before or [path.name for path in target.iterdir()] == ["old.txt"]
