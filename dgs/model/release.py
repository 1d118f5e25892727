"""The authors' release: what its two kinds of checkpoint files hold, told from the file alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import save_file
from torch import Tensor, nn

from dgs.errors import UserError

State = Mapping[str, Tensor]

STUDENT, PROBE = "clip_model.", "clip_model_frozen."
BLOCK = "transformer.resblocks."
ATTENTION = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
REST = ("ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")
ADAPTED = (
    *(f"{part}_proj.{leaf}" for part in "qkv" for leaf in ("weight", "bias", "w_lora_A", "w_lora_B")),
    "proj.weight",
    "proj.bias",
)
OUTSIDE = (
    *("positional_embedding", "text_projection", "logit_scale", "token_embedding.weight", "ln_final.weight"),
    *("ln_final.bias", "visual.class_embedding", "visual.positional_embedding", "visual.proj", "visual.conv1.weight"),
    *("visual.ln_pre.weight", "visual.ln_pre.bias", "visual.ln_post.weight", "visual.ln_post.bias"),
)
ALPHA = 6.0  # of the release's adapters; a file of merged ones is checked against it


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
    """The tensors of a `.pth` file: a bare state dict, or one under "model"; no code in it is ever run.

    Raises:
        UserError: missing, damaged, or holding anything but tensors.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"Expected a checkpoint file of the release at {path}, found none.") from None
    except Exception as error:  # damaged files fail in many ways
        reason = " ".join(str(error).split()).split(". ")[0][:200] or type(error).__name__
        raise UserError(f"Cannot read {path} as tensors alone ({reason}). Other content is never loaded.") from None
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping):
        raise UserError(f"Expected a state dict in {path}, found {type(content).__name__}.")
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise UserError(f"Expected only tensors in {path}, found {type(value).__name__} under {name!r}.")
        if value.layout is not torch.strided or not value.is_floating_point():
            raise UserError(f"Expected dense real tensors in {path}, found {value.dtype}, {value.layout} in {name}.")
        if not torch.isfinite(value).all():
            raise UserError(f"Expected finite numbers in {path}, found others in {name}.")
    return {str(name): value for name, value in content.items()}


def _depth(names: Iterable[str], prefix: str) -> int:
    start = prefix + BLOCK
    return len({name[len(start) :].partition(".")[0] for name in names if name.startswith(start)})


def clip_names(vision_layers: int, text_layers: int, attention: Iterable[str] = ATTENTION) -> set[str]:
    """Names of a CLIP's tensors as OpenAI published them; `attention`: those of a vision block's attention."""
    rest = {f"{module}.{leaf}" for module in REST for leaf in ("weight", "bias")}
    names = set(OUTSIDE)
    for tower, layers, some in (("visual.", vision_layers, attention), ("", text_layers, ATTENTION)):
        own = rest | {f"attn.{leaf}" for leaf in some}
        names |= {f"{tower}{BLOCK}{block}.{leaf}" for block in range(layers) for leaf in own}
    return names


