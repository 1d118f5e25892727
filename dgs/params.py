"""Typed, validated view of params.yaml (+ a profile's overlay); unknown keys are errors."""

from __future__ import annotations

import ast
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dgs.data.conditions import parse_condition
from dgs.errors import UserError, did_you_mean
from dgs.workspace import find_root


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("input should be a number")
    return value


def _square(value: int) -> int:
    if math.isqrt(value) ** 2 != value:
        raise ValueError("input should be a square number: patches fill a square canvas")
    return value


def _distinct(values: list[Any]) -> list[Any]:
    twice = sorted({str(value) for value in values if values.count(value) > 1})
    if twice:
        raise ValueError(f"list {', '.join(twice)} once only")
    return values


Number = BeforeValidator(_no_bool)  # lax types would take true for 1
Rate = Annotated[float, Field(ge=0, le=1), Number]
Count = Annotated[int, Field(ge=1), Number]
Positive = Annotated[float, Field(gt=0), Number]
Seed = Annotated[int, Field(ge=0), Number]


# Keeps a name or relative path as it is; a path is relative to the repository.
PathName = Annotated[str, AfterValidator(os.path.expanduser)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]  # as it may stand in paths and tables


class _Group(BaseModel):
    # Frozen: a run's parameters never change under it. Lax types on purpose: papermill hands over "true" and "3"
    # as strings, and YAML reads 1e-3 as one; anything that does not parse as the declared type is still an error.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataParams(_Group):
    """Where images come from."""

    layout: Literal["minibench", "folders"] = "minibench"
    root: PathName = "data"  # folder of the layout, relative to the repository or absolute
    rho: float | None = 0.9  # minibench only: P(fake | caption group) in training
    shortcut: Literal["background", "object"] = "background"  # minibench only: what the caption groups are made by
    captions: PathName | None = None  # folders only: JSON-lines file {"path" or "sha256", "caption"}
    val_fraction: Rate = 0.1  # folders without a val split: this share of train, cut by content hash
    limit: Count | None = None  # at most this many images a split, generator and label (for tests and trials)
    fit: Literal["crop", "resize"] = "crop"  # how an image of another size becomes model.image_size, patches off


class PatchParams(_Group):
    """Patch selection: the release's preprocessing."""

    enabled: bool = False
    size: Annotated[int, Field(ge=2), Number] = 8  # px
    count: Annotated[Count, AfterValidator(_square)] = 49  # the canvas is sqrt(count) * size px wide


class LoraParams(_Group):
    """Adapters on q, k, v of every vision block."""

    rank: Count = 6
    alpha: Positive = 6.0
    dropout: Annotated[float, Field(ge=0, lt=1), Number] = 0.8
    rslora: bool = True  # scaling alpha / sqrt(rank), as the release
    blocks: Annotated[list[Annotated[int, Field(ge=0), Number]], Field(min_length=1)] | None = None  # null: every one


class ModelParams(_Group):
    """The CLIP that is adapted."""

    clip: PathName = "data/clip"  # an open_clip name, or a folder with open_clip_config.json and weights
    pretrained: PathName | None = None  # open_clip tag or weights file; none for a folder
    image_size: Count = 64  # px; patches.enabled sets it to the canvas
    normalize: Literal["clip", "imagenet"] = "clip"  # imagenet: the release's constants
    precision: Literal["fp32", "bf16"] = "fp32"  # of the image tower; heads and surgery are fp32 always
    lora: LoraParams = LoraParams()
    levels: Annotated[list[Annotated[int, Field(ge=0), Number]], Field(min_length=1)] = [0]  # k: tokens after k blocks


class ComputeParams(_Group):
    """What it runs on; of these only `threads` can change a result, by rounding."""

    device: str = "auto"
    jobs: Count = 2  # seeds trained side by side
    threads: Count = 1  # CPU threads a job: fixed, since sums in another order round differently
    workers: Annotated[int, Field(ge=0), Number] = 0  # loader processes
    batch_size: Count = 256  # images at a time where nothing is trained
    keep_mb: Annotated[int, Field(ge=0), Number] = 512  # views of a set stay in memory up to here
    snapshot_seconds: Annotated[float, Field(ge=0), Number] | None = 60.0  # between snapshots of a seed; null: none


class Stage1Params(_Group):
    """The probe, whose head becomes the teacher's."""

    epochs: Count = 3
    lr: Positive = 1e-4


class Stage2Params(_Group):
    """Adapters and heads."""

    epochs: Count = 1
    lr: Positive = 1e-4


