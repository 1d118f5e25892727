"""What is read never runs as code, and names in tables stay as they are: no module calls what could do otherwise."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_architecture import ROOT, files, name_of

READER = "dgs.tables"  # the one place that may call read_csv
# Modules that run what they read, or make what does: by no import, and by no text that names one.
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "jsonpickle", "numpy_pickle"}
# Functions by their library: found below any of its modules, since libraries have the same function in several.
NEVER = {
    "builtins": {"eval", "exec"},
    "torch": {"load", "PackageImporter", "load_state_dict_from_url", "add_safe_globals", "safe_globals"},
    "numpy": {"load", "read_array"},
    "joblib": {"load"},
    "yaml": {"load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all", "Loader", "FullLoader",
             "UnsafeLoader"},
    "ruamel": {"load", "load_all"},
    "pandas": {"read_csv", "read_table", "read_fwf", "read_pickle", "read_hdf", "eval"},
}  # fmt: skip
# Of these a call is safe that has the first so many arguments by place at most, and the rest by name.
BY_PLACE = {"torch.load": 2, "torch.serialization.load": 2, "numpy.load": 2}
NEEDED = {"torch.load": "weights_only", "torch.serialization.load": "weights_only"}
# Arguments that nothing may have but with this value, whatever is called: libraries hand them on.
ARGUMENTS = {"weights_only": "True", "allow_pickle": "False", "trust_remote_code": "False", "pickle_module": "None"}
KINDS = ("'safe'", "'rt'")  # of ruamel's YAML


def _imported(node: ast.AST) -> dict[str, str]:
    """What names an import gives, with what they stand for: {"t": "torch"} for `import torch as t`."""
    if isinstance(node, ast.Import):
        first = {alias.name.partition(".")[0]: alias.name for alias in node.names if not alias.asname}
        return {**{name: name for name in first}, **{a.asname: a.name for a in node.names if a.asname}}
    if isinstance(node, ast.ImportFrom):
        return {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {}


def _meant(tree: ast.AST) -> dict[str, set[str]]:
    """What names stand for in a module, by imports and by assignments of what is imported; in any of its functions."""
    found: dict[str, set[str]] = {name: {f"builtins.{name}"} for name in NEVER["builtins"]}
    found["__builtins__"] = {"builtins"}
    for node in ast.walk(tree):
        for name, full in _imported(node).items():
            found.setdefault(name, set()).add(full)
    for _ in range(2):  # of what is assigned, too
        for node in ast.walk(tree):
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for name in [each.id for each in targets if isinstance(each, ast.Name)]:
                    known = {full for full in _full(node.value, found) if _library(full) in NEVER}
                    found[name] = found.get(name, set() if known else {name}) | known
    return found


def _library(full: str) -> str:
    return full.partition(".")[0]


def _full(node: ast.AST | None, meant: dict[str, set[str]]) -> set[str]:
    """The dotted names that an expression may be, in full; none of any other. getattr(x, "y") is x.y."""
    if isinstance(node, ast.Name):
        return meant.get(node.id, {node.id})
    if isinstance(node, ast.Attribute):
        return {f"{before}.{node.attr}" for before in _full(node.value, meant)}
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and isinstance(node.args[1], ast.Constant):
        return {f"{before}.{node.args[1].value}" for before in _full(node.args[0], meant)}
    return set()


def _is_sound(call: ast.Call, full: str) -> bool:
    """Whether a call of what is otherwise never called has arguments with which it is safe."""
    given = {each.arg: ast.unparse(each.value) for each in call.keywords}
    plain = None not in given and not any(isinstance(each, ast.Starred) for each in call.args)
    needed = full not in NEEDED or NEEDED[full] in given
    return plain and needed and full in BY_PLACE and len(call.args) <= BY_PLACE[full]


def _is_wrong_import(full: str) -> bool:
    library, last = _library(full), full.rpartition(".")[2]
    of_library = last in {"*", *NEVER.get(library, ())} and full not in BY_PLACE
    return bool(set(full.split(".")) & MODULES) or (library in NEVER and of_library)


def _names(node: ast.AST) -> Iterator[str]:
    """Imports, texts and arguments that nothing may have."""
    imports = {each.name for each in node.names} if isinstance(node, ast.Import) else set()
    yield from (full for full in imports | set(_imported(node).values()) if _is_wrong_import(full))
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in {*MODULES, *ARGUMENTS}:
        yield repr(node.value)
    if getattr(node, "arg" if isinstance(node, ast.arg) else "attr", None) in ARGUMENTS:
        yield ast.unparse(node)
    if isinstance(node, ast.keyword) and ARGUMENTS.get(node.arg or "", said := ast.unparse(node.value)) != said:
        yield f"{node.arg}={said}"


def unsafe(source: str, module: str = "") -> Iterator[str]:
    """What `source` does that the package must not, a line each; `module`: its name, of which `READER` may read CSV."""
    tree = ast.parse(source)
    nodes, meant, sound = list(ast.walk(tree)), _meant(tree), set()
    inner = {node.value for node in nodes if isinstance(node, (ast.Attribute, ast.Assign))}
    for node in nodes:
        yield from (f"line {getattr(node, 'lineno', 0)}: {name}" for name in _names(node))
        if isinstance(node, ast.Call):
            functions = _full(node.func, meant)
            sound |= {node.func} if all(_is_sound(node, full) for full in functions) else set()
            kinds = [ast.unparse(each.value) for each in node.keywords if each.arg in ("typ", None)]
            kinds += [ast.unparse(each) for each in node.args[:1]]
            if any(full.startswith("ruamel.yaml") for full in functions) and not set(kinds) <= set(KINDS):
                yield f"line {node.lineno}: YAML of typ {kinds[0]}"
    for node in nodes:
        if not isinstance(node, (ast.Name, ast.Attribute, ast.Call)) or node in sound:
            continue
        for full in _full(node, meant):
            library, last = _library(full), full.rpartition(".")[2]
            reads = module == READER and full == "pandas.read_csv"
            value = isinstance(node, ast.Name) and full == library and node not in inner
            if library in NEVER and (last in NEVER[library] or last == "__dict__" or value) and not reads:
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
import torch; torch.load(f, None, pickle_like, weights_only=True)
import torch; torch.load(f, pickle_module=other, weights_only=True)
import torch; torch.load(f, weights_only=True, **more)
import torch; torch.load(*arguments, weights_only=True)
import torch.serialization; torch.serialization.load(f)
from torch import serialization as s; s.load(f)
import torch; s = torch.serialization; s.load(f)
import torch; t = torch; t.load(f)
import torch; (t := torch).load(f)
import torch; getattr(torch, "load")(f)
import torch; vars(torch)["load"](f)
import torch; torch.__dict__["load"](f)
import torch; (lambda read=torch.load: read)()(f)
import functools, torch; functools.partial(torch.load, weights_only=True)(f)
import torch; torch.hub.load(name, model)
from torch.hub import load; load(name, model)
import torch; torch.hub.load_state_dict_from_url(url)
from torch.package import PackageImporter
import torch; torch.serialization.add_safe_globals([Model])
from torch import *
from torch import load; load(f); from json import load
def read(f, weights_only=False): return timm.models.load_state_dict(f, weights_only=weights_only)
import numpy as np; np.load(f, allow_pickle=True)
import numpy as np; np.load(f, None, True)
import numpy as np; np.load(f, **settings)
from numpy import load; load(f, allow_pickle=trusted)
import pickle
import pickle as p
import os, pickle
import pandas.io.pickle
import joblib.numpy_pickle
import sys; sys.modules["pickle"].load(f)
import builtins; builtins.__import__("pickle")
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
run = eval; run(text)
__builtins__["eval"](text)
from builtins import exec as run
import yaml; yaml.load(text)
import yaml; yaml.load(text, Loader=yaml.Loader)
import yaml; yaml.load(text, yaml.FullLoader)
import yaml; yaml.unsafe_load(text)
from yaml import load; load(text, Loader=Loader)
import yaml; yaml.load(text, Loader=yaml.SafeLoader)
from yaml import Loader as SafeLoader; yaml.load(text, Loader=SafeLoader)
import yaml; yaml.UnsafeLoader(text).get_data()
from yaml import unsafe_load_all
from yaml import *
from ruamel.yaml import YAML; YAML(typ="unsafe")
import ruamel.yaml; ruamel.yaml.YAML(**settings)
from ruamel import yaml; yaml.load(text)
from transformers import AutoModel; AutoModel.from_pretrained(name, trust_remote_code=True)
settings = {"trust_remote_code": True}
settings = dict(trust_remote_code=True)
settings["trust_remote_code"] = True
settings = [("allow_pickle", True)]
model.weights_only = False
import pandas as pd; pd.read_csv(f)
from pandas import read_csv; read_csv(f, keep_default_na=False)
import pandas; pandas.read_pickle(f)
from pandas.io.parsers import read_csv
from pandas.io.parsers.readers import read_csv as read; read(f)
import pandas as pd; pd.io.parsers.read_csv(f)
import pandas as pd; read = pd.read_csv; read(f)
import pandas as pd; getattr(pd, "read_csv")(f)
import pandas as pd; p = pd; p.read_csv(f)
import pandas as pd; pd.read_fwf(f)
import pandas as pd; pd.eval(text)
import numpy as np; np.load(*arguments)
import numpy as np; np.lib.format.read_array(f, True)
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
import ruamel.yaml; ruamel.yaml.YAML(typ="safe").load(text)
import yaml; yaml.safe_load(text); yaml.YAMLError
import torch; torch.serialization.load(f, map, weights_only=True)
import numpy as np; numbers = np.ones; numbers(3)
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
