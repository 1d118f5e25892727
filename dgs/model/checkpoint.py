"""Checkpoints: a folder with the files of a classifier, dgs.json saying what they are and belong to, and a card.

Loading reads numbers and settings and runs nothing that a folder brings: weights are safetensors, and every file has
the hash that it had when it was saved: SHA256SUMS says which (in format 2, dgs.json).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from dgs.atomic import replacing
from dgs.calibration import CalibrationMap, fit_map
from dgs.errors import UserError
from dgs.model.checkpoint_files import CARD, INFO, SUMS, damaged, file_hash, read_object, read_sums, reading, seal
from dgs.model.classifier import Classifier
from dgs.model.clip import Clip, ConvStem, load_clip
from dgs.model.clip_classifier import ClipClassifier
from dgs.model.identity import differences, features_hash, image_side
from dgs.model.methods.registry import METHODS
from dgs.model.release import (
    adapt,
    read_tensors,
    release_params,
    require_same_start,
    take_apart,
    write_clip,
)
from dgs.params import Params
from dgs.stats import Scored, percent_text

FORMAT, SEALED_IN_INFO = 3, 2  # the second: dgs.json has the hashes of the other files, and its own
RECORDED = ("torch", "open_clip_torch", "peft")
OWN_KINDS = {method.model.kind: method.model for method in METHODS.values() if method.model is not None}
KINDS: dict[str, type[Classifier]] = {ClipClassifier.kind: ClipClassifier, **OWN_KINDS}
UNSEALED = b"0" * 64  # stands for dgs.json's own hash while that is taken (format 2)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _ClipRecord(_Strict):
    name: str
    weights_sha256: str
    features: dict[str, Any] = {}  # by `dgs.model.identity.features_of`; older checkpoints have none
    carried: bool = False  # the CLIP's folder lies in the checkpoint's


class _Record(_Strict):
    """What dgs.json must hold to be of use; the rest is for people."""

    data_hash: str
    params: dict[str, Any]
    thresholds: dict[str, FiniteFloat]
    calibration: dict[str, dict[Literal["false_alarm", "caught"], dict[str, FiniteFloat]]] = {}
    calibration_map: CalibrationMap | None = None
    validation_logits: dict[Literal["real", "fake"], list[FiniteFloat]] = {}
    selfcheck: dict[str, FiniteFloat] = {}
    preprocessing: dict[str, Any] = {}
    files: dict[str, str]  # sha256 by path in the folder


class _RecordWithClip(_Record):
    """What it must hold of a CLIP's tower and heads."""

    adapter: bool
    levels: list[Annotated[int, Field(ge=0)]] = []  # that the image head reads beside the tower's output
    clip: _ClipRecord


def save_checkpoint(
    folder: Path,
    classifier: Classifier,
    params: Params,
    method: str,
    seed: int | None,
    thresholds: dict[str, float],
    data_hash: str,
    calibration: dict[str, Any] | None = None,
    carried: Path | None = None,
    validation: Scored | None = None,
    selfcheck: dict[str, float] | None = None,
) -> None:
    """Write a checkpoint folder, whole or not at all.

    Args:
        seed: None where it is not known.
        thresholds: by rule, on the logit: {"0.5": 0.0, "val": ...}.
        calibration: how each rule did on validation images, as `dgs.stats.calibrate` says it.
        carried: the folder of the CLIP, if it is to be moved into the checkpoint; params.model.clip then says "clip".
        validation: the validation images' labels and logits, which are kept with the map that is fitted to them.
        selfcheck: what is to be compared elsewhere (`dgs.model.selfcheck`).
    """
    seen = {"image_size": params.image_size, "patches": params.patches.model_dump(), "fit": params.data.fit}
    info = {
        "format": FORMAT,
        "kind": classifier.kind,
        "method": method,
        "seed": seed,
        **classifier.about(),
        "preprocessing": seen,
        "thresholds": thresholds,
        "calibration": calibration or {},
        **({} if validation is None else _validated(validation)),
        "selfcheck": selfcheck or {},
        "data_hash": data_hash,
        "params": params.model_dump(),
        "versions": {name: version(name) for name in RECORDED},
    }
    if (clip := classifier.clip) is not None:
        seen |= {"mean": list(clip.mean), "std": list(clip.std)}
        info["clip"] = {
            "name": clip.name,
            "pretrained": params.model.pretrained,
            "weights_sha256": clip.weights_hash,
            "features": image_side(clip.features),
            "features_sha256": features_hash(image_side(clip.features)),
            "carried": carried is not None,
        }
    with replacing(folder) as draft:
        classifier.save(draft)
        if carried is not None:
            shutil.move(carried, draft / "clip")
        (draft / CARD).write_text(card(info, stem=_has_stem(clip)), encoding="utf-8")
        (draft / INFO).write_text(json.dumps(info, indent=1, sort_keys=True) + "\n")
        seal(draft)


