"""A profile: checked before anything runs, and its own pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dgs.errors import UserError, did_you_mean
from dgs.model.clip_source import find_clip, require_weights
from dgs.model.methods.registry import METHODS, get_method, require_text
from dgs.params import Params, dotted, merged_params, only_params, read_overlays, validate
from dgs.workspace import (
    external_checkpoints,
    find_root,
    is_path,
    no_such_clip,
    read_yaml,
    require_data_root,
    weights_twice,
    yaml_text,
)  # fmt: skip

INPUTS = ("pictures", "matched", "tower")  # in build/<profile>: no stage's outputs, so that inputs may lie there
UNWATCHED = "scratch"  # in .dvcignore: what notebooks by hand leave there should not look like a change


def _inputs(params: Params, root: Path) -> dict[str, list[str]]:
    """Files and folders beside data.root that stages read, by stage: a change to their content must rerun them."""
    clip = [
        name
        for name in (params.model.clip, params.model.pretrained)
        if name and is_path(name, root) and not (root / name).is_relative_to(root / params.data.root)
    ]
    given = params.data.captions
    captions = [given] if given and not (root / given).is_relative_to(root / params.data.root) else []
    further = [*params.evaluate.checkpoints.values(), *params.evaluate.detectors.values()]
    return {"prepare": clip + captions, "evaluate": clip + further}  # training: by the hash that prepare notes


def _check_robustness(params: Params) -> None:
    asked = params.evaluate.robustness
    tested: list[tuple[str, Sequence[Any] | None, Sequence[Any]]] = [
        ("methods", asked.methods, [*params.methods, *params.evaluate.checkpoints, *params.evaluate.detectors]),
        ("seeds", asked.seeds, params.seeds),
    ]
    for name, chosen, known in tested:
        for value in chosen or ():
            if value not in known:
                hint = did_you_mean(str(value), map(str, known))
                raise UserError(
                    f"Expected evaluate.robustness.{name} to be of {name}: {', '.join(map(str, known))}; found "
                    f"{value}.{hint} Add it to {name}, or leave it out."
                )


def _check_detectors(params: Params, root: Path) -> None:
    for name, file in params.evaluate.detectors.items():
        if name in METHODS or name == "frozen" or name in params.evaluate.checkpoints:
            raise UserError(
                f"Expected names in evaluate.detectors that no method or checkpoint has, found {name}. Call it "
                f"otherwise, for example my-{name}."
            )
        if not (root / file).is_file() or not file.endswith(".py"):
            raise UserError(f"Expected a Python file at evaluate.detectors.{name} = {file}, found none. Mend the path.")


def _check_places(params: Params, root: Path) -> None:
    own, made = f"build/{params.profile}", (root / "build" / params.profile).resolve()
    checkpoints = {f"evaluate.checkpoints.{name}": path for name, path in params.evaluate.checkpoints.items()}
    detectors = {f"evaluate.detectors.{name}": path for name, path in params.evaluate.detectors.items()}
    inputs = {"data.root": params.data.root, "model.clip": params.model.clip, **checkpoints, **detectors}
    for name, path in inputs.items():
        place = (root / path).resolve()
        if place == made or (place.is_relative_to(made) and place.relative_to(made).parts[0] not in INPUTS):
            raise UserError(
                f"Expected {name} = {path} to lie outside {own}, where this profile's outputs go. "
                f"Move it, for example to build/inputs/."
            )
    optional = {"data.captions": params.data.captions, "model.pretrained": params.model.pretrained}
    for name, given in {**inputs, **optional}.items():
        if given and (root / given).absolute().is_relative_to((root / UNWATCHED).absolute()):
            raise UserError(
                f"Expected {name} = {given} to lie outside {UNWATCHED}/, which DVC does not look into: a change to it "
                f"would rerun nothing. Move it, for example to build/inputs/."
            )


def _not_looked_at(params: Params) -> tuple[str, ...]:
    chosen = (get_method(method) for method in params.methods)
    own = [each.name for method in chosen for each in (method.members or (method,)) if each.model is not None]
    found = {"train.accumulate": (params.train.accumulate, 1), "model.precision": (params.model.precision, "fp32")}
    given = [f"{name}: {value}" for name, (value, usual) in found.items() if value != usual]
    if not own or not given:
        return ()
    what = f"{' and '.join(own)}, which brings a network of its own"
    return (f"{what}, is trained in whole batches and in fp32, whatever is given ({', '.join(given)}).",)


def check_params(params: Params, root: Path) -> tuple[str, ...]:
    """What can be known to be wrong before any stage runs: methods, folders, files and weights that are not there.

    Returns:
        what is assumed of the CLIP, since nothing says it, and what is given and not looked at, a sentence each.

    Raises:
        UserError: the first mistake.
    """
    for method in (*params.methods, *params.tuned):
        if method != "default":
            get_method(method)
            params.for_method(method)
    for method in params.methods:
        get_method(method).of(params)
    if missing := [method for method in params.methods if method not in params.tuned]:
        raise UserError(f"Expected numbers of {missing[0]}, found none. Add to tuned: {missing[0]}: {{}}.")
    require_text(params.methods, params.model.text)
    _check_robustness(params)
    _check_places(params, root)
    external_checkpoints(params.evaluate.checkpoints, METHODS, root)
    _check_detectors(params, root)

    def made_here(path: str) -> bool:  # by the pipeline itself, from data.dvc
        return (root / path).resolve().is_relative_to(root.resolve() / "data")

    if not made_here(params.data.root):
        require_data_root(root / params.data.root, params.data.root)
    clip, weights = params.model.clip, params.model.pretrained
    if is_path(clip, root) and not made_here(clip) and not (root / clip).is_dir():
        raise no_such_clip(clip)
    if weights and is_path(clip, root):
        raise weights_twice(clip, weights)
    if weights and is_path(weights, root) and not (root / weights).is_file():
        raise UserError(f"Expected a weights file at model.pretrained = {weights}, found none. Mend the path.")
    if params.data.captions and not (root / params.data.captions).is_file():
        raise UserError(
            f"Expected a caption file at data.captions = {params.data.captions}, found none. "
            f"Set it to a JSON-lines file, or to null."
        )
    if made_here(clip) and not (root / clip).is_dir():
        return _not_looked_at(params)
    source = find_clip(params.model, root)
    require_weights(source)
    if params.model.text == "own":
        source.require_text(clip)
    if not source.of_vision_transformer:
        from dgs.model.tower_timm import require_tower  # loads timm, which takes seconds

        require_tower(source, clip, params.image_size)
    return (*_not_looked_at(params), *source.notes_at(params.image_size))


def numbers_in_force(method: str | None, profile: str | None, root: Path | None = None) -> list[dict[str, Any]]:
    """Every parameter with where it comes from: {"name", "value", "source"}; with `method`, as that method trains.

    Source: params.yaml or profiles/<profile>.yaml, ": tuned.<method>" or ": tuned.default" there, or the method itself.

    Raises:
        UserError: no such method or profile, or a parameter that is wrong.
    """
    root = root or find_root()
    overlays = {f"profiles/{own}.yaml": dotted(content) for own, content in read_overlays(profile, root).items()}
    params = validate(merged_params(profile, root), f"profiles/{profile}.yaml" if profile else "params.yaml")

    def file(name: str) -> str:
        return next((own for own, content in reversed(overlays.items()) if name in content), "params.yaml")

    given = dotted(params.model_dump(exclude={"tuned"}))
    if method is None:
        return [{"name": name, "value": value, "source": file(name)} for name, value in given.items()]
    chosen = get_method(method)
    fixed = {f"train.surgery.{name}" for name in chosen.settings}
    rows = []
    in_force = chosen.of(params.for_method(method)).model_dump(exclude={"tuned"})
    for name, value in dotted(in_force).items():
        own = method if name in params.tuned.get(method, {}) else "default"
        tuned = f"{file(f'tuned.{own}.{name}')}: tuned.{own}"
        source = f"the method {method}" if name in fixed else file(name) if given[name] == value else tuned
        rows.append({"name": name, "value": value, "source": source})
    return rows


def check_file(params_file: Path | None, warn: Callable[[str], None]) -> Params:
    """Check a complete parameter file (None: params.yaml), which this process then runs with.

    DVC looks only at the groups a stage names; this looks at the whole file, so that no typo passes unseen. `warn` is
    told of inputs whose contents the main pipeline does not watch.
    """
    root, params = find_root(), only_params(params_file)
    for note in check_params(params, root):
        warn(f"note: {note}")
    if params_file is None:
        for path in sorted({path for paths in _inputs(params, root).values() for path in paths}):
            warn(f"warning: dvc.yaml does not watch {path}; a profile would. After a change to it: dvc repro --force.")
    return params


def write_profile_pipeline(profile: str, root: Path | None = None) -> Path:
    """A pipeline of its own for a profile: profiles/<profile>/dvc.yaml and params.yaml, made from the main ones.

    A profile has its own dvc.lock there, so running it never makes the committed `mini` results stale.

    Returns:
        the dvc.yaml to reproduce; for the main profile, the main one.

    Raises:
        UserError: no such profile, or a parameter that is wrong.
    """
    root = root or find_root()
    content = merged_params(profile, root)
    params = validate(content, f"profiles/{profile}.yaml")
    check_params(params, root)
    if profile == merged_params(None, root).get("profile"):
        return root / "dvc.yaml"
    folder = root / "profiles" / profile
    folder.mkdir(parents=True, exist_ok=True)
    relative = f"profiles/{profile}/params.yaml"
    (root / relative).write_text(
        f"# Made from params.yaml and profiles/{profile}.yaml.\n" + yaml_text(params.model_dump())
    )
    pipeline = read_yaml(root / "dvc.yaml")
    inputs = _inputs(params, root)
    for name, body in pipeline["stages"].items():
        body["wdir"] = "../.."
        body["cmd"] = body["cmd"].replace("dgs stage", f"dgs stage --params {relative}")
        body["deps"] = [relative if dep == "params.yaml" else dep for dep in body["deps"]] + inputs.get(name, [])
        if "params" in body:
            body["params"] = [{relative: body["params"]}]
    pipeline.pop("metrics", None)
    pipeline.pop("plots", None)
    (folder / "dvc.yaml").write_text(
        f"# Made from dvc.yaml for the profile {profile}; edit that one.\n" + yaml_text(pipeline)
    )
    return folder / "dvc.yaml"
