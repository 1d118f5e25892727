"""OpenAI's own CLIP files (`ViT-B-32.pt`, TorchScript: tensors with code) as an open_clip folder, without that code."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgs.atomic import replacing
from dgs.errors import UserError
from dgs.model.release import Release, expected_clip, write_clip

DTYPES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "DoubleStorage": torch.float64,
          "LongStorage": torch.int64, "IntStorage": torch.int32, "BoolStorage": torch.bool}  # fmt: skip
# No weights: a constant of the text side, which open_clip makes itself, and sizes, which shapes tell.
CONSTANTS = ("attn_mask", "input_resolution", "context_length", "vocab_size")


class _Module:
    """Stands for every class of the archive: it holds what was kept of an instance, and can do nothing."""

    state: Any = None

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    """Reads an archive's data.pkl; the only names that it knows are of `_Module`, of tensors and of their storages."""

    def __init__(self, archive: zipfile.ZipFile, data: str) -> None:
        super().__init__(archive.open(data))
        self.archive, self.folder = archive, data.removesuffix(".pkl")

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        known = {("torch._utils", "_rebuild_tensor_v2"): _tensor, ("collections", "OrderedDict"): OrderedDict}
        known |= {("torch", storage): storage for storage in DTYPES}
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return known[module, name]

    def persistent_load(self, key: Any) -> Tensor:
        _, storage, number, _, count = key
        entry, dtype = self.archive.getinfo(f"{self.folder}/{int(number)}"), DTYPES[storage]
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != count * dtype.itemsize:
            raise pickle.UnpicklingError(f"storage {number} has another size than it says")
        return torch.frombuffer(bytearray(self.archive.read(entry)), dtype=dtype)


def _tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    if math.prod(size) > storage.numel():  # by strides of 0, of any size
        raise pickle.UnpicklingError("a tensor is larger than its storage")
    return torch.as_strided(storage, size, stride, offset).clone()


def _tensors(module: _Module, seen: set[int], path: str = "") -> Iterator[tuple[str, Tensor]]:
    seen.add(id(module))
    for name, value in module.state.items() if isinstance(module.state, dict) else ():
        if isinstance(value, Tensor):
            yield f"{path}{name}", value
        elif isinstance(value, _Module) and id(value) not in seen:
            yield from _tensors(value, seen, f"{path}{name}.")


def read_archive(path: Path) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive by their names in its modules; none of its code is read.

    Raises:
        UserError: no such archive, a damaged one, or one that names anything but modules and tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (data,) = (name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
            return dict(_tensors(_Reader(archive, data).load(), set()))
    except FileNotFoundError:
        raise UserError(f"Expected OpenAI's file of a CLIP at {path}, found none.") from None
    except Exception as error:  # what is no such archive, or a damaged one, fails in many ways
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"Cannot read {path} as a TorchScript archive of tensors alone ({reason}).") from None


def convert_archive(path: Path, out: Path) -> dict[str, Any]:
    """Write OpenAI's CLIP in `path` as the new folder `out`, for model.clip: QuickGELU, OpenAI's constants, float32.

    Returns:
        {"out", "tensors", "numbers"}.

    Raises:
        UserError: as `read_archive`; another architecture than OpenAI's vision transformers; `out` is there already.
    """
    if out.exists():
        raise UserError(f"Expected --out to name a new folder, found {out}. Choose another name.")
    read = read_archive(path)
    state = {name: value.float() for name, value in read.items() if name.rpartition(".")[2] not in CONSTANTS}
    expected = expected_clip(state, path)
    for name in sorted({*expected, *state}):
        there, found = (tuple(side[name].shape) if name in side else "none" for side in (expected, state))
        if there != found:
            raise UserError(
                f"Expected {name} of shape {there} in {path}, as in a vision transformer of OpenAI's, found {found}."
            )
    with replacing(out) as draft:
        write_clip(Release(state, {}, {}, False), draft)
    numbers = sum(value.numel() for value in state.values())
    return {"out": str(out), "tensors": len(state), "numbers": numbers}