def _validated(images: Scored) -> dict[str, Any]:
    def kept(logits: NDArray[np.float64]) -> list[float]:
        """Sorted; float32, as the shortest decimals that are read back as the same number."""
        return [float(str(logit)) for logit in np.sort(logits).astype(np.float32)]

    fitted = fit_map(images)
    return {
        "calibration_map": None if fitted is None else fitted.model_dump(exclude_defaults=True),
        "validation_logits": {"real": kept(images.reals), "fake": kept(images.fakes)},
    }


def deciding_rule(info: dict[str, Any], folder: Path) -> tuple[str, float]:
    """The rule that verdicts follow ("val", chosen on validation images, where there is one) and its threshold.

    `info` is dgs.json of the checkpoint in `folder`; the threshold is on the logit. Raises UserError if it has none.
    """
    thresholds = info["thresholds"]
    if not thresholds:
        raise damaged(folder / INFO, "expected a threshold, found none")
    rule = "val" if "val" in thresholds else min(thresholds)
    return rule, thresholds[rule]


def _has_stem(clip: Clip | None) -> bool:
    return clip is not None and isinstance(getattr(clip.model.visual, "conv1", None), ConvStem)


def card(info: dict[str, Any], stem: bool = False) -> str:
    """The model card for the content of dgs.json: how to load it without this package, its limits.

    The kind's template if it has one (model_card_<kind>.md.j2), else that of a CLIP or of a model of a method's own.

    `stem`: whether the CLIP has the embedded one's convolutional stem. The same content gives the same text.
    """
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    rule = deciding_rule(info, Path())[0] if info["thresholds"] else "val"
    of_timm = "visual.trunk" in info.get("clip", {}).get("features", {})
    of_kind = "model_card_timm.md.j2" if of_timm else "model_card.md.j2" if "clip" in info else "model_card_own.md.j2"
    names = [f"model_card_{_kind(info)}.md.j2", of_kind]
    return templates.select_template(names).render(**info, stem=stem, rule=rule, percent=percent_text)


def read_info(folder: Path) -> dict[str, Any]:
    """dgs.json of a checkpoint folder, with all that loading needs, and "files": the sha256 of each by path.

    Raises:
        UserError: no checkpoint there, one of another format, or a damaged one.
    """
    file = folder / INFO
    try:
        file.stat()
    except OSError:
        hint = " An exported file needs --engine onnx." if folder.suffix == ".onnx" else ""
        raise UserError(f"Expected a checkpoint folder (with dgs.json) at {folder}, found none.{hint}") from None
    info = read_object(file)
    if info.get("format") == SEALED_IN_INFO:
        said = str(info.get("sha256")).encode()
        own = hashlib.sha256(file.read_bytes().replace(said, UNSEALED)).hexdigest()
        if len(said) != len(UNSEALED) or own.encode() != said:
            raise damaged(file, "its content is not what was saved")
    elif info.get("format") == FORMAT:
        info["files"] = read_sums(folder / SUMS)
        _require_as_saved(folder, info, [INFO])
    else:
        raise UserError(
            f"Expected a checkpoint of format {SEALED_IN_INFO} or {FORMAT} in {file}, found {info.get('format')!r}. "
            "Train it again, or give another --checkpoint."
        )
    if (kind := _kind(info)) not in KINDS:
        raise UserError(
            f"Expected a checkpoint of the kind {' or '.join(KINDS)} in {file}, found {kind!r}. Use the version of dgs "
            f"that made it, or give another --checkpoint."
        )
    with reading(file):
        (_RecordWithClip if KINDS[kind].of_clip else _Record).model_validate(info)
    return info


def _kind(info: Mapping[str, Any]) -> str:
    """What a checkpoint is of; those made before there were kinds are of a CLIP."""
    return str(info.get("kind", ClipClassifier.kind))


