"""Typed, validated view of params.yaml (+ a profile's overlay); unknown keys are errors.

No number has a second home here: what params.yaml does not say is an error. `null` under `train` is the method's own
value, from `tuned`; a number given there, in an overlay, by `dvc exp run -S` or in a notebook holds for every method.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from dgs.conditions import parse_condition
from dgs.errors import UserError, did_you_mean
from dgs.workspace import find_root, read_yaml, read_yaml_text


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


def _text_in_yaml(name: str) -> str:
    if not isinstance(read_yaml_text(name), str):
        raise ValueError("input should be a name that YAML does not read as something else, such as a number")
    return name


def _or_null(value: Any, checked: ValidatorFunctionWrapHandler) -> Any:
    return None if value is None else checked(value)


Number = BeforeValidator(_no_bool)  # lax types would take true for 1
Rate = Annotated[float, Field(ge=0, le=1), Number]
Count = Annotated[int, Field(ge=1), Number]
Natural = Annotated[int, Field(ge=0), Number]
Positive = Annotated[float, Field(gt=0), Number]
Weight = Annotated[float, Field(ge=0), Number]
# A number, or null until `Params.for_method` puts the method's own in its place; who trains sees numbers alone.
OWN = WrapValidator(_or_null)
_AS_IT_IS = PlainSerializer(lambda value: value)
OwnCount = Annotated[Count, OWN, _AS_IT_IS]
OwnPositive = Annotated[Positive, OWN, _AS_IT_IS]
OwnWeight = Annotated[Weight, OWN, _AS_IT_IS]
OwnRate = Annotated[Rate, OWN, _AS_IT_IS]

# Keeps a name or relative path as it is; a path is relative to the repository.
PathName = Annotated[str, AfterValidator(os.path.expanduser)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]  # as it may stand in paths and tables


class _Group(BaseModel):
    # Frozen: a run's parameters never change under it. Lax types on purpose: papermill hands over "true" and "3"
    # as strings; anything that does not parse as the declared type is still an error.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Group = TypeVar("Group", bound=_Group)


class DataParams(_Group):
    """Where images come from."""

    layout: Literal["minibench", "folders", "imagefolder", "parquet"]
    root: PathName  # folder of the layout, relative to the repository or absolute
    rho: Rate | None  # minibench only: P(fake | caption group) in training
    shortcut: Literal["background", "object"]  # minibench only: what the caption groups are made by
    captions: PathName | None  # not for the minibench: JSON lines {"path" or "sha256", "caption"}, or {path: caption}
    val_fraction: Rate  # own images without a val split: this share of train, cut by content hash
    caption_drop: Rate  # minibench only: share of training images whose caption loses the shortcut's word
    limit: Count | None  # at most this many images a split, generator and label (for tests and trials)
    fit: Literal["crop", "resize"]  # how an image of another size becomes model.image_size, patches off
    show_images: bool  # in figures and executed notebooks


class PatchParams(_Group):
    """Patch selection: the release's preprocessing."""

    enabled: bool
    size: Annotated[int, Field(ge=2), Number]  # px
    count: Annotated[Count, AfterValidator(_square)]  # the canvas is sqrt(count) * size px wide


class LoraParams(_Group):
    """Adapters on q, k, v of every vision block."""

    rank: Count
    alpha: Positive
    dropout: Annotated[float, Field(ge=0, lt=1), Number]
    rslora: bool  # scaling alpha / sqrt(rank), as the release
    blocks: Annotated[list[Natural], Field(min_length=1)] | None  # null: every one


class ModelParams(_Group):
    """The CLIP that is adapted."""

    clip: PathName  # an open_clip name, timm/NAME, or a folder with open_clip_config.json and weights
    pretrained: PathName | None  # open_clip tag, weights file, or hub (of timm's); none for a folder
    image_size: Count  # px; patches.enabled sets it to the canvas
    normalize: Literal["clip", "imagenet"]  # imagenet: the release's constants
    precision: Literal["fp32", "bf16"]  # of the image tower; heads and surgery are fp32 always
    text: Literal["own", "aligned", "none"]  # what embeds captions: dgs.model.text
    lora: LoraParams
    levels: Annotated[list[Natural], Field(min_length=1)]  # k: tokens after k blocks


