"""A CLIP's image tower, adapted or frozen, with its heads: kept as peft's adapter and the heads' own file.

Adapter settings are LoRA's alone, so that loading runs nothing that a folder brings.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, FiniteFloat
from safetensors.torch import save_file
from torch import Tensor, nn

from dgs.errors import UserError
from dgs.model.backbone import Backbone
from dgs.model.checkpoint_files import INFO, damaged, read_object, read_tensors, reading
from dgs.model.classifier import Classifier
from dgs.model.clip import Clip
from dgs.model.release import linear_head

if TYPE_CHECKING:
    import onnx

    from dgs.model.onnx_graph import Linear

HEADS = "heads.safetensors"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


class _Lora(BaseModel):
    """What adapter_config.json may say; other settings of peft's must be as they are by default."""

    model_config = ConfigDict(strict=True)

    peft_type: Literal["LORA"]
    r: int
    lora_alpha: FiniteFloat
    lora_dropout: FiniteFloat
    use_rslora: bool
    target_modules: list[str]
    layers_to_transform: list[int] | None
    layers_pattern: Literal["resblocks", "blocks"] | None


# Neither in _Lora nor of any effect on what is computed.
REMARKS = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}


class ClipClassifier(Classifier):
    """The tower's features and the image head on them.

    heads: by name; "image" decides, "text" and "teacher" are there where the method has them. Without any it has
        features alone.
    """

    kind = "clip"
    int8 = of_clip = True

    def __init__(self, clip: Clip, backbone: Backbone, heads: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        self.clip, self.backbone, self.heads = clip, backbone, dict(heads)
        self.head = heads.get("image")

    @property
    def is_tuned(self) -> bool:
        """True if the tower has adapters."""
        return isinstance(self.backbone.visual, PeftModel)

    @property
    def shared(self) -> Hashable | None:  # type: ignore[override]  # all frozen towers that are read alike
        return None if self.is_tuned else self.backbone.levels

    def features(self, images: Tensor) -> Tensor:
        """As `Classifier.features`."""
        return self.backbone(images).float()

    def decide(self, features: Tensor) -> Tensor:
        """As `Classifier.decide`."""
        assert self.head is not None
        return self.head(features).squeeze(1)

    @property
    def width(self) -> int:
        """As `Classifier.width`."""
        return self.backbone.widths[1]

    @property
    def device(self) -> torch.device:
        """As `Classifier.device`."""
        return self.backbone.mean.device

    @classmethod
    def files(cls, info: Mapping[str, Any]) -> list[str]:
        """As `Classifier.files`."""
        return [HEADS, *(ADAPTER if info["adapter"] else ())]

    def about(self) -> dict[str, Any]:
        """As `Classifier.about`."""
        return {"adapter": self.is_tuned, "levels": list(self.backbone.levels)}

    def save(self, folder: Path) -> None:
        """As `Classifier.save`."""
        if self.is_tuned:
            self.backbone.visual.save_pretrained(str(folder))
            config = folder / ADAPTER[0]  # peft writes a set in the order of this process's hash seed
            settings = json.loads(config.read_text())
            settings["target_modules"] = sorted(settings["target_modules"])
            settings["auto_mapping"] = None  # a module that peft's AutoPeftModel would import
            config.write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
        tensors = {
            f"{name}_head.{key}": value for name, head in self.heads.items() for key, value in head.state_dict().items()
        }
        save_file({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}, folder / HEADS)

    @classmethod
    def load(cls, folder: Path, info: Mapping[str, Any], clip: Clip | None) -> ClipClassifier:
        """As `Classifier.load`; `clip.model.visual` carries the adapters until `close`."""
        assert clip is not None
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
        return cls(clip, backbone, heads).eval()

    def onnx(self, side: int, linear: Linear) -> onnx.ModelProto:
        """As `Classifier.onnx`."""
        from dgs.model.onnx_graph import build

        assert self.head is not None
        return build(self.backbone, self.head, linear)

    def in_float32(self) -> ClipClassifier:
        """As `Classifier.in_float32`."""
        self.backbone.precision = torch.float32
        return self

    def close(self) -> None:
        """As `Classifier.close`: the adapters come off."""
        assert self.clip is not None
        self.clip.model.visual = self.backbone.without_adapters()


def load_heads(folder: Path) -> dict[str, nn.Linear]:
    """The heads of a checkpoint, by name ("image" always; "text", "teacher"), each D -> 1.

    Raises:
        UserError: heads.safetensors is missing or damaged, or has no image head.
    """
    file = folder / HEADS
    tensors = read_tensors(file)
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


def _lora_config(file: Path) -> LoraConfig:
    """adapter_config.json, if it is plain LoRA: some of peft's settings would import a module that they name."""
    settings = read_object(file)
    with reading(file):
        _Lora.model_validate(settings)
    known, usual = set(_Lora.model_fields), LoraConfig().to_dict()
    for name in sorted(set(settings) - known - REMARKS):
        if settings[name] and settings[name] != usual.get(name):
            raise damaged(file, f"expected plain LoRA, found {name} = {settings[name]!r}")
    return LoraConfig(**{name: settings[name] for name in known - {"peft_type"}})


def _load_adapter(visual: nn.Module, folder: Path) -> PeftModel:
    # peft asks the hub for a file that is not here, and only warns of weights that fit no adapter: both are errors.
    config, file = (folder / name for name in ADAPTER)
    weights = read_tensors(file)
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