class SurgeryParams(_Group):
    """Distillation-guided gradient surgery."""

    lam: Annotated[float, Field(ge=0), Number] = 0.2  # weight of prior alignment
    distill: Annotated[float, Field(ge=0), Number] = 1.0  # weight of feature distillation, where a method has it
    eps: Annotated[float, Field(ge=0), Number] = 1e-6  # added to the norm of the harmful direction
    decay: Annotated[float, Field(ge=0), Number] = 0.01  # weight of the penalty on the adapters, where a method has it
    mix: Annotated[float, Field(ge=0, le=1), Number] = 0.5  # share of the tuned weights, where a method averages
    directions: Count = 16  # of the captions, that are erased where a method does so
    order: Literal["release", "paper"] = "release"  # release: suppression acts on task + alignment
    scale: Literal["release", "per_sample"] = "release"  # release: directions carry 1/B


class TrainParams(_Group):
    """Both stages of training."""

    batch_size: Count = 32
    accumulate: Count = 1  # a batch goes through the tower in so many parts, one after the other
    processes: Count = 1  # that share every batch of a seed
    views: Count = 1  # distinct seeded views an image is seen in; epoch e uses view e mod views
    stage1: Stage1Params = Stage1Params()
    stage2: Stage2Params = Stage2Params()
    surgery: SurgeryParams = SurgeryParams()
    log_every: Count = 10  # steps between two records of loss and gradients
    log_gradients: bool = True  # inner products of gradients, for gradient_angles; false: losses alone


_OF_METHODS = ("train.stage1.", "train.stage2.", "train.surgery.", "model.lora.", "model.levels")


def _parameters(names: dict[str, Any]) -> dict[str, Any]:
    for name in names:
        known = leaves(Params)
        if name not in known:
            raise ValueError(f"'{name}' is no parameter.{did_you_mean(name, known)} Write group.name in full")
    return names


def _of_methods(names: dict[str, Any]) -> dict[str, Any]:
    for name in names:
        if not name.startswith(_OF_METHODS):
            raise ValueError(f"'{name}' cannot differ between methods, only {', '.join(_OF_METHODS)}")
    return _parameters(names)


def leaves(group: type[BaseModel], prefix: str = "") -> list[str]:
    """Full names of the parameters in a group and the groups in it: "train.stage2.lr"."""
    names: list[str] = []
    for key, field in group.model_fields.items():
        inner = field.annotation
        is_group = isinstance(inner, type) and issubclass(inner, BaseModel)
        names += leaves(inner, f"{prefix}{key}.") if is_group else [f"{prefix}{key}"]  # type: ignore[arg-type]
    return names


def _condition_name(text: str) -> str:
    return parse_condition(text).name


class RobustnessParams(_Group):
    """Test images changed, to tell what a detector survives from what it reads."""

    conditions: Annotated[list[Annotated[str, AfterValidator(_condition_name)]], AfterValidator(_distinct)] = []
    methods: Annotated[list[str], AfterValidator(_distinct)] | None = None  # null: all
    seeds: Annotated[list[Seed], AfterValidator(_distinct)] | None = None  # null: all


class EvaluateParams(_Group):
    """Metrics and figures."""

    retrieval_pool: Annotated[int, Field(ge=2), Number] = 200  # captions a retrieval query chooses among
    tsne_images: Count = 100  # images a generator and label in the t-SNE figure
    robustness: RobustnessParams = RobustnessParams()
    checkpoints: dict[Name, PathName] = {}  # more of them, by the name that tables give them; trained elsewhere


class GradientAnglesParams(_Group):
    """The gradient-angle analysis."""

    pairs: list[
        Literal[
            "task-harmful",
            "task-beneficial",
            "task-applied",
            "harmful-beneficial",
            "applied-harmful",
            "applied-beneficial",
        ]
    ] = ["task-harmful", "task-beneficial", "task-applied"]


