"""OpenAI's own CLIP files (`ViT-B-32.pt`, TorchScript: tensors with code) as an open_clip folder, without that code."""

from __future__ import annotations

import math
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgs.atomic import replacing
from dgs.errors import UserError
from dgs.model.checkpoint_files import CONSTANTS
from dgs.model.release import Release, expected_clip, write_clip

DTYPES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
          "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
          "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
          "BoolStorage": torch.bool}  # fmt: skip
GIVEN = ("INT", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "STRING", "BINUNICODE", "GLOBAL")
MODULE, TENSOR, ORDERED = "__torch__", "torch._utils _rebuild_tensor_v2", "collections OrderedDict"
JIT = "torch.jit._pickle "
LISTS = tuple(f"{JIT}build_{of}list" for of in ("int", "double", "bool", "tensor"))
WRAPPED = (*LISTS, f"{JIT}restore_type_tag", "torch device")  # what is called on a value that says it all
MOST = 10_000_000  # bytes of data.pkl; OpenAI's have less than a tenth


class _Module:
    """Stands for an instance of any class of the archive: it holds what was kept of it, and can do nothing."""

    state: Any = None


class _Reader:
    """Reads an archive's data.pkl as data: a list of opcodes, in which names are words and nothing is looked up."""

    def __init__(self, archive: zipfile.ZipFile, data: str) -> None:
        self.archive, self.data, self.folder = archive, data, data.removesuffix(".pkl")
        stored = [entry for entry in archive.infolist() if entry.compress_type == zipfile.ZIP_STORED]
        self.left = 2 * sum(entry.file_size for entry in stored)  # bytes that tensors may have
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[Any, Any] = {}

    def read(self) -> Any:
        """What it says: modules, tensors, and dicts, lists and tuples of them.

        Raises:
            Exception: it says anything else; such a file fails in many ways.
        """
        entry = self.archive.getinfo(self.data)
        if entry.file_size > MOST:
            raise ValueError(f"{self.data} is larger than {MOST} bytes")
        opcodes = self._opcodes()
        for opcode, given, _ in pickletools.genops(self.archive.read(entry)):
            if opcode.name == "STOP":
                break
            if opcode.name not in opcodes:
                raise ValueError(f"it has the opcode {opcode.name}")
            opcodes[opcode.name](given)
        return self.stack.pop()

    def _opcodes(self) -> dict[str, Callable[[Any], object]]:
        """What each opcode that such an archive may have does with the value that it brings."""
        push, pop, last, marked = self.stack.append, self.stack.pop, self._last, self._marked
        return {
            **dict.fromkeys(GIVEN, push),
            "PROTO": lambda _: None,
            "NONE": lambda _: push(None),
            "NEWTRUE": lambda _: push(True),
            "NEWFALSE": lambda _: push(False),
            "EMPTY_TUPLE": lambda _: push(()),
            "EMPTY_LIST": lambda _: push([]),
            "EMPTY_DICT": lambda _: push({}),
            "MARK": lambda _: self.marks.append(len(self.stack)),
            "TUPLE": lambda _: push(tuple(marked())),
            "TUPLE1": lambda _: push(tuple(last(1))),
            "TUPLE2": lambda _: push(tuple(last(2))),
            "TUPLE3": lambda _: push(tuple(last(3))),
            "APPEND": lambda _: self._add(last(1)),
            "APPENDS": lambda _: self._add(marked()),
            "SETITEM": lambda _: self._set(last(2)),
            "SETITEMS": lambda _: self._set(marked()),
            **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda key: self.memo.update({key: self.stack[-1]})),
            **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda key: push(self.memo[key])),
            "BINPERSID": lambda _: push(self._storage(pop())),
            **dict.fromkeys(("NEWOBJ", "REDUCE"), lambda _: push(self._made(*last(2)))),
            "BUILD": lambda _: self._keep(pop()),
        }

    def _last(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _marked(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _add(self, items: list[Any]) -> None:
        self.stack[-1].extend(items)

    def _set(self, items: list[Any]) -> None:
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _keep(self, state: Any) -> None:
        if not isinstance(self.stack[-1], _Module):
            raise ValueError("it sets what is no module")
        self.stack[-1].state = state

    def _made(self, what: Any, arguments: Any) -> Any:
        if isinstance(what, str) and what.split()[0].split(".")[0] == MODULE:
            return _Module()
        if what in WRAPPED and arguments:
            return arguments[0]
        if what == TENSOR:
            return self._tensor(*arguments)
        if what == ORDERED and not arguments:
            return {}
        raise ValueError(f"it names {what}")

    def _storage(self, key: Any) -> Tensor:
        _, storage, number, _, count = key
        entry, dtype = self.archive.getinfo(f"{self.folder}/{int(number)}"), DTYPES[storage.removeprefix("torch ")]
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"storage {number} is compressed")
        if entry.file_size != count * dtype.itemsize:
            raise ValueError(f"storage {number} has another size than it says")
        return (
            torch.frombuffer(bytearray(self.archive.read(entry)), dtype=dtype) if count else torch.empty(0, dtype=dtype)
        )

    def _tensor(self, storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
        if math.prod(size) > storage.numel():  # by strides of 0, of any size
            raise ValueError("a tensor is larger than its storage")
        self.left -= math.prod(size) * storage.element_size()
        if self.left < 0:  # by one storage in many tensors
            raise ValueError("its tensors are larger than the file")
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
            read = _Reader(archive, data).read()
            if not isinstance(read, _Module):
                raise ValueError("it holds no module: tensors alone are for model.pretrained as they are")
            return dict(_tensors(read, set()))
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
