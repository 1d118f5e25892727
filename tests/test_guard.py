"""What is read never runs as code, and names in tables stay as they are: no module calls what could do otherwise."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_architecture import ROOT, files, name_of

READER = "dgs.tables"  # the one place that may call read_csv
# Modules that run what they read, or make what does.
MODULES = ("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "jsonpickle")
NEVER = ("builtins.eval", "builtins.exec", "joblib.load", "torch.jit.load", "pandas.read_pickle", "yaml.unsafe_load",
         "yaml.full_load", "pandas.read_csv", "pandas.read_table")  # fmt: skip
# Calls that are safe with one argument alone, which must be there and have one of these values.
ONLY_WITH = {
    "torch.load": ("weights_only", {"True"}),
    "yaml.load": ("Loader", {"SafeLoader", "CSafeLoader", "yaml.SafeLoader", "yaml.CSafeLoader"}),
    "yaml.load_all": ("Loader", {"SafeLoader", "CSafeLoader", "yaml.SafeLoader", "yaml.CSafeLoader"}),
}
# Arguments that no call may have but with this value, whatever is called: libraries hand them on.
ARGUMENTS = {"weights_only": "True", "allow_pickle": "False", "trust_remote_code": "False"}


def _meant(tree: ast.AST) -> dict[str, str]:
    """What names stand for by a module's imports: {"t": "torch"} for `import torch as t`."""
    found = {name: f"builtins.{name}" for name in ("eval", "exec")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                found[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _full(node: ast.AST, meant: dict[str, str]) -> str:
    """The dotted name that an expression is, in full; "" of any other."""
    if isinstance(node, ast.Name):
        return meant.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (before := _full(node.value, meant)):
        return f"{before}.{node.attr}"
    return ""


def unsafe(source: str, module: str = "") -> Iterator[str]:
    """What `source` does that the package must not, a line each; `module`: its name, of which `READER` may read CSV."""
    tree = ast.parse(source)
    meant, sound = _meant(tree), set()
    for node in ast.walk(tree):
        line = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            names = [f"{node.module}.{name}" for name in names] if isinstance(node, ast.ImportFrom) else names
            yield from (f"{line}: {name}" for name in names if set(name.split(".")) & set(MODULES))
        elif isinstance(node, ast.Call):
            given = {each.arg: ast.unparse(each.value) for each in node.keywords if each.arg}
            for name, value in ARGUMENTS.items():
                if given.get(name, value) != value:
                    yield f"{line}: {name}={given[name]}"
            full = _full(node.func, meant)
            if full in ("__import__", "importlib.import_module") and set(MODULES) & set(ast.unparse(node).split("'")):
                yield f"{line}: {ast.unparse(node)}"
            if full in ONLY_WITH:
                name, values = ONLY_WITH[full]
                sound |= {node.func} if given.get(name) in values else set()
            if full == "numpy.load" and len(node.args) < 3 and all(each.arg for each in node.keywords):
                sound.add(node.func)
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            of = {ast.unparse(key).strip("'"): ast.unparse(value) for key, value in pairs if key}
            yield from (f"{line}: {name}" for name, value in ARGUMENTS.items() if of.get(name, value) != value)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and node not in sound:
            full = _full(node, meant)
            reads = module == READER and full == "pandas.read_csv"
            if (full in NEVER or full in ONLY_WITH or full == "numpy.load") and not reads:
                yield f"line {node.lineno}: {full}"


PACKAGE = files("dgs", "minibench", "studies", "real", "benchmarks")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_module_reads_what_could_run(path: Path) -> None:
    assert list(unsafe(path.read_text(encoding="utf-8"), name_of(path))) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_no_notebook_does(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert list(unsafe("\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code"))) == []


WRONG = """
import torch; torch.load(f)
import torch; torch.load(f, weights_only=False)
import torch; torch.load(f, weights_only=safe)
import torch; torch.load(f, **settings)
import torch as t; t.load(f)
import torch; read = torch.load
from torch import load; load(f)
from torch import load as read; list(map(read, files))
from torch.serialization import load; load(f, weights_only=False)
import timm; timm.models.load_state_dict(f, weights_only=False)
import torch; torch.jit.load(f)
import numpy as np; np.load(f, allow_pickle=True)
import numpy as np; np.load(f, None, True)
import numpy as np; np.load(f, **settings)
from numpy import load; load(f, allow_pickle=trusted)
import pickle
import pickle as p
from pickle import Unpickler
import dill
import cloudpickle
from joblib.externals import cloudpickle
from joblib.externals.cloudpickle import dumps
import marshal
__import__('pickle')
import importlib; importlib.import_module("dill")
import joblib; joblib.load(f)
from joblib import load; load(f)
eval(text)
exec(text)
import builtins; builtins.eval(text)
list(map(eval, texts))
import yaml; yaml.load(text)
import yaml; yaml.load(text, Loader=yaml.Loader)
import yaml; yaml.load(text, yaml.FullLoader)
import yaml; yaml.unsafe_load(text)
from yaml import load; load(text, Loader=Loader)
from transformers import AutoModel; AutoModel.from_pretrained(name, trust_remote_code=True)
settings = {"trust_remote_code": True}
settings = dict(trust_remote_code=True)
import pandas as pd; pd.read_csv(f)
from pandas import read_csv; read_csv(f, keep_default_na=False)
import pandas; pandas.read_pickle(f)
"""
RIGHT = """
import torch; torch.load(f, map_location="cpu", weights_only=True)
from torch import load; load(f, weights_only=True)
import numpy as np; np.load(f)
import numpy as np; np.load(f, "r", allow_pickle=False)
import pickletools; pickletools.genops(data)
from joblib import Parallel, delayed
model.eval()
engine.exec(text)
import json; json.load(f)
import yaml; yaml.safe_load(text)
import yaml; yaml.load(text, Loader=yaml.SafeLoader)
from yaml import load, CSafeLoader; load(text, Loader=CSafeLoader)
from safetensors.torch import load_file, load; load(data)
from transformers import AutoModel; AutoModel.from_pretrained(name, trust_remote_code=False)
from dgs.tables import read_table; read_table(f)
import pandas as pd; pd.read_parquet(f)
"""


@pytest.mark.parametrize("source", WRONG.strip().splitlines())
def test_the_guard_finds(source: str) -> None:
    assert list(unsafe(source))


@pytest.mark.parametrize("source", RIGHT.strip().splitlines())
def test_the_guard_leaves_alone(source: str) -> None:
    assert list(unsafe(source)) == []


def test_one_module_alone_reads_csv() -> None:
    source = "import pandas as pd; pd.read_csv(f)"
    assert list(unsafe(source, READER)) == [] and list(unsafe(source, "dgs.analysis.metrics"))