class ComputeParams(_Group):
    """What it runs on; of these jobs, workers, keep_mb and snapshot_seconds leave what is trained to the bit."""

    device: str
    gemm: Literal["auto", "torch", "onednn"]  # what multiplies matrices where adapters are: dgs.model.gemm
    jobs: Count  # seeds trained side by side
    threads: Count  # CPU threads a job: fixed, since sums in another order round differently
    workers: Natural  # loader processes
    batch_size: Count  # images at a time where nothing is trained
    keep_mb: Natural  # views of a set stay in memory up to here
    prefix_mb: Natural  # of disk, for a seed's tokens below the first adapted block; more is computed at each step
    snapshot_seconds: Weight | None  # between snapshots of a seed; null: none


class StageParams(_Group):
    """Of stage 1, the probe, whose head becomes the teacher's; or of stage 2, adapters and heads."""

    epochs: OwnCount
    lr: OwnPositive


class SurgeryParams(_Group):
    """Distillation-guided gradient surgery."""

    lam: OwnWeight  # weight of prior alignment
    distill: OwnWeight  # weight of feature distillation, where a method has it
    eps: OwnWeight  # added to the norm of the harmful direction
    decay: OwnWeight  # weight of the penalty on the adapters, where a method has it
    mix: OwnRate  # share of the tuned weights, where a method averages
    directions: OwnCount  # of the captions, that are erased where a method does so
    content_side: Annotated[float, Field(gt=0, le=1), Number]  # share of an image's side that a content expert is left
    order: Literal["release", "paper"]  # release: suppression acts on task + alignment
    scale: Literal["release", "per_sample"]  # release: directions carry 1/B
    text_head: Literal["release", "fitted"]  # release: it learns beside the adapters; fitted: converged before, frozen


class TrainParams(_Group):
    """Both stages of training."""

    batch_size: Count
    accumulate: Count  # a batch goes through the tower in so many parts, one after the other
    processes: Count  # that share every batch of a seed
    images: Count | None  # so many of the training images, drawn by the seed; null: all
    views: Count  # distinct seeded views an image is seen in; epoch e uses view e mod views
    stage1: StageParams
    stage2: StageParams
    surgery: SurgeryParams
    log_every: Count  # steps between two records of loss and gradients
    log_gradients: bool  # inner products of gradients, for gradient_angles; false: losses alone


