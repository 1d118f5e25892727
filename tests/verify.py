"""make verify: run the pipeline in a copy of this repository without results, and compare with the committed ones."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROFILE = "mini"


def copy_of_the_repository(target: Path) -> None:
    """Every file git knows (as it stands here), in a repository of its own, without results and without DVC's cache."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        source = ROOT / name
        if source.is_file() and not name.startswith("results/"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
    subprocess.run(["git", "init", "--quiet"], cwd=target, check=True)
    subprocess.run(["git", "add", "--all"], cwd=target, check=True)


def main() -> int:
    """0 where the results reproduce, 1 where something moved, another code where the run failed."""
    with tempfile.TemporaryDirectory(prefix="dgs-verify-") as folder:
        target = Path(folder)
        copy_of_the_repository(target)
        # The copy's own package comes first, also in the kernels that the stages start.
        environment = {**os.environ, "PYTHONPATH": str(target)}
        for name in ("DGS_PROFILE", "DGS_OUT", "DGS_PARAMS"):
            environment.pop(name, None)
        print(f"reproducing {PROFILE} from scratch ...", file=sys.stderr, flush=True)
        # Without dvc.lock nothing can be taken for done: every stage runs.
        (target / "dvc.lock").unlink(missing_ok=True)
        subprocess.run(["dvc", "repro", "--quiet"], cwd=target, env=environment, check=True)
        compare = ["dgs", "verify", str(ROOT / "results" / PROFILE), str(target / "results" / PROFILE)]
        return subprocess.run(compare, cwd=target, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
