"""One stage: a notebook through papermill, whole or not at all; and the pipeline a profile gets."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import ImageTree
from copies import ROOT, snapshot
from typer.testing import CliRunner

from dgs.cli import app
from dgs.errors import UserError
from dgs.params import load_params
from dgs.pipeline import normalise, run_stage
from dgs.profiles import check_file, write_profile_pipeline
from dgs.workspace import MAIN, read_yaml


@pytest.fixture
def notebook(repo: Path) -> Path:
    """The prepare notebook, which is committed without outputs, where its stage looks for it."""
    path = repo / "build/mini/sources/prepare/notebook.ipynb"
    path.parent.mkdir(parents=True)
    return shutil.copy(ROOT / "notebooks/prepare.ipynb", path)


def change(repo: Path, name: str, value: object, file: str = "params.yaml") -> None:
    """Give a parameter, by its full name, another value in a file."""
    path = repo / file
    params = yaml.safe_load(path.read_text())
    *groups, key = name.split(".")
    target = params
    for group in groups:
        target = target.setdefault(group, {})
    target[key] = value
    path.write_text(yaml.safe_dump(params))


def test_a_stage_leaves_its_outputs_and_an_executed_notebook_without_run_dependent_traces(
    repo: Path, notebook: Path
) -> None:
    """The first time with a parameter file of another name, which alone counts then."""
    main = (repo / "params.yaml").rename(repo / "mine.yaml")
    (repo / "params.yaml").write_text("sedes: 1\n")
    result = CliRunner().invoke(app, ["stage", "prepare", "--params", "mine.yaml", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"stage": "prepare", "label": "prepare", "results": "results/mini"}
    main.rename(repo / "params.yaml")
    made = sorted(path.name for path in (repo / "build/mini/prepare").iterdir())
    assert made == ["data.json", "prompts.json", "prompts.safetensors", "test", "training"]
    first = snapshot(repo / "results")
    assert {"mini/notebooks/prepare.ipynb", "mini/figures/prepare/images.png"} <= set(first)
    executed = json.loads(first["mini/notebooks/prepare.ipynb"])
    text = json.dumps(executed)
    assert "papermill" not in json.dumps(executed["metadata"]) and '"name": "stderr"' not in text
    assert str(repo) not in text, "an executed notebook must not carry this machine's paths"
    run_stage("prepare")
    assert snapshot(repo / "results") == first


def test_a_users_mistake_stops_a_stage_with_one_sentence_and_no_outputs(repo: Path, notebook: Path) -> None:
    change(repo, "data.rho", 0.6)
    before = set(snapshot(repo / "build"))
    with pytest.raises(UserError) as caught:
        run_stage("prepare")
    message = str(caught.value)
    assert "notebooks/prepare.ipynb, cell" in message and "\n" not in message
    assert "Expected data.rho to be one of 0.50, 0.75, 0.90 with data.shortcut: background, found 0.6." in message
    assert set(snapshot(repo / "build")) == before
    assert not (repo / "results").exists()


def test_a_failing_cell_has_the_number_it_has_in_the_notebook_that_people_open(repo: Path) -> None:
    """papermill puts a cell of parameters before it."""
    train = repo / "build/mini/sources/train/notebook.ipynb"
    train.parent.mkdir(parents=True)
    cells = [nbformat.v4.new_code_cell("method = 'lora'", metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(source) for source in ("print(method)", "raise RuntimeError(method)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), train)
    with pytest.raises(UserError, match=r"notebooks/train\.ipynb, cell 3: RuntimeError: probe"):
        run_stage("train", "probe")
    cells[0].source = "raise RuntimeError('before any parameter')"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), train)
    with pytest.raises(UserError, match=r"notebooks/train\.ipynb, cell 1: RuntimeError: before"):
        run_stage("train", "probe")


OWN = "profiles/own.yaml"
CHECKPOINTS, CHANGED = "evaluate.checkpoints.", "evaluate.robustness."
OF_METHODS = f"Expected {CHANGED}methods to be of methods: probe, lora, dgs;"


@pytest.fixture
def own(repo: Path, image_tree: ImageTree) -> Path:
    """An overlay for a folder of images with captions of its own."""
    captions = repo / "captions.jsonl"
    captions.write_text("")
    data = {"layout": "folders", "root": str(image_tree()), "rho": None, "captions": str(captions)}
    path = repo / OWN
    path.write_text(yaml.safe_dump({"data": data, "model": {"clip": "sample/clip"}}))
    return path


class TestTheCheckBeforeAnyStage:
    """DVC looks only at the groups that a stage names: the check reads the whole file."""

    def test_inputs_that_the_main_pipeline_does_not_watch_are_named(self, repo: Path) -> None:
        captions = repo / "captions.jsonl"
        captions.write_text("")
        change(repo, "data.captions", str(captions))
        warned: list[str] = []
        check_file(None, warned.append)
        assert len(warned) == 1 and str(captions) in warned[0] and "dvc repro --force" in warned[0]

    def test_what_a_network_of_its_own_does_not_look_at_is_said(self, repo: Path) -> None:
        for name, value in {"methods": ["pixel_cnn"], "train.accumulate": 2, "model.precision": "bf16"}.items():
            change(repo, name, value)
        result = CliRunner().invoke(app, ["check"])
        (note,) = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
        assert note.endswith("in fp32, whatever is given (train.accumulate: 2, model.precision: bf16).")
        change(repo, "methods", ["probe"])
        assert "note: " not in CliRunner().invoke(app, ["check"]).stderr

    def test_what_is_assumed_of_a_clip_is_said(self, repo: Path) -> None:
        shutil.copytree(repo / "sample/clip", repo / "mine")
        (repo / "mine/open_clip_config.json").write_text('{"model_cfg": {"vision_cfg": {"image_size": 64}}}')
        change(repo, "model.clip", "mine")
        result = CliRunner().invoke(app, ["check"])
        assert result.exit_code == 0 and result.stderr.count("note: ") == 2
        assert "has no preprocess_cfg.mean; open_clip's own is assumed, [0.48145466," in result.stderr

    @pytest.mark.parametrize(
        ("given", "sentence"),
        [
            ({"sedes.x": 1}, "Unknown parameter 'sedes' in params.yaml. Did you mean 'seeds'?"),
            ({"methods": ["probe", "dsg"]}, "Unknown method 'dsg'. Did you mean 'dgs'?"),
            (
                {"methods": ["pcgrad"], "train.accumulate": 2},
                "Expected train.accumulate and train.processes to be 1 for p",
            ),
            (
                {"methods": ["prograd"], "train.processes": 2},
                "Expected train.accumulate and train.processes to be 1 for p",
            ),
            (
                {"methods": ["upgrad"]},
                "Expected a method of the registry, found upgrad, which has ended: of two gradients exact UPGrad is",
            ),
            (
                {
                    "methods": ["probe"],
                    "model.text": "none",
                    "model.clip": "RN50-quickgelu",
                    "model.pretrained": "openai",
                },
                "Expected a CLIP whose image side is a vision transformer (such as ViT-L-14-quickgelu), found Modified",
            ),
            ({"data.root": "nowhere"}, "Expected a folder of images at data.root = nowhere, found none."),
            ({"data.root": "build/mini/a"}, "Expected data.root = build/mini/a to lie outside build/mini,"),
            ({"data.root": "build/mini"}, "Expected data.root = build/mini to lie outside build/mini,"),
            ({"data.root": "build/mini/pictures"}, "Expected a folder of images at data.root = build/mini/pictures,"),
            ({"data.root": "scratch/a"}, "Expected data.root = scratch/a to lie outside scratch/, which DVC does not"),
            ({"data.captions": "no.jsonl"}, "Expected a caption file at data.captions = no.jsonl, found none."),
            ({"model.clip": "sample/clipp"}, "Expected model.clip to be a folder or an open_clip name, found"),
            ({"model.clip": "ViT-B-32", "model.pretrained": "w/w.pt"}, "Expected a weights file at model.pretrained ="),
            ({"model.clip": "sample/clip", "model.pretrained": "openai"}, "model.clip = sample/clip is a folder and"),
            (
                {"model.clip": "timm/vit_base_patch16_dinov3", "model.pretrained": "hub"},
                "Expected model.clip = timm/vit_base_patch16_dinov3 to have a text side, found an image tower alone.",
            ),
            (
                {"model.clip": "ViT-B-16", "model.pretrained": "dfn2b"},
                "The weights 'dfn2b' were trained with QuickGELU;",
            ),
            (
                {CHECKPOINTS + "my": "no"},
                f"Expected a checkpoint folder (with dgs.json) at {CHECKPOINTS}my = no, found",
            ),
            ({CHECKPOINTS + "dgs": "x"}, "Expected names in evaluate.checkpoints that no method has, found dgs."),
            (
                {CHECKPOINTS + "my": "build/mini/x"},
                f"Expected {CHECKPOINTS}my = build/mini/x to lie outside build/mini,",
            ),
            ({CHANGED + "methods": ["loar"]}, f"{OF_METHODS} found loar. Did you mean 'lora'?"),
            ({CHANGED + "methods": ["probe", "leace"]}, f"{OF_METHODS} found leace. Add it to methods,"),
            ({CHANGED + "methods": ["release"]}, f"{OF_METHODS} found release. Add it"),
            ({CHANGED + "seeds": [7]}, f"Expected {CHANGED}seeds to be of seeds: 0; found 7."),
        ],
    )
    def test_a_wrong_one_is_a_sentence(self, repo: Path, given: dict[str, object], sentence: str) -> None:
        for name, value in given.items():
            change(repo, name, value)
        for command in (["check"], ["stage", "sources"]):  # the pipeline's first stage makes it
            result = CliRunner().invoke(app, command)
            assert (result.exit_code, result.stdout) == (2, "")
            assert result.stderr.startswith(f"dgs: {sentence}") and result.stderr.count("\n") == 1

    def test_names_that_are_no_utf8_are_refused_before_anything_runs(self, repo: Path, image_tree: ImageTree) -> None:
        (root := image_tree()).joinpath("train/alpha/0_real/\udcc9\udcfa.txt").write_text("")
        change(repo, "data.root", str(root))
        result = CliRunner().invoke(app, ["check"])
        assert result.exit_code == 2 and "first train/alpha/0_real/\\xc9\\xfa.txt: neither DVC" in result.stderr

    def test_captions_in_the_folder_of_images_are_watched_with_it(self, repo: Path, image_tree: ImageTree) -> None:
        (root := image_tree()).joinpath("captions.jsonl").write_text("")
        change(repo, "data.root", str(root))
        change(repo, "data.captions", str(root / "captions.jsonl"))
        warned: list[str] = []
        check_file(None, warned.append)
        assert not any("captions.jsonl" in line for line in warned)

    def test_data_that_the_pipeline_makes_itself_need_not_be_there_yet(self, repo: Path) -> None:
        change(repo, "data.root", "data")
        assert not (repo / "data").exists()
        check_file(None, print)


class TestAProfilesInputs:
    def test_each_is_a_dependency_of_the_stages_that_read_it(self, repo: Path, own: Path) -> None:
        """Of CLIP's weights prepare notes the hash; of data/clip DVC makes data/ first."""
        (repo / "imported").mkdir()
        (repo / "imported/dgs.json").touch()
        change(repo, "evaluate.checkpoints.release", "imported", OWN)
        change(repo, "evaluate.robustness.methods", ["release"], OWN)
        for clip in ("sample/clip", "data/clip"):
            change(repo, "model.clip", clip, OWN)
            stages = yaml.safe_load(write_profile_pipeline("own", repo).read_text())["stages"]
            inputs = {
                str(repo / "captions.jsonl"): ["prepare"],
                clip: ["prepare", "evaluate"],
                "imported": ["evaluate"],
            }
            for path, readers in inputs.items():
                assert [name for name, body in stages.items() if path in body["deps"]] == readers

    def test_a_home_folder_is_written_out(self, repo: Path, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root = Path(yaml.safe_load(own.read_text())["data"]["root"])
        monkeypatch.setenv("HOME", str(root.parent))
        change(repo, "data.root", f"~/{root.name}", OWN)
        write_profile_pipeline("own", repo)
        assert yaml.safe_load((repo / "profiles/own/params.yaml").read_text())["data"]["root"] == str(root)

    def test_a_folder_that_is_not_there_stops_before_a_pipeline_is_written(self, repo: Path, own: Path) -> None:
        change(repo, "data.root", "/path/to/images", OWN)
        with pytest.raises(UserError, match=r"Expected a folder of images at data\.root = /path/to/images, found none"):
            write_profile_pipeline("own", repo)
        assert not (repo / "profiles/own").exists()


def test_leftovers_of_a_killed_run_are_cleared_and_a_missing_notebook_is_told_how_to_make(repo: Path) -> None:
    for name in (".prepare-abc", ".train-lora-abc"):
        (repo / "build/mini" / name).mkdir(parents=True)
    with pytest.raises(UserError, match="Run the stage by dvc repro prepare"):
        run_stage("prepare")
    assert [path.name for path in (repo / "build/mini").glob(".*")] == [".train-lora-abc"]


def test_a_profiles_pipeline_is_the_main_one_with_its_own_parameters(repo: Path) -> None:
    (repo / "aigibench").mkdir()
    path = write_profile_pipeline("paper", repo)
    assert path == repo / "profiles/paper/dvc.yaml"
    own, main = yaml.safe_load(path.read_text()), yaml.safe_load((repo / "dvc.yaml").read_text())
    assert list(own["stages"]) == list(main["stages"])
    for name, body in own["stages"].items():
        assert body["wdir"] == "../.."
        deps = main["stages"][name]["deps"]
        assert body["deps"] == ["profiles/paper/params.yaml" if dep == "params.yaml" else dep for dep in deps]
        if "params" in main["stages"][name]:
            assert body["params"] == [{"profiles/paper/params.yaml": main["stages"][name]["params"]}]
            assert "dgs stage --params profiles/paper/params.yaml" in body["cmd"]
    content = read_yaml(repo / "profiles/paper/params.yaml")
    assert content == load_params("paper", repo).model_dump() and content["model"]["clip"] == "ViT-L-14-quickgelu"


def test_the_main_profile_is_the_main_pipeline(repo: Path) -> None:
    assert write_profile_pipeline(load_params(root=repo).profile, repo) == repo / "dvc.yaml"
    assert load_params(root=repo).profile == MAIN


def test_normalising_keeps_results_and_drops_progress_and_widgets() -> None:
    cell = nbformat.v4.new_code_cell("x", execution_count=7)
    cell.metadata.update({"tags": ["parameters", "other"], "execution": {"iopub.status.busy": "now"}})
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "random"}}
    cell.outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="50%"),
        nbformat.v4.new_output("stream", name="stdout", text="res"),
        nbformat.v4.new_output("stream", name="stderr", text="100%"),
        nbformat.v4.new_output("stream", name="stdout", text="ult"),
        nbformat.v4.new_output("display_data", data=widget),
    ]
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"widgets": {}, "papermill": {"duration": 3}})
    clean = normalise(notebook)
    assert [(output["name"], output["text"]) for output in clean.cells[0].outputs] == [("stdout", "result")]
    assert clean.cells[0].metadata == {"tags": ["parameters"]}
    assert set(clean.metadata) == {"kernelspec", "language_info"}
    nbformat.validate(clean)


def test_links_of_an_executed_notebook_lead_where_those_of_its_source_do() -> None:
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        source = nbformat.read(path, as_version=4)
        before = [link for cell in source.cells for link in re.findall(r"\]\(([^)]+)\)", cell.source)]
        clean = normalise(nbformat.read(path, as_version=4))
        after = [link for cell in clean.cells for link in re.findall(r"\]\(([^)]+)\)", cell.source)]
        assert len(before) == len(after) >= 1
        for one, other in zip(before, after, strict=True):
            if one.startswith(("https:", "#")):
                assert other == one
            else:
                target = (ROOT / "notebooks" / one).resolve()
                assert target.exists() and (ROOT / "results/mini/notebooks" / other).resolve() == target
