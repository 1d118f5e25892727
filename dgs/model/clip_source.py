"""What model.clip and model.pretrained stand for, found before any weight is read, for `dgs check` and for loading."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgs.errors import UserError, did_you_mean
from dgs.model.checkpoint_files import CODE, FORMS, form_of
from dgs.params import ModelParams, dotted
from dgs.workspace import no_such_clip, weights_twice

RANDOM = "random"  # model.pretrained: seeded random weights, for tests of geometry
TIMM, HUB = "timm/", "hub"  # model.clip: a model of timm's; model.pretrained: its weights, downloaded
# Names of timm's for weights that were trained with QuickGELU, as open_clip says and timm does not, and the right ones.
UNSAID = {"vit_base_patch16_clip_224.dfn2b": "ViT-B-16-quickgelu, model.pretrained: dfn2b"}
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
CONSTANTS = ("mean", "std")
USUAL_SIDE = 224  # px, open_clip's default too
NO_TEXT = {"text": "none"}  # "dgs" of a config whose folder holds the image side alone
QUICK = "-quickgelu"
NEVER_RUN = "it holds code, which is never run here."
Constants = tuple[float, ...]  # of red, green and blue


@dataclass(frozen=True)
class ClipSource:
    """Where a CLIP comes from.

    folder: its own, else None.
    config: the content of a folder's open_clip_config.json; of a name of open_clip's, "model_cfg" alone.
    weights: an open_clip tag, HUB, a file's path, RANDOM, or None for a folder.
    mean, std: normalisation constants that go with the weights.
    notes: what was assumed, since nothing says it; a sentence each.
    timm: timm's name of the model, if it is timm's alone.
    side: px of the images that the tower is for.
    """

    folder: Path | None
    config: dict[str, Any]
    weights: str | None
    mean: Constants
    std: Constants
    notes: tuple[str, ...] = ()
    timm: str | None = None
    side: int = USUAL_SIDE

    @property
    def has_text(self) -> bool:
        """False of an image tower alone."""
        return self.timm is None and self.config.get("dgs") != NO_TEXT

    @property
    def of_vision_transformer(self) -> bool:
        """Whether the config names open_clip's own vision transformer: others may be none, or of another kind."""
        vision = self.config.get("model_cfg", {}).get("vision_cfg", {})
        return self.timm is None and "timm_model_name" not in vision and not isinstance(vision.get("layers"), list)

    @property
    def text_settings(self) -> dict[str, Any]:
        """What the config says of the text side, by name: of its mask and its tokenizer no module tells."""
        text = self.config.get("model_cfg", {}).get("text_cfg")
        return dotted(text, "text_cfg.") if self.has_text and isinstance(text, dict) else {}

    def require_text(self, name: str) -> None:
        """Raise UserError, naming model.clip = `name`, unless there is a text side."""
        if not self.has_text:
            raise UserError(
                f"Expected model.clip = {name} to have a text side, found an image tower alone. "
                f"Set model.text to aligned or none."
            )

    def notes_at(self, image_size: int) -> tuple[str, ...]:
        """`notes`, and a sentence if images are given in another size than the tower is for."""
        if image_size == self.side:
            return self.notes
        said = f"Images are {image_size} px, the tower is for {self.side} px (model.image_size): its positions are"
        return (*self.notes, f"{said} interpolated.")


def find_clip(params: ModelParams, root: Path) -> ClipSource:
    """The source of the CLIP that `params` name; `root`: of relative paths.

    Raises:
        UserError: no such folder or name, no weights, a tag or a file that does not go with the name.
    """
    folder = (root / params.clip).resolve()
    if folder.is_dir():
        if params.pretrained is not None:
            raise weights_twice(params.clip, params.pretrained)
        return _folder(folder)
    return _timm(params, root) if params.clip.startswith(TIMM) else _name(params, root)


