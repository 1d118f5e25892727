"""Checkpoints that this run did not train, such as the authors': evaluate.checkpoints, methods of one seed each."""

from __future__ import annotations

from pathlib import Path

from dgs.errors import UserError
from dgs.model.methods.registry import METHODS
from dgs.params import Params

SEED = 0  # theirs is not known, or of no meaning beside the seeds trained here
TAKEN = ("frozen",)  # what tables and figures call the CLIP itself


def outside(params: Params, root: Path) -> dict[tuple[str, int], Path]:
    """Checkpoint folders of `evaluate.checkpoints` by (name, `SEED`), in the order given.

    What is in them is checked when they are opened.

    Args:
        root: repository, for relative folders.

    Raises:
        UserError: a name that a method has, or a folder that is no checkpoint's.
    """
    found: dict[tuple[str, int], Path] = {}
    for name, given in params.evaluate.checkpoints.items():
        if name in METHODS or name in TAKEN:
            raise UserError(
                f"Expected names in evaluate.checkpoints that no method has, found {name}. Call it otherwise, for "
                f"example {name}-imported."
            )
        folder = root / given
        if not (folder / "dgs.json").is_file():
            raise UserError(
                f"Expected a checkpoint folder (with dgs.json) at evaluate.checkpoints.{name} = {given}, found none. "
                f"Mend the path, or make it: dgs import-release STEP2 --out {given}."
            )
        found[name, SEED] = folder
    return found
