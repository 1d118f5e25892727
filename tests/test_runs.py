"""All seeds of a method in processes of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from copies import ROOT, snapshot

from dgs.data.prepared import TRAINING
from dgs.errors import UserError
from dgs.model.runs import train_seeds
from dgs.params import Params

pytestmark = pytest.mark.slow


@pytest.fixture
def params(tiny: Params) -> Params:
    return tiny.model_copy(update={"seeds": [0, 1, 2]})


def train_with(
    jobs: int, params: Params, tiny_prepared: Path, folder: Path, unfinished: Path | None = None
) -> dict[str, bytes]:
    folder.mkdir()
    with_jobs = params.model_copy(update={"compute": params.compute.model_copy(update={"jobs": jobs})})
    journals = train_seeds(
        "lora", with_jobs, ROOT, tiny_prepared, folder, unfinished or folder.parent / f"unfinished-{jobs}"
    )
    assert [journal.seed for journal in journals] == params.seeds
    return {name: data for name, data in snapshot(folder).items() if not name.endswith(("dgs.json", "SHA256SUMS"))}


def test_results_do_not_depend_on_how_many_seeds_train_side_by_side(
    params: Params, tiny_prepared: Path, tmp_path: Path
) -> None:
    one, three = (train_with(jobs, params, tiny_prepared, tmp_path / str(jobs)) for jobs in (1, 3))
    assert len(one) == 3 * 4
    assert one == three


def test_a_finished_seed_is_not_trained_again(params: Params, tiny_prepared: Path, tmp_path: Path) -> None:
    """As after a kill between two seeds: what is there of the same run is taken, by the bytes."""
    whole = train_with(2, params, tiny_prepared, tmp_path / "2")
    (first,) = (
        f for f in (tmp_path / "unfinished-2").glob("*/checkpoint") if '"seed": 1,' in (f / "dgs.json").read_text()
    )
    mark = b"trained before"
    (first / "mark").write_bytes(mark)
    again = train_with(2, params, tiny_prepared, tmp_path / "2b", tmp_path / "unfinished-2")
    assert again == {**whole, "seed-1/mark": mark}


def test_with_fewer_training_images_a_seed_trains_on_those_alone(
    params: Params, tiny_prepared: Path, tmp_path: Path
) -> None:
    few = params.model_copy(update={"train": params.train.model_copy(update={"images": 8, "batch_size": 4})})
    journals = train_seeds("lora", few, ROOT, tiny_prepared, tmp_path / "few", tmp_path / "unfinished")
    steps = {int(journal.losses["step"].max()) for journal in journals}
    assert steps == {2 * few.train.stage2.epochs}


def test_a_mistake_in_a_worker_reaches_the_user_as_its_sentence(
    params: Params, tiny_prepared: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"Expected model\.clip to be a folder or an open_clip name"):
        broken = params.model_copy(update={"model": params.model.model_copy(update={"clip": "nowhere"})})
        train_seeds("lora", broken, ROOT, tiny_prepared, tmp_path, tmp_path / "unfinished")


@pytest.mark.parametrize(("name", "what"), [("clip", "weights"), ("clip_features", "settings")])
def test_another_clip_than_captions_were_embedded_by_is_refused(
    name: str, what: str, params: Params, tiny_prepared: Path, tmp_path: Path
) -> None:
    """By hand one may be put in its place after prepare; in the pipeline that reruns prepare."""
    shutil.copytree(tiny_prepared, tmp_path / "prepared")
    file = tmp_path / "prepared" / TRAINING / "data.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: "0" * 64}))
    with pytest.raises(UserError, match=rf"with {what} 000000000000, found sample/clip with .*\. Run prepare again"):
        train_seeds("probe", params, ROOT, tmp_path / "prepared", tmp_path, tmp_path / "unfinished")