def _folder(folder: Path) -> ClipSource:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).exists():
            raise UserError(f"Expected {name} in model.clip = {folder}, found none.")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        preprocess: Any = (config.get("preprocess_cfg") or {}) if isinstance(config, dict) else None
        sound = isinstance(preprocess, dict) and isinstance(config["model_cfg"]["vision_cfg"], dict)
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        sound = False
    if not sound:
        raise UserError(
            f"Expected {folder / CONFIG} to be JSON with the groups model_cfg, with vision_cfg, and preprocess_cfg, as "
            f"open_clip writes it, found another content. Restore it."
        )
    missing = [name for name in CONSTANTS if preprocess.get(name) is None]
    constants = {name: _usual()[name] if name in missing else preprocess[name] for name in CONSTANTS}
    for name, value in constants.items():
        if not isinstance(value, (list, tuple)) or len(value) != 3 or not all(_is_share(v) for v in value):
            said = "three numbers from 0 to 1, as pixels are"
        elif name == "std" and not all(value):
            said = "three numbers above 0, which pixels are divided by"
        else:
            continue
        where = f"preprocess_cfg.{name} of {folder / CONFIG}"
        raise UserError(f"Expected {where} to be {said}, found {value!r}. Restore it.")
    notes = [
        f"{folder / CONFIG} has no preprocess_cfg.{name}; open_clip's own is assumed, {list(constants[name])}."
        for name in missing
    ]
    given = config["model_cfg"]["vision_cfg"].get("image_size", USUAL_SIDE)
    side = given[0] if isinstance(given, list) and given == given[:1] * 2 else given
    if type(side) is not int or side < 1:
        where = f"model_cfg.vision_cfg.image_size of {folder / CONFIG}"
        raise UserError(f"Expected {where} to be the side of a square in px, found {given!r}. Restore it.")
    mean, std = (tuple(constants[name]) for name in CONSTANTS)
    return ClipSource(folder, config, None, mean, std, tuple(notes), side=side)


def _usual() -> dict[str, Constants]:
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    return {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD}


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _name(params: ModelParams, root: Path) -> ClipSource:
    import open_clip

    names, name, weights = open_clip.list_models(), params.clip, params.pretrained
    if name not in names:
        raise no_such_clip(name, did_you_mean(name, names))
    if weights is None:
        raise UserError(f"Expected model.pretrained for '{name}': an open_clip tag such as openai, or a file.")
    config = open_clip.get_model_config(name)
    of_name = {"model_cfg": config}
    quick, side = bool(config.get("quick_gelu", False)), config["vision_cfg"].get("image_size", USUAL_SIDE)
    tags = open_clip.list_pretrained_tags_by_model(name)
    tag = open_clip.get_pretrained_cfg(name, weights)
    if tag:
        of_tag = bool(tag.get("quick_gelu", False))
        if of_tag and not quick:
            raise _other_activation(name, weights, quick, names)
        untold = f"open_clip's entry of '{weights}' does not name QuickGELU: it is assumed, as {name} alone says."
        notes = (untold,) if quick and not of_tag else ()
        return ClipSource(None, of_name, weights, tuple(tag["mean"]), tuple(tag["std"]), notes, side=side)
    own = [open_clip.get_pretrained_cfg(name, known) for known in tags]
    of_tags = {(tuple(known["mean"]), tuple(known["std"])) for known in own}  # of SigLIP all differ from CLIP's
    mean, std = of_tags.pop() if len(of_tags) == 1 else _usual().values()
    if weights == RANDOM:
        return ClipSource(None, of_name, weights, mean, std, side=side)
    file = root / weights
    if not file.is_file():
        raise _no_such_tag(name, weights, quick, tags)
    if form_of(file) == CODE:
        right = name if name.endswith(QUICK) else _twin(name)
        raise _no_tensors_alone(
            weights,
            f"as OpenAI publishes CLIP: {NEVER_RUN} Convert its tensors alone: dgs tower --archive {weights} "
            f"--out DIR, and set model.clip: DIR, model.pretrained: null. With network: model.clip: {right}, "
            f"model.pretrained: openai.",
        )
    other = f" (for {_activation(not quick)} set model.clip: {_twin(name)})" if _twin(name) in names else ""
    note = (
        f"{weights} does not say how it was trained: {_activation(quick)} is assumed, as {name} says{other}, and the "
        f"constants mean {list(mean)}, std {list(std)}."
    )
    return ClipSource(None, of_name, str(file), mean, std, (note,), side=side)


