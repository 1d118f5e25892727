"""dgs on the command line: thin shells over the package, by what they are about."""

from __future__ import annotations

import io
import sys

from dgs.commands import app, detectors, images, research, stages

__all__ = ["app", "detectors", "images", "main", "research", "stages"]


def main() -> None:
    """Entry point of the console script; file names that stdout cannot encode are printed escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    app()


if __name__ == "__main__":
    main()
