"""Files of tensors as data, ours and others'; those of a checkpoint folder are hashed, and sealed by SHA256SUMS."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dgs.errors import UserError

INFO, SUMS, CARD = "dgs.json", "SHA256SUMS", "README.md"
# Under which training scripts save a state dict, and what DataParallel, torch.compile and trainers put before names.
WRAPPERS = ("model", "state_dict", "model_state_dict", "ema", "model_ema", "state_dict_ema")
PREFIXES = ("module.", "_orig_mod.", "model.")
CODE = "TorchScript archive"
FORMS = ("safetensors", "torch.save")
# No weights: a constant of the text side, which open_clip makes itself, and sizes, which shapes tell.
CONSTANTS = ("attn_mask", "input_resolution", "context_length", "vocab_size")
INDICES = ("position_ids", "num_batches_tracked")  # whole numbers beside the weights, which count tokens and batches


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
def reading(file: Path) -> Iterator[None]:
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


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError for anything else."""
    with reading(file):
        content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise damaged(file, f"expected a JSON object, found {type(content).__name__}")
    return content


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors of finite numbers. Raises UserError for anything else."""
    with reading(file):
        tensors: dict[str, Tensor] = load_file(file)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise damaged(file, f"expected finite numbers, found others in {name}")
    return tensors


def read_sums(file: Path) -> dict[str, str]:
    """What `seal` wrote: {name: sha256}. Raises UserError for anything else."""
    with reading(file):
        lines = file.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
    matches = [re.fullmatch(r"([0-9a-f]{64})  (.+)", line) for line in lines]
    if None in matches:
        raise damaged(file, "expected a sha256, two spaces and a name in each line, found another line")
    return {match[2]: match[1] for match in matches if match}


def reason_of(error: Exception) -> str:
    """The first sentence of an error, on one line; of others' errors with their kind, which may be all there is."""
    first = " ".join(str(error).split()).split(". ")[0][:200].rstrip(".")
    return first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"


def form_of(file: Path) -> str:
    """What a file is by its content: one of `FORMS`, `CODE`, or what else was found; no tensor is read."""
    with file.open("rb") as opened:
        head = opened.read(64)
    found = "torch.save" if head.startswith(b"\x80") else "another kind of file"  # a pickle: before torch 1.6
    if head.startswith(b"version https://git-lfs"):
        found = "a pointer of Git LFS (git lfs pull fetches the file itself)"
    elif head.startswith(b"PK"):
        found = _zip_form(file)
    elif head[8:9] == b"{":
        try:
            with safe_open(file, "pt"):
                found = "safetensors"
        except SafetensorError as error:
            found = f"a damaged safetensors file ({error})"
    return found


def _zip_form(file: Path) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            names = {Path(name).name for name in archive.namelist()}
    except zipfile.BadZipFile:
        return "a ZIP archive that is cut short"
    plain = "torch.save" if "data.pkl" in names else "a ZIP archive of other files"
    return CODE if "constants.pkl" in names else plain


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, by torch.save or in safetensors whatever the file's name; no code in it is ever run.

    Wrappings (`WRAPPERS`, `PREFIXES`) and `CONSTANTS` are taken off.

    Raises:
        UserError: damaged, holding anything but dense real finite tensors, or more than one state dict.
    """
    try:
        form = form_of(file)
        if form == CODE:
            raise ValueError(f"a {CODE}: it holds code")
        with file.open("rb") as opened:  # by its name torch would take it for another form
            content: Any = load_file(file) if form == "safetensors" else torch.load(opened, "cpu", weights_only=True)
    except Exception as error:  # damaged files fail in many ways
        said = f"Cannot read {file} as tensors alone ({reason_of(error)}). Other content is never loaded."
        raise UserError(said) from None
    for _ in WRAPPERS:  # one in another, and never round
        inner = _wrapped(content)
        if len(inner) > 1:
            raise UserError(f"Expected one state dict in {file}, found {' and '.join(inner)}. Save one of them alone.")
        content = next(iter(inner.values()), content)
    if not isinstance(content, Mapping):
        raise UserError(f"Expected a state dict in {file}, found {type(content).__name__}.")
    state = {str(name): value for name, value in content.items() if str(name).rpartition(".")[2] not in CONSTANTS}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise UserError(f"Expected only tensors in {file}, found {type(value).__name__} under {name!r}.")
        real = value.is_floating_point() or name.endswith(INDICES)
        if value.layout is not torch.strided or not real:
            raise UserError(f"Expected dense real tensors in {file}, found {value.dtype}, {value.layout} in {name}.")
        if not torch.isfinite(value).all():
            raise UserError(f"Expected finite numbers in {file}, found others in {name}.")
    while state and (shared := [prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in state)]):
        state = {name.removeprefix(shared[0]): value for name, value in state.items()}
    return state


def _wrapped(content: Any) -> dict[str, Any]:
    """What may be a state dict in `content`, wrapped again perhaps, by the name that it is under."""
    found = {name: content.get(name) for name in WRAPPERS} if isinstance(content, Mapping) else {}
    held = {name: inner.values() for name, inner in found.items() if isinstance(inner, Mapping)}
    return {name: found[name] for name, own in held.items() if any(isinstance(each, (Tensor, Mapping)) for each in own)}