def _below(state: State, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _head(state: State, name: str, path: Path, width: int) -> nn.Linear:
    weight, bias = state[f"{name}.weight"].float(), state[f"{name}.bias"].float()
    if (tuple(weight.shape), tuple(bias.shape)) != ((1, width), (1,)):
        found = f"{tuple(weight.shape)} and {tuple(bias.shape)}"
        raise UserError(f"Expected {name} in {path} to be of shapes (1, {width}) and (1,), found {found}.")
    head = nn.Linear(width, 1)
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


def clip_shapes(clip: State, path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a CLIP, from those of its outer ones."""
    known = {"visual.conv1.weight": 4, "visual.proj": 2, "visual.positional_embedding": 2, "positional_embedding": 2,
             "token_embedding.weight": 2}  # fmt: skip
    for name, dimensions in known.items():
        if clip[name].ndim != dimensions:
            raise UserError(f"Expected {name} in {path} to have {dimensions} dimensions, found {clip[name].ndim}.")
    width, _, patch, _ = clip["visual.conv1.weight"].shape
    embed, (context, text) = _width(clip), clip["positional_embedding"].shape
    side = math.isqrt(len(clip["visual.positional_embedding"]) - 1)
    shapes: dict[str, tuple[int, ...]] = {
        "visual.conv1.weight": (width, 3, patch, patch),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (side * side + 1, width),
        "visual.proj": (width, embed),
        "positional_embedding": (context, text),
        "text_projection": (text, embed),
        "token_embedding.weight": (len(clip["token_embedding.weight"]), text),
        "logit_scale": (),
    }
    for name in clip:
        wide = width if name.startswith("visual.") else text
        if BLOCK in name or name not in shapes:
            leaf = name.rpartition(BLOCK)[2].partition(".")[2]
            shapes[name] = {
                "attn.in_proj_weight": (3 * wide, wide),
                "attn.in_proj_bias": (3 * wide,),
                "attn.out_proj.weight": (wide, wide),
                "mlp.c_fc.weight": (4 * wide, wide),
                "mlp.c_fc.bias": (4 * wide,),
                "mlp.c_proj.weight": (wide, 4 * wide),
            }.get(leaf, (wide,))
    return shapes


def _require_shapes(state: State, expected: Mapping[str, tuple[int, ...]], path: Path) -> None:
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise UserError(f"Expected {name} in {path} of shape {shape}, found {tuple(state[name].shape)}.")


def _adapters(student: State, frozen: State, layers: int, path: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], bool]:
    """The adapters, and whether they are merged: every other weight has to be the frozen copy's."""
    adapters: dict[str, tuple[Tensor, Tensor]] = {}
    unmerged = merged = True
    first = student[f"visual.{BLOCK}0.attn.q_proj.w_lora_A"]
    rank = len(first) if first.ndim == 2 else 0
    if rank < 1:
        raise UserError(
            f"Expected adapters A (r, W), r >= 1, in {path}, found shape {tuple(first.shape)} in the first."
        )
    for block in range(layers):
        at = f"visual.{BLOCK}{block}.attn."
        thirds = zip("qkv", *(frozen[f"{at}in_proj_{leaf}"].chunk(3) for leaf in ("weight", "bias")), strict=True)
        for part, weight, bias in thirds:
            name, wide = f"{at}{part}_proj", len(weight)
            shapes = {"weight": (wide, wide), "bias": (wide,), "w_lora_A": (rank, wide), "w_lora_B": (wide, rank)}
            _require_shapes(student, {f"{name}.{leaf}": shape for leaf, shape in shapes.items()}, path)
            a, b = student[f"{name}.w_lora_A"].float(), student[f"{name}.w_lora_B"].float()
            if not torch.equal(student[f"{name}.bias"].float(), bias.float()):
                raise UserError(f"Expected {STUDENT}{name}.bias in {path} to equal the frozen copy's, found another.")
            moved = student[f"{name}.weight"].float() - weight.float()
            delta = ALPHA / math.sqrt(rank) * (b @ a)
            # Merging rounds once, merging and unmerging again some times: halves are only ever rounded when stored.
            ulps = 16 if student[f"{name}.weight"].dtype == torch.float32 else 2
            largest = max(weight.abs().max().item(), student[f"{name}.weight"].abs().max().item())
            rounding = ulps * torch.finfo(student[f"{name}.weight"].dtype).eps * largest
            unmerged &= bool(moved.abs().max() <= rounding)
            merged &= bool((moved - delta).abs().max() <= rounding)
            if not unmerged and not merged:
                raise UserError(
                    f"Expected {STUDENT}{name}.weight in {path} to differ from the frozen copy by nothing or by the "
                    f"adapter (alpha {ALPHA:g}), as every one before it; found a difference of "
                    f"{moved.abs().max():.2g}, of which the adapter leaves {(moved - delta).abs().max():.2g}."
                )
            adapters[f"{block}.{part}_proj"] = (a, b)
    return adapters, merged and not unmerged


def take_apart(state: State, path: Path) -> Release:
    """A stage-1 (448 tensors at ViT-L/14) or stage-2 (1,138) state dict of the release.

    Raises:
        UserError: another set of names (the first offending ones are named), a student that differs from its frozen
            copy by more than adapters, or adapters merged in some places only.
    """
    second = any(name.startswith(STUDENT) for name in state)
    kind, at = ("stage-2", PROBE + PROBE) if second else ("stage-1", PROBE)
    layers, text_layers = _depth(state, f"{at}visual."), _depth(state, at)
    plain = clip_names(layers, text_layers)
    probe = {PROBE + name for name in plain} | {f"img_frozen_fc.{leaf}" for leaf in ("weight", "bias")}
    if not second:
        _require_names(state, probe, kind, path)
        clip = {name: value.float() for name, value in _below(state, at).items()}
        _require_shapes(clip, clip_shapes(clip, path), path)
        return Release(clip, {"image": _head(state, "img_frozen_fc", path, _width(clip))}, {}, False)
    heads = {f"{name}.{leaf}" for name in ("img_fc", "text_fc") for leaf in ("weight", "bias")}
    student_names = {STUDENT + name for name in clip_names(layers, text_layers, ADAPTED)}
    _require_names(state, student_names | {PROBE + name for name in probe} | heads, kind, path)
    frozen, student = _below(state, at), _below(state, STUDENT)
    shapes = clip_shapes(frozen, path)
    _require_shapes(frozen, shapes, path)
    for name in sorted(plain):
        twin = name.replace("attn.out_proj", "attn.proj") if name.startswith("visual.") else name
        if twin not in student:
            continue
        _require_shapes(student, {twin: shapes[name]}, path)
        if not torch.equal(student[twin].float(), frozen[name].float()):
            raise UserError(f"Expected {STUDENT}{twin} in {path} to equal the frozen copy's, found another: only "
                            f"adapters and heads learn in the release.")  # fmt: skip
    adapters, merged = _adapters(student, frozen, layers, path)
    frozen = {name: value.float() for name, value in frozen.items()}
    names = {"image": "img_fc", "text": "text_fc", "teacher": f"{PROBE}img_frozen_fc"}
    return Release(frozen, {k: _head(state, v, path, _width(frozen)) for k, v in names.items()}, adapters, merged)


def _width(clip: State) -> int:
    return clip["visual.proj"].shape[1]


def open_clip_config(clip: State) -> dict[str, Any]:
    """`open_clip_config.json` for a CLIP of OpenAI's architecture, read off its tensors' shapes (heads 64 wide)."""
    width, _, _, patch = clip["visual.conv1.weight"].shape
    side = math.isqrt(len(clip["visual.positional_embedding"]) - 1) * patch
    context, text_width = clip["positional_embedding"].shape
    vision = {"image_size": side, "layers": _depth(clip, "visual."), "width": width, "patch_size": patch}
    text = {"context_length": context, "vocab_size": len(clip["token_embedding.weight"]), "width": text_width}
    model = {
        "embed_dim": _width(clip),
        "quick_gelu": True,
        "vision_cfg": {**vision, "head_width": min(64, width)},
        "text_cfg": {**text, "heads": max(text_width // 64, 1), "layers": _depth(clip, "")},
    }
    preprocess = {"size": side, "mean": list(OPENAI_DATASET_MEAN), "std": list(OPENAI_DATASET_STD)}
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def write_clip(release: Release, folder: Path) -> None:
    """The frozen CLIP as a folder that `load_clip` and open_clip read; stored as halves where those are exact."""
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(open_clip_config(release.clip), indent=1) + "\n")
    halves = {name: value.half() for name, value in release.clip.items()}
    exact = {
        name: half if torch.equal(half.float(), release.clip[name]) else release.clip[name]
        for name, half in halves.items()
    }
    save_file({name: exact[name].contiguous() for name in sorted(exact)}, folder / "open_clip_model.safetensors")