def _timm(params: ModelParams, root: Path) -> ClipSource:
    import timm

    name, weights = params.clip.removeprefix(TIMM), params.pretrained
    known = [TIMM + known for known in timm.list_models()]
    try:
        config = timm.get_pretrained_cfg(name, allow_unregistered=False) if timm.is_model(name) else None
    except RuntimeError:  # a tag that the architecture does not have, or none at all
        config = None
    if config is None:
        architecture, _, tag = name.partition(".")
        tags = [TIMM + tagged for tagged in timm.list_pretrained(f"{architecture}.*")] if tag else known
        raise UserError(
            f"Expected model.clip to be a model of timm's that has weights, found '{params.clip}'."
            f'{did_you_mean(params.clip, tags)} For a list: python -c "import timm; print(timm.list_pretrained())".'
        )
    if weights is None:
        raise UserError(
            f"Expected model.pretrained for '{params.clip}': {HUB}, which downloads its weights, or a safetensors file."
        )
    quick = name in UNSAID or any("QuickGELU" in note for note in config.notes or ())
    if quick and "quickgelu" not in name:
        right = UNSAID.get(name, TIMM + name.replace("_clip_", "_clip_quickgelu_"))
        raise UserError(
            f"The weights '{config.tag}' were trained with QuickGELU; '{params.clip}' loads them silently with another "
            f"activation and wrong features. Set model.clip: {right}."
        )
    mean, std = tuple(config.mean), tuple(config.std)
    if weights in (RANDOM, HUB):
        return ClipSource(None, {}, weights, mean, std, timm=name, side=config.input_size[-1])
    file = root / weights
    if not file.is_file():
        raise UserError(f"Expected model.pretrained for '{params.clip}' to be {HUB} or a file, found '{weights}'.")
    if form_of(file) == CODE:
        raise _no_tensors_alone(weights, f"{NEVER_RUN} Save the model's state_dict() as safetensors, or set {HUB}.")
    note = f"{weights} does not say how it was trained: {params.clip}'s own activation and constants are assumed."
    return ClipSource(None, {}, str(file), mean, std, (note,), name, config.input_size[-1])


def no_tower(found: str) -> UserError:
    """The image side that model.clip stands for is another network than adapters can sit on."""
    return UserError(
        f"Expected a CLIP whose image side is a vision transformer (such as ViT-L-14-quickgelu), found {found}. Choose "
        f"another model.clip."
    )


def _activation(quick: bool) -> str:
    return "QuickGELU" if quick else "GELU"


def _twin(name: str) -> str:
    """The name of the same architecture with the other activation."""
    return name.removesuffix(QUICK) if name.endswith(QUICK) else name + QUICK


def _other_activation(name: str, tag: str, quick: bool, names: list[str]) -> UserError:
    who = "OpenAI's weights were" if tag == "openai" else f"The weights '{tag}' were"
    advice = f"Set model.clip: {_twin(name)}." if _twin(name) in names else "Choose other weights."
    return UserError(
        f"{who} trained with {_activation(not quick)}; '{name}' loads them silently with another activation and wrong "
        f"features. {advice}"
    )


def _no_such_tag(name: str, tag: str, quick: bool, tags: list[str]) -> UserError:
    import open_clip

    if open_clip.get_pretrained_cfg(_twin(name), tag):
        return _other_activation(name, tag, quick, open_clip.list_models())
    known = f" Its tags: {', '.join(tags)}." if tags else " open_clip has no weights of it: give a file."
    return UserError(
        f"Expected model.pretrained to be a tag of {name} or a file, found '{tag}'.{did_you_mean(tag, tags)}{known}"
    )


def require_weights(source: ClipSource) -> None:
    """Raise UserError where a source's weights are a file that, by its form, holds no tensors."""
    file = source.folder / WEIGHTS if source.folder else Path(source.weights or "")
    if file.is_file() and (found := form_of(file)) not in FORMS:
        raise UserError(f"Expected tensors (safetensors, or a state dict by torch.save) in {file}, found {found}.")


def _no_tensors_alone(said: str, rest: str) -> UserError:
    return UserError(f"Expected tensors alone at model.pretrained = {said}, found a {CODE}, {rest}")