def leaves(group: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Types of the parameters in a group and the groups in it, by full names: "train.stage2.lr"."""
    found: dict[str, Any] = {}
    for key, field in group.model_fields.items():
        inner = field.annotation
        is_group = isinstance(inner, type) and issubclass(inner, BaseModel)
        found |= leaves(inner, f"{prefix}{key}.") if is_group else {f"{prefix}{key}": field.rebuild_annotation()}  # type: ignore[arg-type]
    return found


# What `tuned` may name: everything that may be null under `train`.
_TRAIN = leaves(TrainParams, "train.")
TUNABLE = {name: kind for name, kind in _TRAIN.items() if OWN in getattr(kind, "__metadata__", ())}


def _tuned_numbers(values: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in values.items():
        if name not in TUNABLE:
            raise ValueError(f"'{name}' cannot differ between methods.{did_you_mean(name, TUNABLE)} Expected one of "
                             f"{', '.join(TUNABLE)}")  # fmt: skip
        if value is None:
            raise ValueError(f"'{name}' should be a number")
        try:
            found[name] = TypeAdapter(TUNABLE[name]).validate_python(value)
        except ValidationError as error:
            message = error.errors(include_url=False)[0]["msg"]
            said = {"message": f"'{name}': {message[0].lower()}{message[1:]}", "found": value}
            raise PydanticCustomError("tuned", "{message}", said) from None
    return found


class RobustnessParams(_Group):
    """Test images changed, to tell what a detector survives from what it reads."""

    conditions: Annotated[
        list[Annotated[str, AfterValidator(lambda text: parse_condition(text).name)]], AfterValidator(_distinct)
    ]
    methods: Annotated[list[str], AfterValidator(_distinct)] | None  # null: all
    seeds: Annotated[list[Natural], AfterValidator(_distinct)] | None  # null: all


class EvaluateParams(_Group):
    """Metrics and figures."""

    retrieval_pool: Annotated[int, Field(ge=2), Number]  # captions a retrieval query chooses among
    tsne_images: Count  # images a generator and label in the t-SNE figure
    robustness: RobustnessParams
    checkpoints: dict[Name, PathName]  # more of them, by the name that tables give them; trained elsewhere
    detectors: dict[Name, PathName]  # Python files with predict(paths), by the same; code that is run


Pair = Literal[
    "task-harmful", "task-beneficial", "task-applied", "harmful-beneficial", "applied-harmful", "applied-beneficial"
]


class GradientAnglesParams(_Group):
    """The gradient-angle analysis."""

    pairs: list[Pair]


class ImageParams(_Group):
    """What decides how an image is seen and scored."""

    profile: Annotated[Name, AfterValidator(_text_in_yaml)]
    data: DataParams
    patches: PatchParams
    model: ModelParams

    @property
    def image_size(self) -> int:
        """Side in px of what the model sees."""
        if not self.patches.enabled:
            return self.model.image_size
        return round(self.patches.count**0.5) * self.patches.size


class Params(ImageParams):
    """Every number a run depends on."""

    methods: Annotated[list[str], Field(min_length=1), AfterValidator(_distinct)]
    seeds: Annotated[list[Natural], Field(min_length=1), AfterValidator(_distinct)]
    train: TrainParams
    tuned: dict[str, Annotated[dict[str, Any], AfterValidator(_tuned_numbers)]]  # {method or "default": {name: number}}
    compute: ComputeParams
    evaluate: EvaluateParams
    gradient_angles: GradientAnglesParams

    def replaced(self, values: Mapping[str, Any], source: str = "params.yaml") -> Params:
        """These parameters with others in their place, by full names: {"train.stage2.lr": 0.003}.

        Raises:
            UserError: a value of the wrong type or range; names `source`.
        """
        content = self.model_dump()
        for dotted, value in values.items():
            *groups, key = dotted.split(".")
            target: Any = content
            for group in groups:
                target = target[group]
            target[key] = value
        return validate(content, source)

    def for_method(self, method: str) -> Params:
        """The numbers that a method trains with: its own of `tuned`, else the default's, wherever `train` says null.

        Raises:
            UserError: null, and no value in `tuned`.
        """
        own = {**self.tuned.get("default", {}), **self.tuned.get(method, {})}
        given = dotted({"train": self.train.model_dump()})
        found = {name: own.get(name) for name in TUNABLE if given[name] is None}
        for name, value in found.items():
            if value is None:
                raise UserError(
                    f"Expected a number for {name}: it is null, and neither tuned.{method} nor tuned.default has it. "
                    f"Give one of them."
                )
        return self.replaced({**found, "tuned": {}}, f"tuned.{method}")


def dotted(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values in nested groups by their full names."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def read_overlays(profile: str | None, root: Path, above: str = "") -> dict[str, dict[str, Any]]:
    """What is laid over params.yaml for a profile, by name: profiles/<profile>.yaml, after the one that it names by
    `over`; nothing for None and for the profile of params.yaml.

    Raises:
        UserError: no such profile, one that calls itself otherwise, or a pile of more than two.
    """
    main = read_yaml(root / "params.yaml").get("profile")
    if profile is None or profile == main:
        return {}
    overlay = root / "profiles" / f"{profile}.yaml"
    if not overlay.exists():
        known = sorted(p.stem for p in overlay.parent.glob("*.yaml"))
        raise UserError(
            f"Expected the profile '{profile}' at profiles/{profile}.yaml, found none.{did_you_mean(profile, known)} "
            f"Profiles here: {', '.join([str(main), *known])}."
        )
    content = read_yaml(overlay)
    if content.get("profile", profile) != profile:
        raise UserError(
            f"Expected profiles/{profile}.yaml to be the profile '{profile}', found profile: {content['profile']} in "
            f"it. Remove that line: the file's name is the profile's."
        )
    below = content.pop("over", None)
    if below is not None and above:
        raise UserError(
            f"Expected over in profiles/{above}.yaml to name a profile that lies over params.yaml alone, found "
            f"{profile}, which lies over {below}. Name another."
        )
    found = {} if below is None else read_overlays(str(below), root, profile)
    return {**found, profile: {"profile": profile, **content}}


def merged_params(profile: str | None = None, root: Path | None = None) -> dict[str, Any]:
    """params.yaml with the overlay profiles/<profile>.yaml laid over it, as plain data, not yet validated.

    An overlay's `tuned.default` stands above params.yaml's numbers of single methods: those were chosen for
    params.yaml's data. The overlay's own numbers of single methods stand above both.
    """
    root = root or find_root()
    found = read_yaml(root / "params.yaml")
    for overlay in read_overlays(profile, root).values():
        default = _group(_group(overlay.get("tuned")).get("default"))
        for own in _group(found.get("tuned")).values():
            for number in default:
                _group(own).pop(number, None)
        found = merged(found, overlay)
    return found


def _group(content: Any) -> dict[str, Any]:
    """`content`, or nothing where that is no group: `validate` says so."""
    return content if isinstance(content, dict) else {}


def merged(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `overlay` in their place, at any depth."""
    found = dict(base)
    for key, value in overlay.items():
        old = found.get(key)
        found[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return found


def validate(content: Mapping[str, Any], source: str = "params.yaml") -> Params:
    """Plain data to `Params`; the first mistake becomes one sentence.

    Raises:
        UserError: an unknown key, a missing one, or a value of the wrong type or range.
    """
    return validate_as(Params, content, source)


def validate_as(kind: type[Group], content: Mapping[str, Any], source: str) -> Group:
    """As `validate`, for one group of parameters."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        rank = {
            "invalid_key": 0,
            "missing": 2,
        }  # the first explains others, such as the 0 of 0,5; the second is a typo's
        first = min(error.errors(include_url=False), key=lambda each: rank.get(each["type"], 1))
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "invalid_key":
        raise UserError(
            f"Expected names of parameters in {source}, found {first['input']!r} in {name.rpartition('.')[0] or 'it'}. "
            f"If it comes of a decimal comma, write a point."
        )
    if first["type"] == "missing":
        raise UserError(f"Expected the parameter '{name}' in {source}, found none. Add it.")
    if first["type"] == "extra_forbidden":
        group: Any = Params
        for part in first["loc"][:-1]:
            group = group.model_fields[part].annotation
        known = list(group.model_fields)
        hint = did_you_mean(str(first["loc"][-1]), known)
        raise UserError(f"Unknown parameter '{name}' in {source}.{hint} Known here: {', '.join(known)}.")
    found = first.get("ctx", {}).get("found", first["input"])
    raise UserError(f"Parameter '{name}' in {source}: {first['msg'][0].lower()}{first['msg'][1:]}; found {found!r}.")


def load_params(profile: str | None = None, root: Path | None = None) -> Params:
    """The parameters of a run.

    The file named by the environment variable DGS_PARAMS as it is (a stage sets it), else params.yaml overlaid with
    `profile`, or with the profile named by DGS_PROFILE.
    """
    file = os.environ.get("DGS_PARAMS")
    if file and profile is None:
        return validate(read_yaml(Path(file)), Path(file).name)
    profile = profile or os.environ.get("DGS_PROFILE") or None
    source = "params.yaml" if profile is None else f"params.yaml + profiles/{profile}.yaml"
    return validate(merged_params(profile, root), source)


def only_params(file: Path | None) -> Params:
    """Make a complete parameter file (None: params.yaml) all that this process and its children run with."""
    os.environ.pop("DGS_PROFILE", None)
    os.environ["DGS_PARAMS"] = str((file or find_root() / "params.yaml").resolve())
    return load_params()
