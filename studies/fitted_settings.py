"""What rate and lambda do DGS and suppression alone want beside a converged text head? `dgs tune`'s search, made anew.

`python -m studies.fitted_settings` tries the same candidates with train.surgery.text_head: fitted, on validation
images, and writes results/study/fitted_settings.csv; text_heads trains with those that its rule chooses. No test image
is looked at.
"""

from __future__ import annotations

from pathlib import Path

import typer

from dgs.analysis.tuning import Candidate, chosen, tune
from dgs.commands import for_users, say
from dgs.errors import UserError
from dgs.params import load_params
from dgs.tables import read_table
from dgs.workspace import MAIN, find_root
from studies.sweep import KEPT, prepare

OUT = "results/study/fitted_settings.csv"
HEAD, METHODS = "train.surgery.text_head", ("dgs", "suppression_only")  # of those that search, what reads the head
SEED, RULE = 100, "val_balanced"  # as of the settings in params.yaml


def settings(root: Path) -> dict[str, Candidate]:
    """What the search chose for `METHODS`, and for the controls that take DGS's settings.

    Raises:
        UserError: it has not been run.
    """
    if not (root / OUT).exists():
        raise UserError(f"Expected {OUT}, found none. Run python -m studies.fitted_settings first.")
    return chosen(read_table(root / OUT), RULE)


def main() -> None:
    """Try every candidate; a search that was broken off goes on."""
    params, root = load_params(MAIN).replaced({HEAD: "fitted"}), find_root()
    folder = prepare(params, root, root / KEPT)
    for row in tune(METHODS, params, root, folder, root / OUT, [SEED]):
        say(f"{row['method']} {row['candidate']}: {RULE} {row[RULE]:.3f}")


if __name__ == "__main__":
    with for_users():
        typer.run(main)
