"""Exported detectors: one ONNX file, read as data and run by ONNX Runtime on the CPU.

A file is refused before it reaches the runtime unless it holds standard operators out of `OPERATORS` and its own
constants alone, so that it can run no code and read no other file; and unless its bytes have the hash that it carries.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from dgs.errors import UserError
from dgs.model.gemm import CPUINFO

if TYPE_CHECKING:
    import onnx

FORMAT = 1
KEY, SEAL = "dgs", "dgs_sha256"  # of the file's metadata: what dgs.json of a checkpoint says; the hash of the rest
UNSEALED = "0" * 64  # stands for the hash while it is taken
MAX_FILE = 2**31 - 1  # bytes, of an ONNX file in one piece
AT_A_TIME = 2  # images: what is computed between two layers stays in the cache
MADE_UP = 4  # views that a file is tried with when it is opened
ENOUGH = 0.99  # verdicts that equal the checkpoint's; below, every start says so
OPERATORS = frozenset(
    """Add AveragePool Cast Clip Concat Conv DequantizeLinear Div Expand Gather Gelu Gemm LayerNormalization MatMul Max
    Mul Pad QuantizeLinear ReduceMax ReduceMean ReduceMin ReduceSum Relu Reshape Shape Sigmoid Slice Softmax Split Sqrt
    Squeeze Sub Transpose Unsqueeze""".split()  # noqa: SIM905  # four lines rather than thirty
)
PLAIN = ("FLOAT", "INT", "STRING", "FLOATS", "INTS", "STRINGS")  # kinds of attributes: no graphs, no tensors


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class Agreement(_Strict):
    """How an exported file does beside its checkpoint.

    images: how many it was measured on. validation: of the run that made the checkpoint; else made up.
    verdicts: share of them that are equal. largest: difference of two logits. auroc: of the file minus of the
    checkpoint; None without labels.
    """

    images: Annotated[int, Field(ge=1)]
    validation: bool
    verdicts: FiniteFloat
    largest: FiniteFloat
    auroc: FiniteFloat | None


class Export(_Strict):
    """What a file says of its making.

    precision: of the layers of the blocks. checkpoint_sha256: of the checkpoint's SHA256SUMS (format 2: dgs.json).
    made_up: the checkpoint's logits of `made_up` views. tolerance: how far from them the file's may be.
    """

    precision: Literal["float32", "int8"]
    checkpoint_sha256: str
    agreement: Agreement
    made_up: list[FiniteFloat]
    tolerance: FiniteFloat


class _Record(_Strict):
    """What a file's metadata must hold to be of use; the rest is for people."""

    export: Export
    params: dict[str, Any]
    thresholds: Annotated[dict[str, FiniteFloat], Field(min_length=1)]