class Params(_Group):
    """Every number a run depends on."""

    profile: Name = "mini"
    methods: Annotated[list[str], Field(min_length=1), AfterValidator(_distinct)] = ["probe", "lora", "dgs"]
    seeds: Annotated[list[Seed], Field(min_length=1), AfterValidator(_distinct)] = [0, 1, 2, 3, 4]
    data: DataParams = DataParams()
    patches: PatchParams = PatchParams()
    model: ModelParams = ModelParams()
    train: TrainParams = TrainParams()
    settings: dict[str, Annotated[dict[str, Any], AfterValidator(_of_methods)]] = {}  # of single methods, by full name
    settings_instead_of: Annotated[dict[str, Any], AfterValidator(_parameters)] = {}  # what they replace: see `tuned`
    compute: ComputeParams = ComputeParams()
    evaluate: EvaluateParams = EvaluateParams()
    gradient_angles: GradientAnglesParams = GradientAnglesParams()

    @property
    def image_size(self) -> int:
        """Side in px of what the model sees."""
        if not self.patches.enabled:
            return self.model.image_size
        return round(self.patches.count**0.5) * self.patches.size

    def tuned(self, method: str) -> Params:
        """These parameters with the settings of one method in their place.

        A setting replaces the value named in `settings_instead_of` and no other: a parameter that was changed since
        then, in params.yaml or by `dvc exp run -S`, stands above it. Where none is named, it replaces any.

        Raises:
            UserError: a setting that is no parameter, or of the wrong type.
        """
        content = self.model_dump()
        replaced, own = self.settings_instead_of, self.settings.get(method, {})
        unknown = {name: value for name, value in own.items() if name not in replaced}
        known = {name: value for name, value in own.items() if name in replaced}
        held = {name: value for name, value in known.items() if _value(content, name) == replaced[name]}
        return validate(_replaced(content, unknown | held), f"settings.{method}")


