"""Run another commit and this tree side by side and compare what they make, bit for bit: `tests/golden.py e3e5101`.

Both run the notebooks of the four stages in a copy of their own, each with its own package and params.yaml, and with
the same few values laid over them. Compared are checkpoint tensors, scores, tables and metrics.json, by name; columns
and keys that one side alone has are listed. Nothing is stored: whatever the machine, both sides ran on it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from copies import ROOT, copy_repository
from PIL import Image
from safetensors.numpy import load_file

# One method for each mechanism that a method can have.
METHODS = [
    *("probe", "lora", "dgs", "poe_distillation", "leace", "dgs_plus", "shuffled_captions", "levels_distillation"),
    *("weighed_lora", "wise_ft", "l2_sp", "pcgrad", "prograd", "effort"),
]
TINY: dict[str, Any] = {
    "methods": METHODS,
    "seeds": [0],
    "data": {"root": "sample", "limit": 16},
    "model": {"clip": "sample/clip"},
    "train": {"stage1": {"epochs": 2}, "stage2": {"epochs": 1}, "log_every": 1},
    "compute": {"jobs": 1},
    "evaluate": {
        "retrieval_pool": 8,
        "tsne_images": 8,
        "robustness": {"conditions": ["jpeg:75", "blur:1", "resize:0.5", "noise:4", "png"]},
    },
}
# Folders of images with captions made from their names, patch selection, and numbers that TINY leaves as they are.
FOLDERS: dict[str, Any] = {
    **TINY,
    "methods": ["lora", "dgs", "dgs_plus"],
    "data": {"layout": "folders", "rho": None, "val_fraction": 0.3, "limit": None},
    "patches": {"enabled": True, "size": 8, "count": 49},
    "model": {
        "normalize": "imagenet",
        "lora": {"rank": 3, "dropout": 0.2, "rslora": False, "blocks": [1]},
    },
    "train": {
        "batch_size": 8,
        "accumulate": 2,
        "views": 2,
        "stage1": {"epochs": 3, "lr": 0.004},
        "stage2": {"epochs": 3, "lr": 0.002},
        "surgery": {"order": "paper", "scale": "per_sample"},
        "log_every": 2,
    },
    "evaluate": {"retrieval_pool": 8, "tsne_images": 8},
}
MINI: dict[str, Any] = {"seeds": [0], "data": {"root": "sample"}, "model": {"clip": "sample/clip"}}
COMPARED = ("*.safetensors", "*.parquet", "*.csv", "*/metrics.json")
# What both sides must have; other files may go or come.
REQUIRED = (
    "*/seed-?/*.safetensors",
    "*/scores.parquet",
    "*/detection.csv",
    "*/forgetting.csv",
    "*/gradient_*.csv",
    "*/metrics.json",
)


def merged(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """`base` with the overlay's values in place of its own, group by group."""
    result = dict(base)
    for key, value in overlay.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if nested else value
    return result


def cells_of(notebook: Path) -> Iterator[tuple[str, bool]]:
    """The code cells of a notebook, and whether each is the one of parameters."""
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            yield "".join(cell["source"]), "parameters" in cell["metadata"].get("tags", [])


def run_notebooks(methods: list[str]) -> None:
    """The four stages in one interpreter, in the current folder: what papermill does, without a kernel a stage."""
    from IPython.core.interactiveshell import InteractiveShell

    fork = multiprocessing.get_context("fork")  # seeds train in processes, which need not import everything anew
    multiprocessing.get_context = lambda method=None: fork  # type: ignore[assignment]
    shell = InteractiveShell.instance(colors="nocolor")
    trained: list[tuple[str, dict[str, str]]] = [("train", {"method": method}) for method in methods]
    for stage, parameters in [("prepare", {}), *trained, ("evaluate", {}), ("gradient_angles", {})]:
        print(stage, *parameters.values(), flush=True)
        shell.reset()
        sys.modules["__main__"].__spec__ = None  # it is IPython's; processes that start look for one
        for source, holds_parameters in cells_of(Path("notebooks", f"{stage}.ipynb")):
            shell.run_cell(source, store_history=True).raise_error()
            if holds_parameters and parameters:
                lines = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
                shell.run_cell(f"# Parameters\n{lines}", store_history=True).raise_error()


def start(code: Path, overlay: dict[str, Any], out: Path) -> subprocess.Popen[bytes]:
    """Run the stages with the code in a folder, results into `out`; its log is `out`/log.txt."""
    out.mkdir(parents=True)
    params = merged(yaml.safe_load((code / "params.yaml").read_text()), overlay)
    (out / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DGS_")}
    environment |= {
        "PYTHONPATH": str(code),
        "DGS_PARAMS": str(out / "params.yaml"),
        "DGS_OUT": str(out),
        "MPLBACKEND": "agg",
        "IPYTHONDIR": str(out / "ipython"),
    }
    with (out / "log.txt").open("wb") as log:
        command = [sys.executable, __file__, "--stages-of", *params["methods"]]
        return subprocess.Popen(command, cwd=code, env=environment, stdout=log, stderr=subprocess.STDOUT)


def bits(values: Any) -> Any:
    """An array in which equal means the same bits: floats as the integers of their bytes, the rest as text."""
    if isinstance(values, np.ndarray) and values.dtype.kind == "f":
        return np.ascontiguousarray(values).view(f"i{values.dtype.itemsize}")
    return np.array([repr(value) for value in values])


def differing(name: str, old: Any, new: Any) -> Iterator[str]:
    """Sentences on how a column or a tensor differs."""
    if old.dtype != new.dtype or old.shape != new.shape:
        yield f"{name}: {old.dtype} {old.shape}, now {new.dtype} {new.shape}"
        return
    unequal = np.flatnonzero(bits(old.ravel()) != bits(new.ravel()))
    if len(unequal):
        first = unequal[0]
        yield f"{name}: {len(unequal)} of {old.size} differ; [{first}] {old.flat[first]!r}, now {new.flat[first]!r}"


def read(path: Path) -> dict[str, Any]:
    """The named columns, tensors or values of a file, in order."""
    if path.suffix == ".safetensors":
        return dict(sorted(load_file(path).items()))
    if path.suffix == ".json":
        flat = pd.json_normalize(json.loads(path.read_text())).iloc[0]
        return {str(name): np.array([json.dumps(value)]) for name, value in flat.items()}
    table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, dtype=str, keep_default_na=False)
    return {name: table[name].to_numpy() for name in table.columns}


