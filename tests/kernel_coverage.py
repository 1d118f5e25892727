"""Kernels under `coverage run` write their data after every cell, since nbval ends them by a kill (make test)."""

from coverage import Coverage
from IPython import get_ipython


def _save(_result: object) -> None:
    current = Coverage.current()
    if current is not None:
        current.save()


get_ipython().events.register("post_run_cell", _save)
