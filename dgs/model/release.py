"""The authors' release: what its two kinds of checkpoint files hold, told from the file alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import save_file
from torch import Tensor, nn

from dgs.errors import UserError
from dgs.model.backbone import Backbone
from dgs.model.checkpoint_files import read_state
from dgs.model.clip import Clip
from dgs.params import Params, dotted, merged_params, validate

State = Mapping[str, Tensor]

STUDENT, PROBE = "clip_model.", "clip_model_frozen."
IMAGE_BLOCK, TEXT_BLOCK = "visual.transformer.resblocks.", "transformer.resblocks."
ALPHA = 6.0  # of the release's adapters; a file of merged ones is checked against it
# Tensors whose shapes give every size of a CLIP, with their numbers of dimensions.
SIZED_BY = {
    "visual.conv1.weight": 4,
    "visual.proj": 2,
    "visual.positional_embedding": 2,
    "positional_embedding": 2,
    "token_embedding.weight": 2,
}


@dataclass(frozen=True)
class Release:
    """A checkpoint file of the release, taken apart.

    clip: the frozen CLIP under OpenAI's (and open_clip's) names, float32.
    heads: "image" decides; of a stage-2 file also "text" and "teacher".
    adapters: {"<block>.<q|k|v>_proj": (A (r, W), B (W, r))}; none in a stage-1 file.
    merged: s B@A had been added to the student's weights (the release does so when it saves after `eval()`).
    """

    clip: dict[str, Tensor]
    heads: dict[str, nn.Linear]
    adapters: dict[str, tuple[Tensor, Tensor]]
    merged: bool

    @property
    def rank(self) -> int:
        """Of the adapters."""
        return len(next(iter(self.adapters.values()))[0])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file of the release, as `read_state`. Raises UserError too if there is no file."""
    if not path.exists():
        raise UserError(f"Expected a checkpoint file of the release at {path}, found none.")
    return read_state(path)


