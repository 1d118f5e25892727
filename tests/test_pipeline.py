"""The pipeline as users run it: real DVC, real papermill, in copies of this repository."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from conftest import structured_image
from copies import run, snapshot

from dgs.workspace import read_yaml

STAGES_OF_A_RUN = ["prepare", "train@probe", "train@lora", "train@dgs", "evaluate", "gradient_angles"]


@pytest.fixture(scope="module")
def repo(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy in which `dvc repro` has run once, for the tests to change."""
    return shutil.copytree(finished, tmp_path_factory.mktemp("pipeline") / "repo")


def ran(output: str) -> list[str]:
    """Stages that a `dvc repro` ran."""
    return [line.split("'")[1].split(":")[-1] for line in output.splitlines() if line.startswith("Running stage")]


def stale(repo: Path, *pipeline: str) -> set[str]:
    """Stages that `dvc status` names; of data.dvc it says that the copy's origin may have news."""
    named = json.loads(run(repo, "dvc", "status", "--json", *pipeline).stdout)
    own = {name.split(":")[-1] for name in named if not name.startswith("studies/")}  # those are run beside it
    return own - {"data.dvc"}


def edit(path: Path) -> None:
    with path.open("a") as file:
        file.write("\n# edited\n")


@contextmanager
def put_back(repo: Path, *edited: str) -> Iterator[None]:
    """Afterwards the copy is as it was: edited files, and what the pipeline made of them, without another run."""
    kept = repo.parent / "kept"
    names = [*edited, "dvc.lock", "build", "results"]
    for name in names:
        source, target = repo / name, kept / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)
    try:
        yield
    finally:
        for name in names:
            if (repo / name).is_dir():
                shutil.rmtree(repo / name)
            shutil.move(kept / name, repo / name)
        shutil.rmtree(kept)


pytestmark = pytest.mark.slow


def test_a_run_makes_every_result(repo: Path) -> None:
    results = repo / "results" / "mini"
    metrics = json.loads((results / "metrics.json").read_text())
    assert set(metrics) == {"profile", "data_hash", "methods"}
    assert set(metrics["methods"]) == {"probe", "lora", "dgs"}
    entry = metrics["methods"]["dgs"]["balanced_acc_unseen"]
    assert set(entry) == {"mean", "low", "high", "per_seed"}
    assert 0 <= entry["mean"] <= 1
    detection = pd.read_csv(results / "detection.csv", dtype={"threshold_rule": str})
    columns = "rho method seed generator seen condition applied_to n_real n_fake acc balanced_acc r_acc f_acc ap auroc"
    assert " ".join(detection.columns) == f"{columns} tpr_at_1fpr tpr_at_5fpr ece threshold_rule"
    assert (detection["rho"] == 0.9).all()
    assert detection["seen"].nunique() == 2
    assert set(detection["threshold_rule"]) == {"0.5", "val", "val_unbiased", "oracle"}
    forgetting = pd.read_csv(results / "forgetting.csv")
    assert list(forgetting.columns) == ["rho", "method", "seed", "measure", "before", "after"]
    angles = pd.read_csv(results / "gradient_angles.csv")
    assert list(angles.columns) == ["rho", "method", "seed", "step", "layer", "pair", "mean", "p05", "p95"]
    assert set(angles["method"]) == {"lora", "dgs"} and {"features", "0.q"} <= set(angles["layer"])
    for name in ("gradient_batches", "update_subspaces", "head_ranks"):
        assert len(pd.read_csv(results / f"{name}.csv")) > 0
    assert "# " in (results / "REPORT.md").read_text()
    for name in ("prepare", "train-probe", "train-lora", "train-dgs", "evaluate", "gradient_angles"):
        notebook = nbformat.read(results / "notebooks" / f"{name}.ipynb", as_version=4)
        assert any(cell.get("outputs") for cell in notebook.cells)
    shown = "detection heatmap forgetting plane tsne training differences calibration risk_coverage blocks"
    for name in shown.split():
        assert (results / "figures" / "evaluate" / f"{name}.png").stat().st_size > 5_000


