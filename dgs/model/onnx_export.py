"""`dgs export`: a checkpoint as one ONNX file that `dgs score --engine onnx` takes, checked against the checkpoint."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgs.atomic import replacing_file
from dgs.data.images import decode
from dgs.data.prepared import load_training
from dgs.data.views import EVALUATION, make_view
from dgs.errors import UserError
from dgs.model import onnx_engine
from dgs.model.checkpoint import deciding_rule, read_info
from dgs.model.checkpoint_files import INFO, SUMS, file_hash
from dgs.model.detector import USED, Detector, TorchTower, View
from dgs.model.onnx_engine import Agreement, Export, OnnxTower, made_up
from dgs.stats import Scored, area_under_roc
from dgs.workspace import Workspace, find_root

EXACT = (
    1e-4  # how far a float32 file's logits may be from the checkpoint's, or that share of the largest if it is over 1
)
LEAST = 0.9  # verdicts of an 8-bit file that must equal the checkpoint's
IMAGES = 500  # of validation, at most, that a file is compared on
RECORDED = (
    "kind", "method", "seed", "clip", "levels", "preprocessing", "thresholds", "calibration", "calibration_map",
    "validation_logits", "selfcheck", "data_hash",
)  # fmt: skip
BATCH = 16


def export_checkpoint(
    checkpoint: Path, out: Path, int8: bool = False, root: Path | None = None
) -> tuple[dict[str, Any], str]:
    """Write a checkpoint folder as one ONNX file, whole or not at all.

    Args:
        out: the file, *.onnx; one that is there is replaced.
        int8: the layers of the blocks multiply in 8 bits: faster, and some verdicts differ.
        root: where a relative CLIP folder and the run's prepared images are looked up (default: the repository).

    Returns:
        {"out", "precision", "bytes", and what `Agreement` has}, and a sentence for people.

    Raises:
        UserError: as `Detector.load`; no extra; a tower of another kind or too large for one file; none of the layers
            that 8 bits are for; a file that does not agree with the checkpoint (it is not left).
    """
    onnx_engine.require_extra()
    from dgs.model.onnx_graph import float_linear, int8_linear

    if out.suffix != ".onnx" or out.is_dir():
        raise UserError(f"Expected --out to name a file *.onnx, found {out}. Choose another name.")
    info = read_info(checkpoint)
    _, threshold = deciding_rule(info, checkpoint)
    detector = Detector.load(checkpoint, root, device="cpu")
    tower, side = detector.tower, detector.params.image_size
    assert isinstance(tower, TorchTower)
    classifier = tower.classifier.in_float32()  # as a file computes, whatever the checkpoint does on a GPU
    if int8 and not classifier.int8:
        raise UserError(
            f"Expected --int8 for a checkpoint with a transformer, whose layers 8 bits make faster, found the kind "
            f"{classifier.kind} in {checkpoint}. Leave --int8 out."
        )
    found = _validation(detector, info, root)
    views, labels = found or (made_up(side, 64), None)
    tried = made_up(side)
    expected, own = _logits(tower, views), tower.logits(tried)
    model = classifier.onnx(side, float_linear)
    if model.ByteSize() > onnx_engine.MAX_FILE:
        raise UserError(f"Expected a checkpoint that fits into one ONNX file of 2 GB, found {checkpoint}.")
    agreement = _agreement(expected, _logits(OnnxTower(model.SerializeToString()), views), threshold, labels)
    exact = EXACT * max(1.0, float(np.abs(expected).max()))
    if not agreement.largest <= exact:
        raise _disagrees(checkpoint, f"logits within {exact:.2g}", f"{agreement.largest:.2g}")
    tolerance = 10 * exact
    if int8:
        model = classifier.onnx(side, int8_linear)
        runs = OnnxTower(model.SerializeToString())
        agreement = _agreement(expected, _logits(runs, views), threshold, labels)
        tolerance += 2 * max(agreement.largest, float(np.abs(runs.logits(tried) - own).max()))
        if not agreement.verdicts >= LEAST:
            raise _disagrees(checkpoint, f"{100 * LEAST:.0f} % of verdicts equal", f"{100 * agreement.verdicts:.1f} %")
    said = Export(
        precision="int8" if int8 else "float32",
        checkpoint_sha256=file_hash(checkpoint / (SUMS if (checkpoint / SUMS).exists() else INFO)),
        agreement=agreement,
        made_up=own.tolist(),
        tolerance=tolerance,
    )
    used = {name: info["params"][name] for name in USED if name in info["params"]}
    kept = {name: info[name] for name in RECORDED if name in info}
    whole = {**kept, "format": onnx_engine.FORMAT, "params": used, "export": said.model_dump()}
    with replacing_file(out) as draft:
        draft.write_bytes(onnx_engine.sealed(model, whole))
        Detector.load(draft, engine="onnx")  # as it will be read
    size = out.stat().st_size
    text = f"{out}: {said.precision}, {size / 1e6:.1f} MB; {onnx_engine.described(agreement)}"
    return {"out": str(out), "precision": said.precision, "bytes": size, **agreement.model_dump()}, text


def _disagrees(checkpoint: Path, expected: str, found: str) -> UserError:
    return UserError(
        f"Expected the ONNX form of {checkpoint} to agree with it ({expected}), found {found}. No file was written: "
        f"score with --engine torch."
    )


def _logits(tower: TorchTower | OnnxTower, views: View) -> NDArray[np.float32]:
    return np.concatenate([tower.logits(views[start : start + BATCH]) for start in range(0, len(views), BATCH)])


def _validation(detector: Detector, info: dict[str, Any], root: Path | None) -> tuple[View, NDArray[np.int64]] | None:
    """Views and labels of the images that the run was validated on, if it was prepared here and they are still there.

    The first `IMAGES` by hash. None: the profile was prepared with other images, or not at all.
    """
    params = detector.params
    with suppress(UserError, OSError, KeyError, ValueError):
        home = root or find_root()
        prepared = load_training(
            Workspace(home, home / "scratch", params.profile).find("prepare", made_by="prepare"), home
        )
        rows = prepared.split("val").sort_values("sha256").head(IMAGES)
        if prepared.info["training_hash"] == info["data_hash"] and len(rows):
            views = [
                make_view(
                    decode(prepared.source.read(file, row), file),
                    sha,
                    params,
                    0,
                    EVALUATION,
                    None if prepared.patches is None else prepared.patches[sha],
                )
                for file, row, sha in rows[["file", "row", "sha256"]].itertuples(index=False, name=None)
            ]
            return np.stack(views), rows["label"].to_numpy(np.int64)
    return None


def _agreement(
    expected: NDArray[np.float32], found: NDArray[np.float32], threshold: float, labels: NDArray[np.int64] | None
) -> Agreement:
    """(N,) logits of a file beside the checkpoint's, at the threshold of its verdicts."""
    exact, other = expected.astype(np.float64), found.astype(np.float64)
    order = None
    if labels is not None and len(set(labels.tolist())) == 2:
        order = area_under_roc(Scored.of(labels, other)) - area_under_roc(Scored.of(labels, exact))
    return Agreement(
        images=len(exact),
        validation=labels is not None,
        verdicts=float(np.mean((exact > threshold) == (other > threshold))),
        largest=float(np.abs(exact - other).max()),
        auroc=order,
    )