def _below(state: State, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def open_clip_config(clip: State) -> dict[str, Any]:
    """`open_clip_config.json` for a CLIP of OpenAI's architecture, read off its tensors' shapes (heads 64 wide).

    A tensor of `SIZED_BY` that is missing, of other dimensions or empty counts as one of length 2 along each.
    """
    sizes = {
        name: tuple(clip[name].shape)
        if name in clip and clip[name].ndim == dimensions and clip[name].numel()
        else (2,) * dimensions
        for name, dimensions in SIZED_BY.items()
    }
    width, _, _, patch = sizes["visual.conv1.weight"]
    side = math.isqrt(max(sizes["visual.positional_embedding"][0] - 1, 0)) * patch
    (context, text_width), (vocabulary, _) = sizes["positional_embedding"], sizes["token_embedding.weight"]
    vision = {"image_size": side, "layers": _depth(clip, IMAGE_BLOCK), "width": width, "patch_size": patch}
    text = {"context_length": context, "vocab_size": vocabulary, "width": text_width}
    model = {
        "embed_dim": sizes["visual.proj"][1],
        "quick_gelu": True,
        "vision_cfg": {**vision, "head_width": min(64, width)},
        "text_cfg": {**text, "heads": max(text_width // 64, 1), "layers": _depth(clip, TEXT_BLOCK)},
    }
    preprocess = {"size": side, "mean": list(OPENAI_DATASET_MEAN), "std": list(OPENAI_DATASET_STD)}
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def _depth(names: Iterable[str], start: str) -> int:
    # Of none there is one to expect: who compares the names says which tensors are missing.
    return max(len({name[len(start) :].partition(".")[0] for name in names if name.startswith(start)}), 1)


def expected_clip(clip: State, path: Path) -> dict[str, Tensor]:
    """The names of a CLIP of these sizes, each with a tensor of its shape (on the device "meta": without numbers)."""
    model = open_clip_config(clip)["model_cfg"]
    try:
        with torch.device("meta"):
            return dict(open_clip.CLIP(**model).state_dict())
    except Exception as error:  # sizes that no CLIP has fail in many ways
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"Expected a CLIP of OpenAI's architecture in {path}, found other sizes ({reason}).") from None


def _split_attention(clip: State) -> dict[str, Tensor]:
    """The same tensors as the release's student names them: in its image side q, k and v are apart."""
    split: dict[str, Tensor] = {}
    for name, value in clip.items():
        at, attention, leaf = name.partition(".attn.")
        if not attention or not name.startswith(IMAGE_BLOCK):
            split[name] = value
        elif leaf.startswith("in_proj_"):
            kind = leaf.removeprefix("in_proj_")
            split |= {f"{at}.attn.{part}_proj.{kind}": rows for part, rows in zip("qkv", value.chunk(3), strict=True)}
        else:
            split[f"{at}.attn.{leaf.removeprefix('out_')}"] = value
    return split


def _expected_student(clip: State, rank: int) -> dict[str, Tensor]:
    """The student of such a CLIP: with adapters A (r, W) and B (W, r) on q, k and v."""
    student = _split_attention(clip)
    for name in [name for name in student if name.endswith(tuple(f".attn.{part}_proj.weight" for part in "qkv"))]:
        at, width = name.removesuffix("weight"), len(student[name])
        student[f"{at}w_lora_A"] = torch.empty(rank, width, device="meta")
        student[f"{at}w_lora_B"] = torch.empty(width, rank, device="meta")
    return student


def linear_head(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A frozen head of weights (1, D) and bias (1,), float32."""
    head = nn.Linear(weight.shape[1], 1)
    head.load_state_dict({"weight": weight, "bias": bias})
    return head.requires_grad_(False)


def _require_names(state: State, expected: set[str], kind: str, path: Path) -> None:
    missing, strange = sorted(expected - set(state)), sorted(set(state) - expected)
    if missing or strange:
        parts = [
            f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for names, what in ((missing, "missing"), (strange, "not known"))
            if names
        ]
        raise UserError(f"Expected the {len(expected)} tensors of a {kind} file of the release in {path}, found "
                        f"{len(state)}; {'; '.join(parts)}.")  # fmt: skip


def take_apart(state: State, path: Path) -> Release:
    """A stage-1 (448 tensors at ViT-L/14) or stage-2 (1,138) state dict of the release.

    Raises:
        UserError: another set of names (the first offending ones are named), a student that differs from its frozen
            copy by more than adapters, or adapters merged in some places only.
    """
    second = any(name.startswith(STUDENT) for name in state)
    if not second and not any(name.startswith(PROBE) for name in state):
        found = f"{len(state)} tensors, {min(state)} first" if state else "no tensor"
        raise UserError(f"Expected a file of the release in {path}, names below {PROBE} or {STUDENT}, found {found}.")
    kind, at = ("stage-2", PROBE + PROBE) if second else ("stage-1", PROBE)
    clip, student = _below(state, at), _below(state, STUDENT)
    first = student.get(f"{IMAGE_BLOCK}0.attn.q_proj.w_lora_A", torch.empty(0))
    plain = expected_clip(clip, path)
    expected = {at + name: value for name, value in plain.items()}
    heads = {"image": "img_frozen_fc"}
    if second:
        rank = len(first) if first.ndim == 2 else 0
        expected |= {STUDENT + name: value for name, value in _expected_student(plain, rank).items()}
        heads = {"image": "img_fc", "text": "text_fc", "teacher": f"{PROBE}img_frozen_fc"}
    for name in heads.values():
        expected[f"{name}.weight"], expected[f"{name}.bias"] = plain["visual.proj"][:1], torch.empty(1)
    _require_names(state, set(expected), kind, path)
    for name, dimensions in SIZED_BY.items():
        if clip[name].ndim != dimensions:
            raise UserError(f"Expected {name} in {path} to have {dimensions} dimensions, found {clip[name].ndim}.")
        if not clip[name].numel():
            raise UserError(
                f"Expected numbers in {name} in {path}, found none: its shape is {tuple(clip[name].shape)}."
            )
    if second and (first.ndim != 2 or len(first) < 1):
        shape = tuple(first.shape)
        raise UserError(f"Expected adapters A (r, W), r >= 1, in {path}, found shape {shape} in the first.")
    for name, value in expected.items():
        if state[name].shape != value.shape:
            shapes = f"of shape {tuple(value.shape)}, found {tuple(state[name].shape)}"
            raise UserError(f"Expected {name} in {path} {shapes}.")
    adapters, merged = _adapters(student, _split_attention(clip), path) if second else ({}, False)
    return Release(
        {name: value.float() for name, value in clip.items()},
        {name: linear_head(state[f"{head}.weight"], state[f"{head}.bias"]) for name, head in heads.items()},
        adapters,
        merged,
    )


def _adapters(student: State, frozen: State, path: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], bool]:
    """The adapters, and whether they are merged: every other weight has to be the frozen copy's."""
    adapters: dict[str, tuple[Tensor, Tensor]] = {}
    unmerged = merged = True
    for name, original in frozen.items():
        layer, weight, theirs = name.removesuffix(".weight"), original.float(), student[name].float()
        if f"{layer}.w_lora_A" not in student:
            if not torch.equal(theirs, weight):
                raise UserError(f"Expected {STUDENT}{name} in {path} to equal the frozen copy's, found another: only "
                                f"adapters and heads learn in the release.")  # fmt: skip
            continue
        a, b = student[f"{layer}.w_lora_A"].float(), student[f"{layer}.w_lora_B"].float()
        moved = theirs - weight
        rest = moved - ALPHA / math.sqrt(len(a)) * (b @ a)
        # Merging rounds once, merging and unmerging again some times: halves are only ever rounded when stored.
        ulps = 16 if student[name].dtype == torch.float32 else 2
        rounding = ulps * torch.finfo(student[name].dtype).eps * max(weight.abs().max(), theirs.abs().max())
        unmerged &= bool(moved.abs().max() <= rounding)
        merged &= bool(rest.abs().max() <= rounding)
        if not unmerged and not merged:
            raise UserError(
                f"Expected {STUDENT}{name} in {path} to differ from the frozen copy by nothing or by the adapter "
                f"(alpha {ALPHA:g}), as every one before it; found a difference of {moved.abs().max():.2g}, of which "
                f"the adapter leaves {rest.abs().max():.2g}."
            )
        adapters[layer.removeprefix(IMAGE_BLOCK).replace(".attn", "")] = (a, b)
    return adapters, merged and not unmerged


def require_same_start(second: Release, first: Release, step2: Path, step1: Path) -> None:
    """Raise UserError unless the stage-2 file `step2` started from the stage-1 file `step1`."""
    if not second.adapters or first.adapters:
        raise UserError(f"Expected a stage-2 file ({step2}) and then a stage-1 file ({step1}), found them otherwise.")
    if set(first.clip) != set(second.clip):
        raise UserError(f"Expected the CLIPs of {step1} and {step2} to be of one size, found two.")
    teacher, probe = second.heads["teacher"].state_dict(), first.heads["image"].state_dict()
    pairs = {name: (first.clip[name], second.clip[name]) for name in first.clip}
    pairs |= {f"img_frozen_fc.{name}": (probe[name], teacher[name]) for name in probe}
    for name, (a, b) in pairs.items():
        if not torch.equal(a, b):
            raise UserError(f"Expected {step2} to have started from {step1}, found another {name} in it.")


def write_clip(release: Release, folder: Path) -> None:
    """The frozen CLIP as a folder that `load_clip` and open_clip read; stored as halves where those are exact."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(open_clip_config(release.clip), indent=1) + "\n")
    tensors = {}
    for name, value in sorted(release.clip.items()):
        half = value.half()
        tensors[name] = (half if torch.equal(half.float(), value) else value).contiguous()
    save_file(tensors, folder / "open_clip_model.safetensors")


def release_params(release: Release) -> Params:
    """The release's own settings: 7 x 7 patches (32 px of 224), ImageNet's constants, alpha 6, dropout 0.8.

    A tower for another size than 224 px keeps the 7 x 7, or goes without patches where 7 does not divide it.
    """
    side = open_clip_config(release.clip)["preprocess_cfg"]["size"]
    patches = {"enabled": side % 7 == 0, "size": max(side // 7, 2), "count": 49}
    lora = {"rank": release.rank, "alpha": ALPHA, "dropout": 0.8} if release.adapters else {}
    own = {
        "profile": "release",
        "data": {"layout": "folders", "rho": None},
        "patches": patches,
        "model": {"clip": "clip", "image_size": side, "normalize": "imagenet", "levels": [0], "lora": lora},
        "train": {"batch_size": 32, "stage1": {"epochs": 3, "lr": 1e-4}, "stage2": {"epochs": 1, "lr": 1e-4}},
    }
    rest = validate(merged_params()).for_method("default")  # params.yaml's, of which the release says nothing
    return rest.replaced(dotted(own), "the release's settings")


def adapt(clip: Clip, release: Release, params: Params) -> Backbone:
    """The release's student on its CLIP: adapters as in the file, in eval mode."""
    if not release.adapters:
        return Backbone(clip).eval()
    backbone = Backbone(clip, params.model.lora)
    for name, (a, b) in release.adapters.items():
        block, _, projection = name.partition(".")
        layer: Any = getattr(backbone.visual.base_model.model.transformer.resblocks[int(block)].attn, projection)
        layer.lora_A["default"].weight.data.copy_(a)
        layer.lora_B["default"].weight.data.copy_(b)
    return backbone.eval()