def test_a_second_repro_is_a_no_op_and_dvc_shows_the_metrics(repo: Path) -> None:
    again = run(repo, "dvc", "repro")
    assert ran(again.stdout) == []
    assert "up to date" in again.stdout
    shown = run(repo, "dvc", "metrics", "show", "--json")
    assert "balanced_acc_unseen" in shown.stdout


def test_a_forced_second_run_gives_the_same_bytes(repo: Path) -> None:
    before, lock = snapshot(repo / "results"), (repo / "dvc.lock").read_bytes()
    forced = run(repo, "dvc", "repro", "--force")
    assert forced.returncode == 0, forced.stderr
    assert set(STAGES_OF_A_RUN) <= set(ran(forced.stdout))
    after = snapshot(repo / "results")
    assert sorted(after) == sorted(before)
    assert [name for name in before if before[name] != after[name]] == []
    assert (repo / "dvc.lock").read_bytes() == lock


def test_only_results_and_lock_are_new_to_git(repo: Path) -> None:
    status = run(repo, "git", "status", "--porcelain").stdout.split("\n")
    assert {line[3:] for line in status if line} == {"dvc.lock", "results/"}


def test_saving_a_notebook_with_outputs_reruns_no_stage(repo: Path) -> None:
    path = repo / "notebooks" / "train.ipynb"
    notebook = nbformat.read(path, as_version=4)
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            cell.execution_count = number
            cell.outputs = [nbformat.v4.new_output("stream", text="saved by hand")]
    notebook.metadata["language_info"] = {"name": "python", "version": "3.11.99"}
    notebook.metadata["kernelspec"]["display_name"] = "Python 3 (ipykernel)"
    with put_back(repo, "notebooks/train.ipynb"):
        nbformat.write(notebook, path)
        saved = run(repo, "dvc", "repro")
        assert saved.returncode == 0
        assert not set(ran(saved.stdout)) & set(STAGES_OF_A_RUN)


def test_editing_a_notebooks_code_reruns_its_stage(repo: Path) -> None:
    path = repo / "notebooks" / "gradient_angles.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-3].source += "\nprint('edited')"
    with put_back(repo, "notebooks/gradient_angles.ipynb"):
        nbformat.write(notebook, path)
        assert run(repo, "dvc", "repro", "sources").returncode == 0
        assert stale(repo) == {"gradient_angles"}


def test_an_edit_reruns_the_stages_that_read_it_and_no_others(repo: Path) -> None:
    """The command line none; one method's numbers that method; a figure no training."""
    figure, params = "dgs/analysis/figures/forgetting.py", repo / "params.yaml"
    with put_back(repo, "dgs/cli.py", figure, "params.yaml"):
        edit(repo / "dgs/cli.py")
        assert ran(run(repo, "dvc", "repro").stdout) == ["sources"]
        before = params.read_text()
        content = yaml.safe_load(before)
        content["tuned"]["lora"] = {"train.surgery.lam": 0.7}
        params.write_text(yaml.safe_dump(content, sort_keys=False))
        assert stale(repo) == {"sources", "train@lora"}
        params.write_text(before)
        edit(repo / figure)
        assert run(repo, "dvc", "repro", "sources").returncode == 0
        assert stale(repo) == {"evaluate"}


def test_dvc_exp_run_with_a_changed_number_reruns_the_stages_that_read_it(repo: Path) -> None:
    with put_back(repo, "params.yaml"):
        tried = run(repo, "dvc", "exp", "run", "-S", "gradient_angles.pairs=[task-harmful]", "--name", "one-pair")
        assert tried.returncode == 0, tried.stderr
        assert set(ran(tried.stdout)) == {"sources", "gradient_angles"}
        angles = pd.read_csv(repo / "results" / "mini" / "gradient_angles.csv")
        assert set(angles["pair"]) == {"task-harmful"}
    assert "one-pair" in run(repo, "dvc", "exp", "show", "--csv").stdout


