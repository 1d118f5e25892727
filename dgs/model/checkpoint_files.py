"""The files of a checkpoint folder as data: read with the reason why not, hashed, and sealed by SHA256SUMS."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dgs.errors import UserError

INFO, SUMS, CARD = "dgs.json", "SHA256SUMS", "README.md"


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
