"""A training of more epochs goes on from the same one of fewer: rates are constant, so one is the other's beginning."""

from __future__ import annotations

from pathlib import Path

from dgs.model.snapshot import Snapshot, State

BEFORE_THE_END = 2  # steps: the last whole batch is recorded because it is the last, which a longer run would not do


class GoingOn(Snapshot):
    """Snapshots of trainings that differ in epochs alone: each begins at the last one left, and leaves its own.

    Args:
        folder: of them all, a folder in it for each length.
        steps: of this training.
        common: as in `Snapshot`.
    """

    def __init__(self, folder: Path, steps: int, common: Path | None = None) -> None:
        super().__init__(common=common)
        self.steps = steps
        self._lengths, self._leaves = folder, steps - BEFORE_THE_END

    def is_due(self) -> bool:
        """After every step; `save` keeps one of them."""
        return True

    def save(self, state: State) -> None:
        """Keep the state just before the end."""
        if state.step == self._leaves:
            self._of(state.step).save(state)

    def resume(self, state: State) -> None:
        """Begin at the longest shorter training's, or at the first step where there is none."""
        lengths = [int(folder.name) for folder in self._lengths.glob("*") if int(folder.name) <= self._leaves]
        if lengths:
            self._of(max(lengths)).resume(state)

    def _of(self, steps: int) -> Snapshot:
        return Snapshot(self._lengths / str(steps))