def _replaced(content: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`content`, changed in place: values by their dotted names."""
    for dotted, value in values.items():
        *groups, key = dotted.split(".")
        target: Any = content
        for group in groups:
            target = target[group]
        target[key] = value
    return content


# The flat names a notebook's `parameters` cell may set, and what they stand for in params.yaml.
NOTEBOOK_PARAMETERS: dict[str, dict[str, str]] = {
    "prepare": {
        "root": "data.root",
        "layout": "data.layout",
        "rho": "data.rho",
        "shortcut": "data.shortcut",
        "captions": "data.captions",
        "val_fraction": "data.val_fraction",
        "limit": "data.limit",
        "clip": "model.clip",
        "pretrained": "model.pretrained",
        "patches": "patches.enabled",
        "patch_size": "patches.size",
    },
    "train": {
        "method": "",
        "seeds": "seeds",
        "epochs": "train.stage2.epochs",
        "lr": "train.stage2.lr",
        "stage1_epochs": "train.stage1.epochs",
        "stage1_lr": "train.stage1.lr",
        "batch_size": "train.batch_size",
        "processes": "train.processes",
        "rank": "model.lora.rank",
        "alpha": "model.lora.alpha",
        "dropout": "model.lora.dropout",
        "lam": "train.surgery.lam",
        "eps": "train.surgery.eps",
        "order": "train.surgery.order",
        "scale": "train.surgery.scale",
        "device": "compute.device",
        "log_every": "train.log_every",
    },
    "evaluate": {
        "methods": "methods",
        "seeds": "seeds",
        "batch_size": "compute.batch_size",
        "retrieval_pool": "evaluate.retrieval_pool",
        "tsne_images": "evaluate.tsne_images",
        "processes": "train.processes",
        "conditions": "evaluate.robustness.conditions",
        "device": "compute.device",
    },
    "gradient_angles": {"methods": "methods", "seeds": "seeds", "pairs": "gradient_angles.pairs"},
    "explore": {"method": "", "seed": "", "image": "", "label": "", "caption": ""},
}


def _merge(base: dict[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overlay.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"Expected a parameter file at {path}, found none.") from None
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror or error}). Name a parameter file.") from None
    except UnicodeDecodeError:
        raise UserError(f"Expected {path} to be text in UTF-8, found other bytes. Save it as UTF-8.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}. Mend that line.") from None
    if not isinstance(content, dict):
        raise UserError(f"Expected {path} to hold groups of parameters (key: value), found {type(content).__name__}.")
    return content


def _dotted(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values in nested groups by their full names."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= _dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def merged_params(profile: str | None = None, root: Path | None = None) -> dict[str, Any]:
    """params.yaml with the overlay profiles/<profile>.yaml laid over it, as plain data, not yet validated.

    What the overlay names for all methods stands above params.yaml's settings of single ones: those were chosen for
    params.yaml's data. The overlay's own settings stand above both: what it names is what they replace.
    """
    root = root or find_root()
    base = _read_yaml(root / "params.yaml")
    if profile is None or profile == base.get("profile"):
        return base
    overlay = root / "profiles" / f"{profile}.yaml"
    if not overlay.exists():
        known = sorted(p.stem for p in overlay.parent.glob("*.yaml"))
        raise UserError(
            f"Expected the profile '{profile}' at profiles/{profile}.yaml, found none.{did_you_mean(profile, known)} "
            f"Profiles here: {', '.join([str(base.get('profile')), *known])}."
        )
    content = _read_yaml(overlay)
    if content.get("profile", profile) != profile:
        raise UserError(
            f"Expected profiles/{profile}.yaml to be the profile '{profile}', found profile: {content['profile']} in "
            f"it. Remove that line: the file's name is the profile's."
        )
    named = _dotted({group: values for group, values in content.items() if group != "settings"})
    for method, own in (base.get("settings") or {}).items():
        base["settings"][method] = {name: value for name, value in (own or {}).items() if name not in named}
    replaced = base.get("settings_instead_of") or {}
    replaced |= {name: value for name, value in named.items() if name in replaced}
    return _merge(base, {"profile": profile, **content})


def _known_keys(location: tuple[str | int, ...]) -> list[str]:
    model: Any = Params
    for part in location[:-1]:
        field = getattr(model, "model_fields", {}).get(part)
        model = field.annotation if field else None
    return list(getattr(model, "model_fields", {}))


def validate(content: Mapping[str, Any], source: str = "params.yaml") -> Params:
    """Plain data to `Params`; the first mistake becomes one sentence.

    Raises:
        UserError: an unknown key, or a value of the wrong type or range.
    """
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = _known_keys(first["loc"])
            hint = did_you_mean(str(first["loc"][-1]), known)
            raise UserError(f"Unknown parameter '{name}' in {source}.{hint} Known here: {', '.join(known)}.") from None
        raise UserError(
            f"Parameter '{name}' in {source}: {first['msg'][0].lower()}{first['msg'][1:]}; found {first['input']!r}."
        ) from None


def load_params(profile: str | None = None, root: Path | None = None) -> Params:
    """The parameters of a run.

    The file named by the environment variable DGS_PARAMS as it is (a stage sets it), else params.yaml overlaid with
    `profile`, or with the profile named by DGS_PROFILE.
    """
    file = os.environ.get("DGS_PARAMS")
    if file and profile is None:
        return validate(_read_yaml(Path(file)), Path(file).name)
    profile = profile or os.environ.get("DGS_PROFILE") or None
    source = "params.yaml" if profile is None else f"params.yaml + profiles/{profile}.yaml"
    return validate(merged_params(profile, root), source)


def only_params(file: Path | None) -> Params:
    """Make a complete parameter file (None: params.yaml) all that this process and its children run with."""
    os.environ.pop("DGS_PROFILE", None)
    os.environ["DGS_PARAMS"] = str((file or find_root() / "params.yaml").resolve())
    return load_params()


def _assigned_names(cells: list[str]) -> dict[str, bool]:
    """Names set by the parameters cell as it was last run, and by the one that papermill injects after it.

    True where the value is written out (lr = 3.0e-3), False where it is computed, as from the parameter file
    (lr = params.train.stage2.lr). Earlier runs of the cell do not count: in JupyterLab a mistake is mended by editing
    the cell and running it again.
    """
    marked = [source for source in cells if source.lstrip().lower().startswith("# parameters")]
    own = [index for index, source in enumerate(marked) if source.lstrip().lower().startswith("# parameters:")]
    names: dict[str, bool] = {}
    for source in marked[own[-1] if own else 0 :]:
        for node in ast.parse(source).body:
            targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
            flat = [part for target in targets for part in getattr(target, "elts", [target])]
            written = not any(isinstance(part, ast.Name) for part in ast.walk(getattr(node, "value", None) or node))
            names |= {target.id: written for target in flat if isinstance(target, ast.Name)}
    return names


def with_overrides(notebook: str, params: Params, namespace: Mapping[str, Any]) -> Params:
    """`params` with a notebook's flat names (as edited or injected by papermill) put in their place.

    A training notebook's method brings its own settings; a name whose value was written out or changed stands above
    them.

    Args:
        notebook: "prepare", "train", "evaluate", "gradient_angles" or "explore".
        namespace: the notebook's `globals()`.

    Raises:
        UserError: a name that the notebook does not have, or a value that is not of its type.
    """
    flat = NOTEBOOK_PARAMETERS[notebook]
    assigned = _assigned_names(list(namespace.get("In", [])))
    for name in assigned:
        if name not in flat:
            raise UserError(
                f"Unknown parameter '{name}' for notebooks/{notebook}.ipynb.{did_you_mean(name, flat)} "
                f"Known here: {', '.join(flat)}."
            )
    given = params.model_dump()
    changed = {
        dotted: namespace[name]
        for name, dotted in flat.items()
        if dotted and name in namespace and (assigned.get(name) or namespace[name] != _value(given, dotted))
    }
    own = params.tuned(method) if isinstance(method := namespace.get("method"), str) else params
    return validate(_replaced(own.model_dump(), changed), f"notebooks/{notebook}.ipynb")


def _value(content: Mapping[str, Any], dotted: str) -> Any:
    value: Any = content
    for part in dotted.split("."):
        value = value[part]
    return value