def test_dvc_exp_run_with_a_number_trains_every_method_with_it(repo: Path) -> None:
    """0.003 is what dgs is tuned to, and not lora."""
    with put_back(repo, "params.yaml"):
        tried = run(repo, "dvc", "exp", "run", "-S", "train.stage2.lr=0.003", "train")
        assert tried.returncode == 0, tried.stderr
        for method in ("lora", "dgs"):
            info = json.loads((repo / f"build/mini/train/{method}/seed-0/dgs.json").read_text())
            assert info["params"]["train"]["stage2"]["lr"] == 0.003


def test_dvc_exp_run_changes_no_value_that_was_not_set(tmp_path: Path) -> None:
    """It writes the file anew: quotes go, and numbers are spelled otherwise."""
    (tmp_path / "dvc.yaml").write_text("stages: {one: {cmd: echo, params: [n]}}\n")
    (tmp_path / "params.yaml").write_text(
        "n: 1\nword: \"yes\"\noff: 'off'\ntext: '1e-4'\nsmall: 1e-5\nlong: 1.0e-06\nnone: null\n"
    )
    commit = "git -c user.name=t -c user.email=t@example.org commit -qm start"
    for command in ("git init -q", "dvc init -q", "git add .", commit):
        assert run(tmp_path, *command.split()).returncode == 0
    before = read_yaml(tmp_path / "params.yaml")
    tried = run(tmp_path, "dvc", "exp", "run", "-S", "n=2")
    assert tried.returncode == 0, tried.stderr
    assert read_yaml(tmp_path / "params.yaml") == {**before, "n": 2}
    assert (before["word"], before["text"], before["small"]) == ("yes", "1e-4", 1e-5)


def test_conditions_add_rows_and_a_figure_and_take_nothing_away(repo: Path) -> None:
    path = repo / "params.yaml"
    source, results = path.read_text(), repo / "results" / "mini"
    before, table = (results / "metrics.json").read_bytes(), (results / "detection.csv").read_text()
    params = yaml.safe_load(source)
    params["evaluate"]["robustness"] |= {"conditions": ["jpeg:50", "noise:8", "png"], "methods": ["probe", "dgs"]}
    with put_back(repo, "params.yaml"):
        path.write_text(yaml.safe_dump(params, sort_keys=False))
        done = run(repo, "dvc", "repro")
        assert set(ran(done.stdout)) == {"sources", "evaluate", "gradient_angles"}, done.stderr
        assert (results / "metrics.json").read_bytes() == before, "headlines are of native images"
        assert set(table.splitlines()) <= set((results / "detection.csv").read_text().splitlines())
        detection = pd.read_csv(results / "detection.csv", dtype={"threshold_rule": str})
        changed = detection[detection["condition"] != "native"]
        assert set(changed["condition"]) == {"jpeg:50", "noise:8", "png"}
        assert set(changed["applied_to"]) == {"both", "fake", "real"} and set(changed["method"]) == {"probe", "dgs"}
        assert (results / "figures" / "evaluate" / "robustness.png").stat().st_size > 5_000
        text = (results / "REPORT.md").read_text()
        assert "## Robustness" in text and "(figures/evaluate/robustness.png)" in text
        path.write_text(source)
        assert run(repo, "dvc", "repro", "evaluate").returncode == 0
        assert not (results / "figures" / "evaluate" / "robustness.png").exists()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.stage2.lr=fast", "Parameter 'train.stage2.lr' in params.yaml: input should be a valid number"),
        ("+train.stage2.learning_rate=0.1", "Unknown parameter 'train.stage2.learning_rate' in params.yaml."),
        ("train.stage2.learning_rate=0.1", "learning_rate"),
        ("+sedes=[1]", "Unknown parameter 'sedes' in params.yaml."),
        ("data.root=nowhere", "dgs: Expected a folder of images at data.root = nowhere, found none."),
        ("data.rho=0.6", "Expected data.rho to be one of 0.50, 0.75, 0.90 with data.shortcut: background, found 0.6."),
    ],
)
def test_dvc_exp_run_refuses_wrong_parameters(repo: Path, override: str, sentence: str) -> None:
    before = (repo / "params.yaml").read_text()
    tried = run(repo, "dvc", "exp", "run", "--temp", "-S", override)
    assert tried.returncode != 0
    assert sentence in tried.stderr + tried.stdout
    assert set(ran(tried.stdout)) <= {"sources", "prepare"}
    assert "Traceback" not in tried.stderr.replace('Traceback (most recent call last):\n  File "<frozen', "")
    assert (repo / "params.yaml").read_text() == before


