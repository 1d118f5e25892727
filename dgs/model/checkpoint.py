"""Checkpoints: a folder with peft's adapter, the heads as safetensors, dgs.json saying what they belong to, a card.

Loading reads numbers and settings and runs nothing that a folder brings: weights are safetensors, adapter settings
are LoRA's alone, and every file has the hash that it had when it was saved: SHA256SUMS says which (in format 2,
dgs.json).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dgs.atomic import replacing
from dgs.errors import UserError
from dgs.model.backbone import Backbone
from dgs.model.clip import Clip, ConvStem, load_clip
from dgs.model.identity import differences, features_hash, image_side
from dgs.model.release import (
    adapt,
    linear_head,
    read_tensors,
    release_params,
    require_same_start,
    take_apart,
    write_clip,
)
from dgs.params import Params
from dgs.stats import percent_text

FORMAT, SEALED_IN_INFO = 3, 2  # the second: dgs.json has the hashes of the other files, and its own
RECORDED = ("torch", "open_clip_torch", "peft")
INFO, SUMS, CARD, HEADS = "dgs.json", "SHA256SUMS", "README.md", "heads.safetensors"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
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

    adapter: bool
    levels: list[Annotated[int, Field(ge=0)]] = []  # that the image head reads beside the tower's output
    clip: _ClipRecord
    data_hash: str
    params: dict[str, Any]
    thresholds: dict[str, FiniteFloat]
    calibration: dict[str, dict[Literal["false_alarm", "caught"], dict[str, FiniteFloat]]] = {}
    preprocessing: dict[str, Any] = {}
    files: dict[str, str]  # sha256 by path in the folder


class _Lora(_Strict):
    """What adapter_config.json may say; other settings of peft's must be as they are by default."""

    peft_type: Literal["LORA"]
    r: int
    lora_alpha: FiniteFloat
    lora_dropout: FiniteFloat
    use_rslora: bool
    target_modules: list[str]
    layers_to_transform: list[int] | None
    layers_pattern: Literal["resblocks"] | None


# Neither in _Lora nor of any effect on what is computed.
REMARKS = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}


def save_checkpoint(
    folder: Path,
    backbone: Backbone,
    heads: dict[str, nn.Linear],
    clip: Clip,
    params: Params,
    method: str,
    seed: int | None,
    thresholds: dict[str, float],
    data_hash: str,
    calibration: dict[str, Any] | None = None,
    carried: Path | None = None,
) -> None:
    """Write a checkpoint folder, whole or not at all.

    Args:
        heads: by name; "image" is required, it decides.
        seed: None where it is not known.
        thresholds: by rule, on the logit: {"0.5": 0.0, "val": ...}.
        calibration: how each rule did on validation images, as `dgs.stats.calibrate` says it.
        carried: the folder of the CLIP, if it is to be moved into the checkpoint; params.model.clip then says "clip".
    """
    info = {
        "format": FORMAT,
        "method": method,
        "seed": seed,
        "clip": {
            "name": clip.name,
            "pretrained": params.model.pretrained,
            "weights_sha256": clip.weights_hash,
            "features": image_side(clip.features),
            "features_sha256": features_hash(image_side(clip.features)),
            "carried": carried is not None,
        },
        "adapter": isinstance(backbone.visual, PeftModel),
        "levels": list(backbone.levels),
        "preprocessing": {
            "image_size": params.image_size,
            "mean": list(clip.mean),
            "std": list(clip.std),
            "patches": params.patches.model_dump(),
            "fit": params.data.fit,
        },
        "thresholds": thresholds,
        "calibration": calibration or {},
        "data_hash": data_hash,
        "params": params.model_dump(),
        "versions": {name: version(name) for name in RECORDED},
    }
    with replacing(folder) as draft:
        if isinstance(backbone.visual, PeftModel):
            backbone.visual.save_pretrained(str(draft))
            config = draft / ADAPTER[0]  # peft writes a set in the order of this process's hash seed
            settings = json.loads(config.read_text())
            settings["target_modules"] = sorted(settings["target_modules"])
            settings["auto_mapping"] = None  # a module that peft's AutoPeftModel would import
            config.write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
        tensors = {
            f"{name}_head.{key}": value for name, head in heads.items() for key, value in head.state_dict().items()
        }
        save_file({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}, draft / HEADS)
        if carried is not None:
            shutil.move(carried, draft / "clip")
        (draft / CARD).write_text(card(info, stem=isinstance(backbone.visual.conv1, ConvStem)), encoding="utf-8")
        (draft / INFO).write_text(json.dumps(info, indent=1, sort_keys=True) + "\n")
        seal(draft)