def require_unchanged(folder: Path, info: dict[str, Any], carried: bool) -> None:
    """Raise UserError unless the files of the `carried` CLIP, or else the other ones, are as they were saved."""
    needed = [] if carried else KINDS[_kind(info)].files(info)
    _require_as_saved(folder, info, needed + [name for name in info["files"] if name.startswith("clip/") == carried])


def _require_as_saved(folder: Path, info: dict[str, Any], names: Iterable[str]) -> None:
    for name in dict.fromkeys(names):
        file, said = folder / name, info["files"].get(name)
        with reading(file):
            found = file_hash(file)
        if said is None:
            raise damaged(folder / SUMS, f"expected the sha256 of {name}, found none")
        if found != said:
            raise damaged(file, f"its content is not what was saved (sha256 {said[:12]} expected, {found[:12]} found)")


def _require_same_clip(folder: Path, info: dict[str, Any], clip: Clip) -> None:
    if info["clip"]["weights_sha256"] != clip.weights_hash:
        raise UserError(
            f"The checkpoint {folder} was trained on {info['clip']['name']} with weights "
            f"{info['clip']['weights_sha256'][:12]}, found {clip.name} with {clip.weights_hash[:12]}. "
            f"Set model.clip and model.pretrained to the same weights, or train again."
        )
    if changed := differences(info["clip"].get("features", {}), clip.features):
        raise UserError(
            f"The checkpoint {folder} was trained on {info['clip']['name']} with other settings than {clip.name} has "
            f"now, which give other features from the same weights: {'; '.join(changed[:3])}. Restore them (in "
            f"open_clip_config.json, or by model.clip), or train again."
        )


def load_checkpoint(folder: Path, clip: Clip | None) -> tuple[Classifier, dict[str, Any]]:
    """A checkpoint, onto its CLIP if it is of one, in eval mode: (what classifies, dgs.json).

    `clip`: looked at only by a checkpoint whose dgs.json has a "clip"; it carries the adapters until `close`.

    Raises:
        UserError: no checkpoint, a damaged one, or one trained on another CLIP.
    """
    info = read_info(folder)
    if "clip" in info and clip is not None:
        _require_same_clip(folder, info, clip)
    require_unchanged(folder, info, carried=False)
    return KINDS[_kind(info)].load(folder, info, clip), info


def import_release(step2: str | Path, step1: str | Path | None = None, *, out: str | Path) -> dict[str, Any]:
    """The release's `.pth` file -> a checkpoint folder that carries its CLIP, and needs no download to be scored with.

    The student is rebuilt from the frozen copy and the adapters, so that merged adapters are not applied twice.

    Args:
        step2: a stage-2 file (1,138 tensors at ViT-L/14); a stage-1 file (448) becomes a probe.
        step1: the stage-1 file that the stage-2 one should have started from; it is compared, and adds nothing.
        out: the folder to make.

    Returns:
        {"out", "stage", "merged", "rank", "parameters"} of what was found.

    Raises:
        UserError: not tensors alone, other names (the first are given), weights that no adapter explains, `step1` and
            `step2` that do not belong together, `out` there already.
    """
    folder, path = Path(out).absolute(), Path(step2)
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()) or folder.samefile(Path.cwd()))
        if not taken:
            folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot make {out} ({error.strerror or error}). Choose another --out.") from None
    if taken:
        raise UserError(f"{out} should not exist yet, or be an empty folder. Remove it or choose another --out.")
    state = read_tensors(path)
    release = take_apart(state, path)
    if step1 is not None:
        require_same_start(release, take_apart(read_tensors(Path(step1)), Path(step1)), path, Path(step1))
    params = release_params(release)
    # Named otherwise than a draft of the checkpoint, which saving it would remove as left behind.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.import-", dir=folder.parent) as scratch:
        write_clip(release, Path(scratch) / "clip")
        clip = load_clip(params.model, Path(scratch), params.image_size, text=False)
        classifier = ClipClassifier(clip, adapt(clip, release, params), release.heads)
        method = "dgs" if release.adapters else "probe"
        digest = f"release:{file_hash(path)}"
        source = Path(scratch) / "clip"
        save_checkpoint(folder, classifier, params, method, None, {"0.5": 0.0}, digest, carried=source)
    return {
        "out": str(out),
        "stage": 2 if release.adapters else 1,
        "merged": release.merged,
        "rank": release.rank if release.adapters else None,
        "parameters": sum(value.numel() for value in state.values()),
    }