def test_make_stops_at_a_profile_that_does_not_exist(repo: Path) -> None:
    """And does not run the main pipeline instead."""
    before = snapshot(repo / "results")
    environment = {"CONDA_DEFAULT_ENV": "dgs", "CONDA_PREFIX": str(Path(sys.prefix))}
    tried = run(repo, "make", "repro", "PROFILE=tinny", **environment)
    assert tried.returncode != 0
    assert "dgs: Expected the profile 'tinny' at profiles/tinny.yaml, found none. Did you mean 'tiny'?" in tried.stderr
    assert "Running stage" not in tried.stdout and "up to date" not in tried.stdout
    assert snapshot(repo / "results") == before


def test_a_long_stage_shows_a_progress_bar(repo: Path) -> None:
    shown = run(repo, "dgs", "stage", "train", "--method", "lora").stderr
    assert "lora, all seeds" in shown and "%|" in shown


def test_a_failing_stage_leaves_nothing_half_written(repo: Path) -> None:
    path = repo / "notebooks" / "evaluate.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell("raise RuntimeError('after everything was written')"))
    with put_back(repo, "notebooks/evaluate.ipynb"):
        nbformat.write(notebook, path)
        failed = run(repo, "dvc", "repro", "evaluate")
        assert failed.returncode != 0
        assert f"notebooks/evaluate.ipynb, cell {len(notebook.cells)}: RuntimeError: after everything" in failed.stderr
        left = {p.name for p in (repo / "results" / "mini").iterdir()}
        assert not left & {"metrics.json", "detection.csv", "forgetting.csv", "REPORT.md", "training.csv"}
        assert not (repo / "build" / "mini" / "evaluate").exists()
        assert not list((repo / "build" / "mini").glob(".*"))


def test_a_profile_has_its_own_pipeline_and_leaves_the_main_one_alone(repo: Path, image_tree) -> None:  # type: ignore[no-untyped-def]
    """A user's folder, as docs/own-data.md says."""
    data = image_tree({"train": ("a",), "test": ("a", "b")}, real=12, fake=12)
    captions = repo.parent / "captions.jsonl"
    first, second, *_ = sorted(path.relative_to(data).as_posix() for path in (data / "train" / "a").rglob("*.*"))
    captions.write_text(json.dumps({"path": first, "caption": "a blue boat"}) + "\n")
    files = {"layout": "folders", "root": str(data), "rho": None, "captions": str(captions), "val_fraction": 0.3}
    overlay = {
        "seeds": [0],
        "methods": ["probe", "dgs"],
        "data": files,
        "model": {"clip": "sample/clip"},
        "patches": {"enabled": True, "size": 8},
        "evaluate": {"retrieval_pool": 4, "tsne_images": 6},
    }
    (repo / "profiles" / "own.yaml").write_text(yaml.safe_dump(overlay))
    lock = (repo / "dvc.lock").read_bytes()
    printed = run(repo, "dgs", "profile", "own")
    assert printed.stdout.strip() == "profiles/own/dvc.yaml", printed.stderr
    done = run(repo, "dvc", "repro", "profiles/own/dvc.yaml")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((repo / "results" / "own" / "metrics.json").read_text())
    assert metrics["profile"] == "own"
    assert {"balanced_acc_seen", "balanced_acc_unseen"} <= set(metrics["methods"]["dgs"])
    assert (repo / "dvc.lock").read_bytes() == lock
    assert ran(run(repo, "dvc", "repro").stdout) == []
    again = run(repo, "dvc", "repro", "profiles/own/dvc.yaml")
    assert ran(again.stdout) == []
    with captions.open("a") as file:
        file.write(json.dumps({"path": second, "caption": "a red boat"}) + "\n")
    changed = run(repo, "dvc", "repro", "profiles/own/dvc.yaml:train")
    assert changed.returncode == 0, changed.stderr
    assert set(ran(changed.stdout)) >= {"prepare", "train@dgs"}
    assert "evaluate" in stale(repo, "profiles/own/dvc.yaml")
    for label, name in enumerate(("0_real", "1_fake")):
        for number in range(12):
            target = data / "test" / "c" / name / f"{number}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            structured_image(9_000 + 100 * label + number).save(target)
    more = run(repo, "dvc", "repro", "profiles/own/dvc.yaml:evaluate")
    assert set(ran(more.stdout)) == {"prepare", "evaluate"}, "one more generator to test on trains nothing again"
    assert "c" in set(pd.read_csv(repo / "results" / "own" / "detection.csv")["generator"]), more.stderr
    assert stale(repo, "profiles/own/dvc.yaml") == {"gradient_angles"}