def deciding_rule(info: dict[str, Any], folder: Path) -> tuple[str, float]:
    """The rule that verdicts follow ("val", chosen on validation images, where there is one) and its threshold.

    `info` is dgs.json of the checkpoint in `folder`; the threshold is on the logit. Raises UserError if it has none.
    """
    thresholds = info["thresholds"]
    if not thresholds:
        raise damaged(folder / INFO, "expected a threshold, found none")
    rule = "val" if "val" in thresholds else min(thresholds)
    return rule, thresholds[rule]


def card(info: dict[str, Any], stem: bool = False) -> str:
    """The model card (model_card.md.j2) for the content of dgs.json: how to load it without this package, its limits.

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
    return templates.get_template("model_card.md.j2").render(**info, stem=stem, rule=rule, percent=percent_text)


def seal(folder: Path) -> None:
    """Write SHA256SUMS, as `sha256sum` reads it: every file but the card, which is for people to go on writing."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    sealed = [name for name in sorted(names) if name not in (SUMS, CARD) and not Path(name).name.startswith(".")]
    lines = [f"{file_hash(folder / name)}  {name}\n" for name in sealed]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged(file: Path, reason: str) -> UserError:
    """What is wrong with a file of a checkpoint, and what to do about it, in one sentence."""
    reason = " ".join(reason.split())[:300]
    return UserError(f"{file}: {reason}. The checkpoint is damaged: train it again, or give another --checkpoint.")


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """In this block what goes wrong is that `file` is damaged."""
    try:
        yield
        return
    except FileNotFoundError:
        reason = "no such file"
    except (OSError, SafetensorError) as error:
        reason = f"cannot be read ({getattr(error, 'strerror', None) or error})"
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (ValueError, RecursionError) as error:
        reason = f"not JSON ({error})"
    raise damaged(file, reason)


def _read_object(file: Path) -> dict[str, Any]:
    with _reading(file):
        content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise damaged(file, f"expected a JSON object, found {type(content).__name__}")
    return content


def _read_tensors(file: Path) -> dict[str, Tensor]:
    with _reading(file):
        tensors: dict[str, Tensor] = load_file(file)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise damaged(file, f"expected finite numbers, found others in {name}")
    return tensors


def _read_sums(file: Path) -> dict[str, str]:
    with _reading(file):
        lines = file.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
    matches = [re.fullmatch(r"([0-9a-f]{64})  (.+)", line) for line in lines]
    if None in matches:
        raise damaged(file, "expected a sha256, two spaces and a name in each line, found another line")
    return {match[2]: match[1] for match in matches if match}


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
    info = _read_object(file)
    if info.get("format") == SEALED_IN_INFO:
        said = str(info.get("sha256")).encode()
        own = hashlib.sha256(file.read_bytes().replace(said, UNSEALED)).hexdigest()
        if len(said) != len(UNSEALED) or own.encode() != said:
            raise damaged(file, "its content is not what was saved")
    elif info.get("format") == FORMAT:
        info["files"] = _read_sums(folder / SUMS)
        _require_as_saved(folder, info, [INFO])
    else:
        raise UserError(
            f"Expected a checkpoint of format {SEALED_IN_INFO} or {FORMAT} in {file}, found {info.get('format')!r}. "
            "Train it again, or give another --checkpoint."
        )
    with _reading(file):
        _Record.model_validate(info)
    return info


def require_unchanged(folder: Path, info: dict[str, Any], carried: bool) -> None:
    """Raise UserError unless the files of the `carried` CLIP, or else the other ones, are as they were saved."""
    needed = [] if carried else [HEADS, *(ADAPTER if info["adapter"] else ())]
    _require_as_saved(folder, info, needed + [name for name in info["files"] if name.startswith("clip/") == carried])


