"""What a parameter may be, and the three ways to set one: a file, the environment, a notebook's cell."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from copies import copy_repository, run
from settings import BASE, validate

from dgs.errors import UserError
from dgs.params import TUNABLE, Params, dotted, leaves, load_params, merged, merged_params
from dgs.params import validate as real_validate
from dgs.pipeline import NOTEBOOK_PARAMETERS, with_overrides
from dgs.workspace import read_yaml_text, yaml_text

ROOT = Path(__file__).resolve().parent.parent
PROFILES = sorted(path.stem for path in (ROOT / "profiles").glob("*.yaml"))
NOTEBOOKS = sorted(NOTEBOOK_PARAMETERS)
NOT_FINITE = [float("nan"), float("inf"), ".inf"]


def nested(name: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for "a.b"."""
    for key in reversed(name.split(".")):
        value = {key: value}
    return value


def at(params: Params, name: str) -> Any:
    return reduce(getattr, name.split("."), params)


def refusal(call: Callable[..., Any], *arguments: Any) -> str:
    """The one sentence by which `call` refuses its arguments."""
    with pytest.raises(UserError) as error:
        call(*arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


def refused(name: str, value: Any) -> str:
    return refusal(validate, nested(name, value), "some.yaml")


def repository(folder: Path, own: dict[str, Any] | None = None, /, **profiles: str) -> Path:
    """A folder with the small parameters and `own` ones as params.yaml, and profiles."""
    (folder / "profiles").mkdir(parents=True)
    (folder / "dvc.yaml").write_text("stages: {}\n")
    (folder / "params.yaml").write_text(yaml_text(merged(BASE, own or {})))
    for name, text in profiles.items():
        (folder / "profiles" / f"{name}.yaml").write_text(text)
    return folder


class TestFiles:
    def test_params_yaml_names_every_parameter_and_nothing_else_has_numbers(self) -> None:
        content = merged_params(root=ROOT)
        named = set(dotted({name: group for name, group in content.items() if name != "tuned"}))
        assert named | {"tuned", "evaluate.checkpoints", "evaluate.detectors"} == set(leaves(Params))
        content["train"].pop("batch_size")
        with pytest.raises(UserError, match=r"Expected the parameter 'train\.batch_size' in params\.yaml, found none"):
            real_validate(content)

    @pytest.mark.parametrize("profile", ["mini", *PROFILES])
    def test_every_profile_loads_under_its_own_name(self, profile: str) -> None:
        assert load_params(profile, ROOT).profile == profile
        assert (load_params(profile, ROOT) == load_params(root=ROOT)) == (profile == "mini")

    def test_the_canvas_of_patches_is_what_the_model_sees_else_its_own_size_counts(self) -> None:
        params = load_params("paper", ROOT)
        assert params.patches.enabled and params.image_size == 224, "seven by seven patches of 32 px"
        params = validate({"model": {"image_size": 64}, "patches": {"enabled": False, "size": 32, "count": 49}})
        assert params.image_size == 64

    def test_an_overlay_changes_only_what_it_names_at_any_depth(self, tmp_path: Path) -> None:
        root = repository(tmp_path / "r", own="seeds: [5]\ntrain:\n  stage2: {lr: 0.5}\n")
        params = load_params("own", root)
        assert (params.profile, params.seeds) == ("own", [5])
        assert params == validate({}).replaced({"profile": "own", "seeds": [5], "train.stage2.lr": 0.5})
        assert load_params(root=root) == validate({}), "the main profile is left alone"

    def test_an_overlay_may_lie_over_another_and_its_values_stand_above(self, tmp_path: Path) -> None:
        root = repository(tmp_path / "r", own="over: base\nseeds: [5]\n", base="seeds: [6]\ntrain: {batch_size: 8}\n")
        own, base = load_params("own", root), load_params("base", root)
        assert (own.profile, own.seeds, own.train.batch_size) == ("own", [5], 8)
        assert (base.profile, base.seeds, base.train.batch_size) == ("base", [6], 8)

    @pytest.mark.parametrize("below", ["own", "base", "absent"])
    def test_an_overlay_lies_over_one_other_at_most(self, tmp_path: Path, below: str) -> None:
        root = repository(tmp_path / "r", own=f"over: {below}\n", base="over: own\n")
        assert f"profiles/{'absent' if below == 'absent' else 'own'}.yaml" in refusal(load_params, "own", root)

    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("train.stage2.lr.x", 1.0, "'train.stage2.lr.x' cannot differ between methods. Did"),
            ("train.surgery.lamm", 1, "Did you mean 'train.surgery.lam'? Expected one of"),
            ("train.batch_size", 8, "'train.batch_size' cannot differ between methods."),
            ("train.stage2.lr", "fast", "'train.stage2.lr': input should be a valid number"),
            ("train.stage2.lr", -1, "'train.stage2.lr': input should be greater than 0"),
            ("train.stage2.lr", None, "'train.stage2.lr' should be a number"),
        ],
    )
    def test_a_number_of_a_method_that_is_none_is_one_sentence(self, name: str, value: Any, expected: str) -> None:
        message = refusal(validate, {"tuned": {"lora": {name: value}}})
        assert expected in message and ("input" not in expected or message.endswith(f"; found {value!r}."))

    def test_the_paper_profile_trains_the_papers_methods_as_the_paper_does(self) -> None:
        params = load_params("paper", ROOT)
        for name in ("probe", "lora", "dgs"):
            train = params.for_method(name).train
            assert (train.stage1.lr, train.stage2.lr, train.stage1.epochs, train.stage2.epochs) == (1e-4, 1e-4, 3, 1)
            assert train.surgery.lam == 0.2

    def test_a_mistake_in_an_overlay_names_that_overlay(self, tmp_path: Path) -> None:
        message = refusal(load_params, "own", repository(tmp_path / "r", own="train: {batchsize: 2}\n"))
        assert "profiles/own.yaml" in message and "'train.batchsize'" in message and "'batch_size'" in message

    @pytest.mark.parametrize(
        ("base", "overlay", "expected"),
        [
            (
                {},
                "tuned: 5",
                "'tuned' in params.yaml + profiles/own.yaml: input should be a valid dictionary; found 5.",
            ),
            ({}, "tuned: [1]", "'tuned' in params.yaml + profiles/own.yaml: input should be a valid"),
            ({}, "tuned: {default: 5}", "'tuned.default' in params.yaml + profiles/own.yaml: input should be a valid"),
            ({"lora": None}, "tuned: {default: {train.stage2.lr: 1}}", "'tuned.lora' in params.yaml + profiles/own"),
            ({"lora": 5}, "tuned: {default: {train.stage2.lr: 1}}", "'tuned.lora' in params.yaml + profiles/own"),
            ([1], "seeds: [1]", "'tuned' in params.yaml + profiles/own.yaml: input should be a valid"),
        ],
    )
    def test_tuned_that_is_no_group_is_one_sentence(
        self, tmp_path: Path, base: Any, overlay: str, expected: str
    ) -> None:
        assert expected in refusal(load_params, "own", repository(tmp_path / "r", {"tuned": base}, own=overlay))

    def test_an_unknown_profile_lists_the_known_ones(self) -> None:
        message = refusal(load_params, "papr", ROOT)
        assert "profiles/papr.yaml" in message and "Did you mean 'paper'?" in message
        assert all(name in message for name in ("mini", *PROFILES))

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"seeds: [0, 1\nmethods: [", "mine.yaml is not valid YAML"),
            (b"seeds: [!!int abc]", "is not valid YAML: invalid literal for int() with base 10: 'abc'. Mend"),
            (b"seeds: [!!bool abc]", "is not valid YAML: 'abc'. Mend"),
            (b"seeds: 2024-13-45", "is not valid YAML: month must be in 1..12. Mend"),
            (b"seeds: " + b"[" * 5000, "is not valid YAML: maximum recursion depth exceeded"),
            (b"- a\n- b\n", "mine.yaml to hold groups of parameters (key: value), found list"),
            (b"", "mine.yaml to hold groups of parameters (key: value), found NoneType"),
            (b"methods: [probe]  # caf\xe9", "mine.yaml to be text in UTF-8, found other bytes. Save it as UTF-8."),
            ("a folder", "mine.yaml (Is a directory). Name a parameter file."),
            (None, "mine.yaml, found none."),
        ],
    )
    def test_a_parameter_file_that_is_none_is_one_sentence(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | str | None, expected: str
    ) -> None:
        file = tmp_path / "mine.yaml"
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif content:
            file.mkdir()
        monkeypatch.setenv("DGS_PARAMS", str(file))
        message = refusal(load_params)
        assert expected in message and str(file) in message

    @pytest.mark.parametrize(
        "spelling",
        ["0.0001", "1e-4", "1.0e-4", "1E-04", "'1e-4'", "1e-04", ".0001", "+1e-4", "0.000_1", '"+.0001"', "1.e-4"],
    )
    def test_a_number_is_a_number_however_it_is_spelled(self, tmp_path: Path, spelling: str) -> None:
        own = f"train:\n  stage2: {{lr: {spelling}}}\ntuned:\n  lora: {{train.stage1.lr: {spelling}}}\n"
        params = load_params("own", repository(tmp_path / "r", {"train": {"stage1": {"lr": None}}}, own=own))
        assert (params.train.stage2.lr, params.tuned["lora"]["train.stage1.lr"]) == (1e-4, 1e-4)
        assert params.for_method("lora").train.stage1.lr == 1e-4

    @pytest.mark.parametrize("spelling", ["16", "1_6", "0x10", "0o20", "0b10000", "16.", "1.6e1", "'16'", "+16", "016"])
    def test_a_count_too(self, tmp_path: Path, spelling: str) -> None:
        own = f"train: {{batch_size: {spelling}}}\ntuned: {{lora: {{train.stage1.epochs: {spelling}}}}}\n"
        params = load_params("own", repository(tmp_path / "r", {"train": {"stage1": {"epochs": None}}}, own=own))
        assert (params.train.batch_size, params.for_method("lora").train.stage1.epochs) == (16, 16)

    @pytest.mark.parametrize("name", [name for name, value in dotted(BASE).items() if type(value) in (int, float)])
    def test_no_switch_is_a_number(self, name: str) -> None:
        assert f"'{name}'" in refused(name, True)

    @pytest.mark.parametrize(
        "spelling", ["yes", "1:30", "2024-01-01", ".inf", "1e400", "'0x10'", "'1,5'", "true", "[1]"]
    )
    def test_what_is_no_number_is_refused_wherever_it_stands(self, tmp_path: Path, spelling: str) -> None:
        own = {"train": {"stage1": {"lr": None}}}
        for text in (f"train: {{stage1: {{lr: {spelling}}}}}", f"tuned: {{default: {{train.stage1.lr: {spelling}}}}}"):
            root = repository(tmp_path / text.partition(":")[0], own, own=text)
            assert "train.stage1.lr'" in refusal(lambda root: load_params("own", root).for_method("lora"), root)

    @pytest.mark.parametrize(
        "text", ["train: {stage2: {lr: 1,5}}", "train: {stage2: {lr: 0,0001}}", "model: {lora: {alpha: 6,5}}", "5: 1"]
    )
    def test_a_decimal_comma_is_named(self, tmp_path: Path, text: str) -> None:
        """Between braces YAML reads 1,5 as 1, and 5 as another name."""
        message = refusal(load_params, "own", repository(tmp_path / "r", own=text))
        assert "Expected names of parameters" in message and message.endswith("a decimal comma, write a point.")

    def test_words_stay_words_when_dvc_takes_their_quotes(self, tmp_path: Path) -> None:
        own = "data: {layout: folders, rho: null, root: yes, captions: on}\n"
        params = load_params("own", repository(tmp_path / "r", own=own))
        assert (params.data.root, params.data.captions) == ("yes", "on")
        assert read_yaml_text(yaml_text(params.model_dump())) == params.model_dump()

    @pytest.mark.parametrize("name", ["1e3", "17", "0x10", "0o7", "0b1", "1_0", "2024-01-01", "null", "true", "false"])
    def test_a_profile_whose_name_yaml_reads_as_something_else_is_refused(self, tmp_path: Path, name: str) -> None:
        """DVC would put its outputs into build/1000.0, the stages theirs into build/1e3."""
        root = repository(tmp_path / "r", **{name: "seeds: [1]\n"})
        with pytest.raises(UserError, match="a name that YAML does not read as something else, such as a number"):
            load_params(name, root)