def test_settings_are_searched_and_generators_left_out_on_what_was_prepared(repo: Path) -> None:
    tuned = run(repo, "dgs", "tune", "probe", "--json", DGS_PROFILE="mini")
    assert tuned.returncode == 0, tuned.stderr
    (found,) = json.loads(tuned.stdout).values()
    assert set(found) == {"train.stage1.lr", "train.stage1.epochs"}
    left = run(repo, "dgs", "left-out", "probe", "--seed", "7", "--json")
    assert left.returncode == 0, left.stderr
    told = json.loads(left.stdout)
    table = pd.read_csv(repo / "results" / "mini" / "left_out.csv")
    assert told["method"] == "probe" and set(table["seed"]) == {7} and len(table) == 2
    assert told["balanced_acc"] == pytest.approx(table["balanced_acc"].mean(), abs=1e-6)
    for name in ("tuning", "left_out"):
        (repo / "results" / "mini" / f"{name}.csv").unlink()


@pytest.mark.parametrize("way", ["papermill", "cell"])
def test_a_number_given_to_a_notebook_holds_for_every_method(repo: Path, tmp_path: Path, way: str) -> None:
    """0.003 is what dgs is tuned to, and not lora; from another folder, so that nothing of the pipeline is touched."""
    before, notebook = snapshot(repo / "build"), repo / "notebooks" / "train.ipynb"
    given = ["-p", "method", "lora", "-y", "seeds: [3]"]
    if way == "papermill":
        given += ["-p", "lr", "3e-3"]
    else:
        source = notebook.read_text()
        notebook = tmp_path / "edited.ipynb"
        notebook.write_text(source.replace("lr = params.train.stage2.lr", "lr = 0.003"))
        assert notebook.read_text() != source
    done = run(
        tmp_path, "papermill", str(notebook), "out.ipynb", *given, "--cwd", str(repo), DGS_OUT=str(tmp_path / "mine"),
        PYTHONPATH=str(repo),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    info = json.loads((tmp_path / "mine/build/mini/train/lora/seed-3/dgs.json").read_text())
    assert info["params"]["train"]["stage2"]["lr"] == 0.003
    assert snapshot(repo / "build") == before, "a run by hand must not touch the pipeline's outputs"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-p", "learning_rate", "0.1"], "Unknown parameter 'learning_rate' for notebooks/train.ipynb."),
        (["-p", "lr", "fast"], "Parameter 'train.stage2.lr' in notebooks/train.ipynb: input should be a valid number"),
        (["-p", "method", "dsg"], "Unknown method 'dsg'. Did you mean 'dgs'?"),
    ],
)
def test_papermill_refuses_wrong_parameters(repo: Path, tmp_path: Path, arguments: list[str], sentence: str) -> None:
    notebook = str(repo / "notebooks" / "train.ipynb")
    done = run(tmp_path, "papermill", notebook, "out.ipynb", *arguments, PYTHONPATH=str(repo), DGS_OUT=str(tmp_path))
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith(f"UserError: {sentence}")