def require_extra() -> None:
    """Raise UserError unless onnx and onnxruntime can be imported."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"Expected onnx and onnxruntime for exported detectors, found that one cannot be imported ({error}). "
            f"Install them from the root of the repository: pip install -e '.[fast]'."
        ) from None


def made_up(side: int, count: int = MADE_UP) -> NDArray[np.uint8]:
    """(count, side, side, 3) views that are the same everywhere: coloured noise, finer from one to the next."""
    rng, views = np.random.default_rng(0), np.empty((count, side, side, 3), np.uint8)
    for number in range(count):
        cells = -(-side // 2 ** (4 - number % 5))
        coarse = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        views[number] = coarse.repeat(-(-side // cells), 0).repeat(-(-side // cells), 1)[:side, :side]
    return views


def sealed(model: onnx.ModelProto, info: dict[str, Any]) -> bytes:
    """The bytes of a file that `read_export` takes: the model with `info` and a hash over both."""
    from onnx import helper

    helper.set_model_props(model, {KEY: json.dumps(info, sort_keys=True), SEAL: UNSEALED})
    data = model.SerializeToString(deterministic=True)
    return data.replace(UNSEALED.encode(), hashlib.sha256(data).hexdigest().encode())


def _not_ours(file: Path, found: str) -> UserError:
    return UserError(
        f"Expected a file made by dgs export at {file}, found {found}. Make one: dgs export CHECKPOINT --out FILE.onnx."
    )


def damaged_export(file: Path, reason: str) -> UserError:
    """What is wrong with an exported file, and what to do about it, in one sentence."""
    reason = " ".join(reason.split())[:300]
    return UserError(f"{file}: {reason}. The exported file is damaged: make it again with dgs export.")


def _strange(model: onnx.ModelProto) -> str | None:
    """The first thing in a model that an exported one does not have."""
    from onnx import AttributeProto, TensorProto

    graph = model.graph
    if (
        model.functions
        or model.training_info
        or graph.sparse_initializer
        or {o.domain for o in model.opset_import} != {""}
    ):
        return "functions, training or operators of its own"
    for node in graph.node:
        if node.domain or node.op_type not in OPERATORS:
            return f"the operator {node.domain}.{node.op_type}".replace(" .", " ")[:80]
        if any(AttributeProto.AttributeType.Name(each.type) not in PLAIN for each in node.attribute):
            return f"a graph or a tensor within an operator {node.op_type}"
    if any(each.external_data or each.data_location != TensorProto.DEFAULT for each in graph.initializer):
        return "numbers that lie in another file"
    ends = [[(v.name, v.type.tensor_type.elem_type) for v in values] for values in (graph.input, graph.output)]
    if ends != [[("views", TensorProto.UINT8)], [("logits", TensorProto.FLOAT)]]:
        return "other inputs or outputs than views and logits"
    return None


def read_export(path: str | Path) -> tuple[dict[str, Any], bytes]:
    """An exported file, checked: what it says (as dgs.json of a checkpoint, and "export": `Export`), and its bytes.

    Raises:
        UserError: no file, no ONNX, not from `dgs export`, of another format, damaged, more than plain operators.
    """
    require_extra()
    import onnx

    file = Path(path)
    try:
        if file.is_dir():
            raise _not_ours(file, "a folder")
        if file.stat().st_size > MAX_FILE:
            raise _not_ours(file, "one over 2 GB")
        data = file.read_bytes()
        model = onnx.ModelProto.FromString(data)
        said = {each.key: each.value for each in model.metadata_props}
        info = json.loads(said[KEY])
        version = info["format"]
    except OSError as error:
        raise _not_ours(file, f"that it cannot be read ({error.strerror or error})") from None
    except UserError:
        raise
    except Exception:  # protobuf's errors on foreign bytes, another model's metadata
        raise _not_ours(file, "another kind of file") from None
    if version != FORMAT:
        raise UserError(
            f"Expected an exported file of format {FORMAT} in {file}, found {version!r}. Make it again with dgs export."
        )
    seal = said.get(SEAL, "")
    unsealed = data.replace(seal.encode(), UNSEALED.encode()) if re.fullmatch(r"[0-9a-f]{64}", seal) else b""
    if hashlib.sha256(unsealed).hexdigest() != seal:
        raise damaged_export(file, "its content is not what was written")
    if strange := _strange(model):
        raise damaged_export(file, f"expected plain operators and their numbers, found {strange}")
    try:
        _Record.model_validate(info)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise damaged_export(file, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return info, data


class OnnxTower:
    """An exported model in memory: the same numbers from the same views, whatever other views they come with."""

    def __init__(self, model: bytes) -> None:
        """Threads are as many as torch's at this moment; raises what ONNX Runtime raises."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        options.use_deterministic_compute = True
        options.log_severity_level = 3
        if "vnni" not in (CPUINFO.read_text() if CPUINFO.exists() else ""):
            # Such an x86 processor adds 8-bit products in 16 bits, which overflow, unless told to take an exact way.
            # That one is several times slower, and a processor with VNNI would take it too.
            options.add_session_config_entry("session.x64quantprecision", "1")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # other threads decode images
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def logits(self, views: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(B, S, S, 3) uint8 views to (B,) logits."""
        parts = [views[start : start + AT_A_TIME] for start in range(0, len(views), AT_A_TIME)]
        return np.concatenate([self._session.run(["logits"], {"views": part})[0] for part in parts])


def open_tower(model: bytes, info: dict[str, Any], side: int, path: str | Path) -> OnnxTower:
    """The model of an exported file, tried: made-up views get the logits that the checkpoint gave them.

    Args:
        model, info: as from `read_export`.
        side: of a view, px.
        path: how an error calls the file.

    Raises:
        UserError: the runtime does not take the model, or computes something else on this processor.
    """
    export = Export.model_validate(info["export"])
    try:
        tower = OnnxTower(model)
        away = float(np.abs(tower.logits(made_up(side)) - np.array(export.made_up, np.float32)).max())
    except Exception as error:  # the runtime's errors have no common class of their own
        raise damaged_export(Path(path), f"ONNX Runtime refuses it ({type(error).__name__}: {error})") from None
    if not away <= export.tolerance:
        raise UserError(
            f"Expected {path} to give its checkpoint's logits within {export.tolerance:.2g}, found {away:.2g} on this "
            f"processor. Make it again here with dgs export, or score with --engine torch."
        )
    return tower


def caution(info: dict[str, Any]) -> str | None:
    """What to say before an exported file is used whose verdicts often differ from the checkpoint's; None: nothing."""
    found = Export.model_validate(info["export"]).agreement if "export" in info else None
    return None if found is None or found.verdicts >= ENOUGH else described(found)


def described(found: Agreement) -> str:
    """A sentence on how a file agrees with its checkpoint."""
    order = "" if found.auroc is None else f", AUROC {100 * found.auroc:+.2f} points"
    return (
        f"{100 * found.verdicts:.1f} % of verdicts equal the checkpoint's on {found.images} "
        f"{'validation images' if found.validation else 'made-up images'}; largest difference of logits "
        f"{found.largest:.2g}{order}"
    )