def _require_as_saved(folder: Path, info: dict[str, Any], names: Iterable[str]) -> None:
    for name in dict.fromkeys(names):
        file, said = folder / name, info["files"].get(name)
        with _reading(file):
            found = file_hash(file)
        if said is None:
            raise damaged(folder / SUMS, f"expected the sha256 of {name}, found none")
        if found != said:
            raise damaged(file, f"its content is not what was saved (sha256 {said[:12]} expected, {found[:12]} found)")


def _lora_config(file: Path) -> LoraConfig:
    """adapter_config.json, if it is plain LoRA: some of peft's settings would import a module that they name."""
    settings = _read_object(file)
    with _reading(file):
        _Lora.model_validate(settings)
    known, usual = set(_Lora.model_fields), LoraConfig().to_dict()
    for name in sorted(set(settings) - known - REMARKS):
        if settings[name] and settings[name] != usual.get(name):
            raise damaged(file, f"expected plain LoRA, found {name} = {settings[name]!r}")
    return LoraConfig(**{name: settings[name] for name in known - {"peft_type"}})


def load_heads(folder: Path) -> dict[str, nn.Linear]:
    """The heads of a checkpoint, by name ("image" always; "text", "teacher"), each D -> 1.

    Raises:
        UserError: heads.safetensors is missing or damaged, or has no image head.
    """
    file = folder / HEADS
    tensors = _read_tensors(file)
    names = sorted({key.split("_head.")[0] for key in tensors} | {"image"})
    for key in (f"{name}_head.{part}" for name in names for part in ("weight", "bias")):
        if key not in tensors:
            raise damaged(file, f"expected a tensor {key}, found none")
    heads = {}
    for name in names:
        weight, bias = tensors[f"{name}_head.weight"], tensors[f"{name}_head.bias"]
        if weight.ndim != 2 or (len(weight), *bias.shape) != (1, 1):
            found = f"{tuple(weight.shape)} and {tuple(bias.shape)}"
            raise damaged(file, f"expected {name}_head of shapes (1, D) and (1,), found {found}")
        heads[name] = linear_head(weight, bias)
    return heads


def _load_adapter(visual: nn.Module, folder: Path) -> PeftModel:
    # peft asks the hub for a file that is not here, and only warns of weights that fit no adapter: both are errors.
    config, file = (folder / name for name in ADAPTER)
    weights = _read_tensors(file)
    settings = _lora_config(config)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(visual, folder, config=settings)
    except Exception as error:  # peft lets through whatever a wrong setting or shape leads to
        reason = f"does not fit {file.name} or the CLIP ({type(error).__name__}: {error})"
        raise damaged(config, reason) from None
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if strangers := sorted(set(expected) ^ set(weights)):
        raise damaged(
            file, f"expected the adapters of {config.name}, found {len(strangers)} amiss, {strangers[0]} first"
        )
    return adapted


def load_checkpoint(folder: Path, clip: Clip) -> tuple[Backbone, dict[str, nn.Linear], dict[str, Any]]:
    """A checkpoint onto its CLIP, in eval mode: (backbone, heads, dgs.json).

    `clip.model.visual` carries the adapters until `backbone.without_adapters()`.

    Raises:
        UserError: no checkpoint, a damaged one, or one trained on another CLIP.
    """
    info = read_info(folder)
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
    require_unchanged(folder, info, carried=False)
    heads = load_heads(folder)
    try:
        backbone = Backbone(clip, levels=info.get("levels", ()))
    except UserError as error:
        raise damaged(folder / INFO, str(error).rstrip(".")) from None
    for name, head in heads.items():
        width = backbone.widths[0 if name == "text" else 1]
        if head.in_features != width:
            reason = f"expected {name}_head for {width} features, as this CLIP has, found {head.in_features}"
            raise damaged(folder / HEADS, reason)
    if info["adapter"]:
        backbone.adapt(_load_adapter(backbone.visual, folder), clip)
    return backbone.eval(), heads, info


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
        backbone = adapt(clip, release, params)
        method = "dgs" if release.adapters else "probe"
        digest = f"release:{file_hash(path)}"
        source = Path(scratch) / "clip"
        heads, thresholds = release.heads, {"0.5": 0.0}
        save_checkpoint(folder, backbone, heads, clip, params, method, None, thresholds, digest, carried=source)
    return {
        "out": str(out),
        "stage": 2 if release.adapters else 1,
        "merged": release.merged,
        "rank": release.rank if release.adapters else None,
        "parameters": sum(value.numel() for value in state.values()),
    }