@pytest.mark.slow
def test_what_dvc_rewrites_when_it_sets_a_number_is_read_as_before(tmp_path: Path) -> None:
    """It writes the whole file anew: quotes go, numbers get other spellings."""
    copy = copy_repository(tmp_path / "r")
    odd = {
        "train": {"surgery": {"eps": 0.111, "decay": 0.222, "mix": 0.333}, "log_gradients": "LOG", "log_every": 444},
        "compute": {"device": "DEVICE"},
        "tuned": {"lora": {"train.stage2.lr": 0.555}, "dgs": {"train.stage2.lr": 0.666}},
    }
    text = yaml_text(merged(read_yaml_text((copy / "params.yaml").read_text()), odd))
    spelled = {
        **{"0.111": "1e-5", "0.222": "'1e-2'", "0.333": "+.5", "444": "0x10", "0.555": '"2e-3"', "0.666": "1_0e-4"},
        **{"LOG": "'yes'", "DEVICE": '"on"'},
    }
    for marked, spelling in spelled.items():
        assert text.count(marked) == 1
        text = text.replace(marked, spelling)
    (copy / "params.yaml").write_text(text)
    before = load_params(root=copy)
    assert before.for_method("lora").train.stage2.lr == 2e-3 and before.compute.device == "on"
    run(copy, "git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "--quiet", "-am", "odd spellings")
    done = run(copy, "dvc", "exp", "run", "-S", "train.surgery.lam=1e-1", "sources")
    assert done.returncode == 0, done.stderr + done.stdout
    assert (copy / "params.yaml").read_text() != text.replace("lam: null", "lam: 0.1"), "else nothing is tried here"
    assert load_params(root=copy) == before.replaced({"train.surgery.lam": 0.1})


class TestNull:
    """null is the method's own; a number, wherever it stands, holds for every method."""

    TUNED: ClassVar[dict[str, Any]] = {
        "default": {"train.stage2.lr": 0.01, "train.surgery.lam": 0.2},
        "lora": {"train.stage2.lr": 0.02},
        "dgs": {"train.stage2.lr": 0.03, "train.surgery.lam": 1.0},
    }
    MAIN: ClassVar[dict[str, Any]] = {"train": {"stage2": {"lr": None}, "surgery": {"lam": None}}, "tuned": TUNED}

    def numbers(self, params: Params) -> dict[str, tuple[float, float]]:
        own = {name: params.for_method(name).train for name in ("probe", "lora", "dgs")}
        return {name: (train.stage2.lr, train.surgery.lam) for name, train in own.items()}

    def test_the_methods_own_value_else_the_defaults(self) -> None:
        assert self.numbers(validate(self.MAIN)) == {"probe": (0.01, 0.2), "lora": (0.02, 0.2), "dgs": (0.03, 1.0)}

    @pytest.mark.parametrize("lr", [0.01, 0.02, 0.5])
    def test_a_number_holds_for_every_method_also_where_it_equals_another(self, tmp_path: Path, lr: float) -> None:
        expected = {"probe": (lr, 0.2), "lora": (lr, 0.2), "dgs": (lr, 1.0)}
        assert self.numbers(validate(merged(self.MAIN, {"train": {"stage2": {"lr": lr}}}))) == expected
        root = repository(tmp_path / "r", self.MAIN, own=f"train: {{stage2: {{lr: {lr}}}}}\n")
        assert self.numbers(load_params("own", root)) == expected
        for method, (_, lam) in expected.items():
            train = with_overrides("train", validate(self.MAIN), {"method": method, "lr": lr}).train
            assert (train.stage2.lr, train.surgery.lam) == (lr, lam)

    def test_an_overlay_has_numbers_of_methods_too_and_its_default_stands_above_those_of_other_data(
        self, tmp_path: Path
    ) -> None:
        one = "tuned:\n  lora: {train.stage2.lr: 0.7}\n"
        two = "tuned:\n  default: {train.stage2.lr: 0.5}\n  lora: {train.stage2.lr: 0.7}\n"
        root = repository(tmp_path / "r", self.MAIN, one=one, two=two)
        assert self.numbers(load_params("one", root)) == {"probe": (0.01, 0.2), "lora": (0.7, 0.2), "dgs": (0.03, 1.0)}
        assert self.numbers(load_params("two", root)) == {"probe": (0.5, 0.2), "lora": (0.7, 0.2), "dgs": (0.5, 1.0)}

    def test_what_has_no_value_anywhere_is_one_sentence(self) -> None:
        content = merged(self.MAIN, {"tuned": {"default": {}}})
        content["tuned"]["default"] = {"train.surgery.lam": 0.2}
        message = refusal(validate(content).for_method, "probe")
        assert message.startswith("Expected a number for train.stage2.lr: it is null, and neither tuned.probe")

    def test_what_a_method_trains_with_is_numbers_and_changes_no_more(self) -> None:
        own = validate(self.MAIN).for_method("dgs")
        assert own.for_method("dgs") == own == own.for_method("lora") and own.tuned == {}

    def test_params_yaml_has_a_default_for_every_null(self) -> None:
        params = load_params(root=ROOT)
        null = {name for name in TUNABLE if at(params, name) is None}
        assert null == set(params.tuned["default"])


class TestEnvironment:
    @pytest.mark.parametrize(("value", "profile"), [("tiny", "tiny"), ("", "mini")])
    def test_dgs_profile_names_the_overlay_if_it_is_not_empty(
        self, monkeypatch: pytest.MonkeyPatch, value: str, profile: str
    ) -> None:
        monkeypatch.setenv("DGS_PROFILE", value)
        assert load_params(root=ROOT) == load_params(profile, ROOT)

    def test_dgs_params_is_taken_as_it_is_whatever_the_profile(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "stage.yaml"
        file.write_text(yaml_text(merged(BASE, {"profile": "given", "seeds": [7]})))
        monkeypatch.setenv("DGS_PARAMS", str(file))
        monkeypatch.setenv("DGS_PROFILE", "tiny")
        params = load_params(root=ROOT)
        assert (params.profile, params.seeds) == ("given", [7])
        assert load_params("tiny", ROOT).profile == "tiny"


class TestValidation:
    @pytest.mark.parametrize(
        ("dotted", "meant"),
        [
            ("sedes", "seeds"),
            ("train.batchsize", "batch_size"),
            ("train.stage2.epoch", "epochs"),
            ("model.lora.rnak", "rank"),
        ],
    )
    def test_an_unknown_key_is_named_with_the_nearest_known_one(self, dotted: str, meant: str) -> None:
        message = refused(dotted, 1)
        assert f"'{dotted}'" in message and "some.yaml" in message
        assert f"Did you mean '{meant}'?" in message

    def test_an_unlike_key_gets_no_guess_but_the_known_ones(self) -> None:
        message = refused("train.stage1.zzz", 1)
        assert "Did you mean" not in message
        assert "epochs" in message and "lr" in message

    @pytest.mark.parametrize(
        ("dotted", "values"),
        [
            ("profile", ["Bad Name", "../up"]),
            ("seeds", ["0,1", ["x"], [], [-1]]),  # a seed of numpy's generators is not negative
            ("methods", ["dgs", []]),
            ("data.layout", ["folder"]),
            ("data.val_fraction", [1.5]),
            ("data.limit", [0]),
            ("patches.enabled", ["perhaps"]),
            ("patches.size", [1]),
            ("patches.count", [0, 48]),  # not square
            ("model.clip", [3]),
            ("model.lora.rank", [0, True]),
            ("model.lora.alpha", NOT_FINITE),
            ("model.lora.dropout", [1.0]),
            ("compute.threads", [0]),
            ("compute.workers", [-1]),
            ("train", [3]),
            ("train.batch_size", ["many", 2.5, None, True, 0]),
            ("train.stage1.lr", [0]),
            ("train.stage2.lr", ["fast", True, -1e-3, *NOT_FINITE]),
            ("train.surgery.lam", [-0.1, *NOT_FINITE]),
            ("train.surgery.order", ["relaese"]),
            ("train.surgery.text_head", ["fited"]),
            ("train.log_every", [0]),
            ("data.rho", [True, -0.1, 1.5]),
            ("evaluate.retrieval_pool", [1]),
            ("evaluate.robustness.conditions", [[75], ["jpeg:750"]]),
            ("evaluate.robustness.seeds", [[-1]]),
            ("gradient_angles.pairs", [["task-evil"]]),
        ],
    )
    def test_a_value_of_another_type_or_out_of_range_is_named_and_shown(self, dotted: str, values: list[Any]) -> None:
        for value in values:
            message = refused(dotted, value)
            assert f"'{dotted}" in message and "some.yaml" in message
            assert repr(value[0] if isinstance(value, list) and value else value) in message

    def test_patches_fill_a_square(self) -> None:
        assert "input should be a square number: patches fill a square canvas; found 48." in refused(
            "patches.count", 48
        )

    @pytest.mark.parametrize(("name", "value"), [("seeds", [0, 1, 0]), ("methods", ["lora", "lora"])])
    def test_what_is_listed_twice_would_run_twice_into_the_same_place(self, name: str, value: Any) -> None:
        assert f"list {value[0]} once only" in refused(name, value)

    def test_a_misspelled_condition_is_told_what_is_meant_and_one_written_twice_is_seen(self) -> None:
        name = "evaluate.robustness.conditions"
        assert refused(name, ["jpeg:75", "blurr:1"]) == (
            f"Parameter '{name}.1' in some.yaml: value error, unknown condition. Did you mean 'blur'? Expected such as "
            "jpeg:75, blur:1, resize:0.5, noise:4, crop:0.9, png; found 'blurr:1'."
        )
        assert "list blur:1 once only" in refused(name, ["blur:1", "blur:1.0"])

    def test_a_home_folder_is_written_out_and_other_names_stay(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/me")
        params = validate({"data": {"root": "~/images", "captions": "c.jsonl"}, "model": {"clip": "~/clip"}})
        assert (params.data.root, params.data.captions) == ("/home/me/images", "c.jsonl")
        assert params.model.clip == "/home/me/clip"

    def test_parameters_cannot_change_under_a_run(self) -> None:
        params = validate({})
        with pytest.raises(Exception, match="frozen"):
            params.train.batch_size = 3  # type: ignore[misc]


def parameter_cell(notebook: str) -> dict[str, str]:
    """{name: expression} set by the one cell tagged `parameters`."""
    cells = json.loads((ROOT / "notebooks" / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    (source,) = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assert source.lower().startswith("# parameters")
    body = ast.parse(source).body
    assert all(isinstance(node, ast.Assign) for node in body)
    return {ast.unparse(node.targets[0]): ast.unparse(node.value) for node in body if isinstance(node, ast.Assign)}


NO_STAGES = {"explore", "score"}


class TestNotebooks:
    def test_each_stage_notebook_has_its_names_and_no_other_does(self) -> None:
        stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
        assert set(NOTEBOOK_PARAMETERS) == set(stages) - {"sources"} | NO_STAGES

    @pytest.mark.parametrize("notebook", NOTEBOOKS)
    def test_its_parameters_cell_starts_from_the_file_and_every_name_stands_for_a_parameter(
        self, notebook: str
    ) -> None:
        expected = {name: f"params.{path}" for name, path in NOTEBOOK_PARAMETERS[notebook].items() if path}
        assert {path.removeprefix("params.") for path in expected.values()} <= set(leaves(Params))
        assert expected or notebook in NO_STAGES, "what to look at is no parameter of a run"
        cell = parameter_cell(notebook)
        assert set(cell) == set(NOTEBOOK_PARAMETERS[notebook])
        assert {name: cell[name] for name in expected} == expected


class TestOverrides:
    @pytest.mark.parametrize("notebook", NOTEBOOKS)
    def test_no_names_and_the_untouched_cell_change_nothing(self, notebook: str) -> None:
        params = load_params("paper", ROOT)
        assert with_overrides(notebook, params, {"unrelated": 3, "In": ["", "import os"]}) == params
        names = {name: at(params, path) for name, path in NOTEBOOK_PARAMETERS[notebook].items() if path}
        assert with_overrides(notebook, params, names) == params

    def test_a_name_changes_its_parameter_and_no_other(self) -> None:
        before = validate({})
        after = with_overrides("train", before, {"epochs": 9})
        assert after.train.stage2.epochs == 9
        changed = [path for path in leaves(Params) if at(before, path) != at(after, path)]
        assert changed == ["train.stage2.epochs"]
        assert before.train.stage2.epochs == 1

    def test_papermills_text_becomes_the_declared_type(self) -> None:
        params = with_overrides("prepare", validate({}), {"patches": "true", "patch_size": "16", "limit": "4"})
        assert (params.patches.enabled, params.patches.size, params.data.limit) == (True, 16, 4)
        params = with_overrides("train", validate({}), {"lr": "1e-3", "epochs": "2", "order": "paper"})
        assert (params.train.stage2.lr, params.train.stage2.epochs, params.train.surgery.order) == (1e-3, 2, "paper")
        assert with_overrides("prepare", validate({}), {"rho": None}).data.rho is None, "None unsets"

    @pytest.mark.parametrize(("name", "value"), [("lr", "fast"), ("epochs", 0), ("order", "none"), ("seeds", "0,1")])
    def test_a_wrong_value_names_the_parameter_and_the_notebook(self, name: str, value: Any) -> None:
        message = refusal(with_overrides, "train", validate({}), {name: value})
        assert f"'{NOTEBOOK_PARAMETERS['train'][name]}" in message and "notebooks/train.ipynb" in message

    @pytest.mark.parametrize(
        "cell",
        [
            "# Parameters\nlamm = 0.1\n",
            "# Parameters: change them here\nlr = 1\nlamm = 0.1",
            "# parameters\nlam = lamm = 0.1",
            "# Parameters\nlamm: float = 0.1",
            "# Parameters\nlam, lamm = 0.1, 0.2",
        ],
    )
    def test_an_unknown_name_in_a_parameters_cell_is_an_error(self, cell: str) -> None:
        """The notebook's own cell, or the one that papermill puts after it."""
        given = {"In": ["", "# Parameters: change them here\nlr = 1", cell], "lamm": 0.1}
        message = refusal(with_overrides, "train", validate({}), given)
        assert "'lamm'" in message and "notebooks/train.ipynb" in message and "Did you mean 'lam'?" in message

    def test_a_mended_parameters_cell_counts_as_it_was_last_run(self) -> None:
        """In JupyterLab a mistake is mended by editing the cell and running it again, without a new kernel."""
        history = ["", "# Parameters: change them here\nlamm = 0.1", "with_overrides(...)"]
        mended = [*history, "# Parameters: change them here\nlam = 0.3"]
        assert with_overrides("train", validate({}), {"In": mended, "lam": 0.3}).train.surgery.lam == 0.3
        again = {"In": [*mended, history[1]], "lamm": 0.1}
        assert "'lamm'" in refusal(with_overrides, "train", validate({}), again)

    def test_other_cells_may_name_what_they_like(self) -> None:
        namespace = {"In": ["", "# Parameters\nlr = 0.5", "lamm = 0.1", "# Notes\nlrr = 1"], "lr": 0.5, "lamm": 0.1}
        assert with_overrides("train", validate({}), namespace).train.stage2.lr == 0.5

    def test_a_name_of_another_notebook_is_unknown_here(self) -> None:
        given = {"In": ["# Parameters\ntsne_images = 3"], "tsne_images": 3}
        assert "'tsne_images' for notebooks/train" in refusal(with_overrides, "train", validate({}), given)