def compare(old: Path, new: Path) -> tuple[list[str], list[str]]:
    """(differences, remarks) between two folders of results."""
    differences: list[str] = []
    remarks: list[str] = []

    def note(name: str, required: bool, sentence: str) -> None:
        (differences if required else remarks).append(f"{name}: {sentence}")

    files = [
        {name for path in folder.rglob("*.*") if is_like(name := path.relative_to(folder).as_posix(), COMPARED)}
        for folder in (old, new)
    ]
    for name in sorted(files[0] - files[1]):
        note(name, is_like(name, REQUIRED), "only before")
    for name in sorted(files[1] - files[0]):
        note(name, False, "only now")
    for name in sorted(files[0] & files[1]):
        before, now = read(old / name), read(new / name)
        for key in before.keys() - now.keys():
            note(name, is_like(name, REQUIRED), f"{key} only before")
        for key in now.keys() - before.keys():
            note(name, name.endswith(".safetensors"), f"{key} only now")
        if [key for key in before if key in now] != [key for key in now if key in before]:
            note(name, not name.endswith(".parquet"), "columns stand in another order")
        for key in before.keys() & now.keys():
            differences += [f"{name}: {sentence}" for sentence in differing(key, before[key], now[key])]
    return differences, remarks


def is_like(name: str, patterns: tuple[str, ...]) -> bool:
    """True if a path fits one of the patterns."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def bring_images(folder: Path) -> dict[str, Any]:
    """Folders of images of noise, without a validation split, and a random CLIP: the parameters that name both."""
    from clips import CONFIG, write_random_clip  # brings this tree's package, which --stages-of must not see

    rng = np.random.default_rng(0)
    for split, generators, count in (("train", ("alpha", "beta"), 12), ("test", ("alpha", "gamma"), 6)):
        for generator in generators:
            for label in ("0_real", "1_fake"):
                target = folder / "images" / split / generator / label
                target.mkdir(parents=True)
                for index in range(count):
                    image = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).resize((96, 80))
                    image.save(target / f"{index:03d}.{'jpg' if index % 2 else 'png'}")
    config = merged(CONFIG, {"vision_cfg": {"image_size": 56}})
    clip = write_random_clip(folder / "clip", config=config)
    return {"data": {"root": str(folder / "images")}, "model": {"clip": str(clip)}}


def main() -> int:
    """0 where all bits agree, 1 where some differ."""
    parser = argparse.ArgumentParser(description="Compare what this tree makes with what another commit makes.")
    parser.add_argument("revision", help="a commit")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--tiny", action="store_true", help="a corner of the benchmark, and of folders (default)")
    size.add_argument("--mini", action="store_true", help="params.yaml as it is, seed 0")
    parser.add_argument("--methods", help="comma-separated, instead of the profile's; all: every one of the registry")
    parser.add_argument("--keep", type=Path, help="folder that the outputs of both sides are left in")
    options = parser.parse_args()
    if options.methods == "all":
        from dgs.model.methods.registry import METHODS as registry

        options.methods = ",".join(registry)
    methods = options.methods.split(",") if options.methods else METHODS
    tiny = merged(TINY, {"methods": methods, "evaluate": {"robustness": {"methods": methods[-1:]}}})
    mini = {**MINI, "methods": methods} if options.methods else MINI
    with tempfile.TemporaryDirectory(prefix="dgs-golden-") as name:
        temporary = Path(name)
        images = bring_images(temporary / "brought")
        overlays = {"mini": mini} if options.mini else {"tiny": tiny, "folders": merged(FOLDERS, images)}
        out = options.keep or temporary / "out"
        sides = {"before": temporary / "before", "now": temporary / "now"}
        added = ["git", "worktree", "add", "--quiet", "--detach", str(sides["before"]), options.revision]
        subprocess.run(added, cwd=ROOT, check=True)
        try:
            shutil.rmtree(sides["before"] / "results")
            copy_repository(sides["now"], tiny=False, git=False)
            for profile, overlay in overlays.items():
                print(f"{profile} ...", file=sys.stderr, flush=True)
                running = {side: start(code, overlay, out / side / profile) for side, code in sides.items()}
                failed = [side for side, process in running.items() if process.wait()]
                for side in failed:
                    print((out / side / profile / "log.txt").read_text()[-3000:], f"{side}: {profile} failed")
                if failed:
                    return 1
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(sides["before"])], cwd=ROOT, check=True)
        differences, remarks = compare(out / "before", out / "now")
    print(*remarks, *(f"DIFFERS {line}" for line in differences), sep="\n")
    print(f"{len(differences)} differences to {options.revision}")
    return 1 if differences else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stages-of"]:
        run_notebooks(sys.argv[2:])
    else:
        sys.exit(main())
