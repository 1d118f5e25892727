"""make verify: run the pipeline in a copy of this repository without results, and compare with the committed ones.

With seeds as arguments, those alone are run and compared.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from copies import ROOT, copy_repository

from dgs.workspace import MAIN

PROFILE = MAIN


def main(seeds: list[int]) -> int:
    """0 where the results reproduce, 1 where something moved, another code where the run failed."""
    with tempfile.TemporaryDirectory(prefix="dgs-verify-") as folder:
        # Without dvc.lock nothing can be taken for done: every stage runs.
        target = copy_repository(Path(folder), tiny=False)
        if seeds:
            params = target / "params.yaml"
            params.write_text(yaml.safe_dump({**yaml.safe_load(params.read_text()), "seeds": seeds}, sort_keys=False))
        # The copy's own package comes first, also in the kernels that the stages start.
        environment = {**os.environ, "PYTHONPATH": str(target)}
        for name in ("DGS_PROFILE", "DGS_OUT", "DGS_PARAMS"):
            environment.pop(name, None)
        print(f"reproducing {PROFILE} from scratch ...", file=sys.stderr, flush=True)
        subprocess.run(["dvc", "repro", "--quiet"], cwd=target, env=environment, check=True)
        compare = ["dgs", "verify", str(ROOT / "results" / PROFILE), str(target / "results" / PROFILE)]
        compare += [f"--seed={seed}" for seed in seeds]
        return subprocess.run(compare, cwd=target, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main([int(word) for word in sys.argv[1:]]))
