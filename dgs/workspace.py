"""Where a run reads and writes: the repository, build/<profile>/ and results/<profile>/; and its files of YAML."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from dgs.errors import UserError

MAIN = "mini"  # the profile that params.yaml itself is


def find_root() -> Path:
    """The repository: the nearest folder with params.yaml and dvc.yaml, upwards from here.

    Falls back to the repository that this package was installed from, so that papermill works from any folder.
    """
    here = Path.cwd().resolve()
    for folder in (here, *here.parents, Path(__file__).resolve().parent.parent):
        if (folder / "params.yaml").exists() and (folder / "dvc.yaml").exists():
            return folder
    raise UserError(f"Expected to be inside a clone of dgs (params.yaml, dvc.yaml), found neither above {here}.")


@dataclass(frozen=True)
class Workspace:
    """Folders of one profile.

    A pipeline stage writes to the repository itself (its outputs are DVC's). A notebook run by hand or by papermill
    writes to scratch/, so that trying things out never makes the pipeline's outputs stale; it reads what was made
    last, there or by the pipeline. The environment variable DGS_OUT names another place to write.
    """

    root: Path
    out: Path
    profile: str

    @classmethod
    def of(cls, profile: str) -> Workspace:
        """The workspace of `profile`, from the current folder and DGS_OUT."""
        root = find_root()
        return cls(root, Path(os.environ.get("DGS_OUT") or root / "scratch").resolve(), profile)

    @property
    def _is_draft(self) -> bool:
        """A pipeline stage writes to a draft below build/, whose contents then move to the repository itself."""
        return self.out.is_relative_to(self.root / "build")

    @property
    def results(self) -> Path:
        """Folder of metrics, tables, figures and reports."""
        return self.out / "results" / self.profile

    def build(self, *parts: str) -> Path:
        """Folder of intermediate outputs: manifest, checkpoints, scores."""
        return self.out.joinpath("build", self.profile, *parts)

    def kept(self, *parts: str) -> Path:
        """Folder of what outlasts a run that breaks off: not in the draft of a pipeline stage."""
        return (self.root if self._is_draft else self.out).joinpath("build", self.profile, *parts)

    @contextmanager
    def unfinished(self, label: str) -> Iterator[Path]:
        """Folder of what a run that breaks off leaves for the next one of the same stage to go on with.

        It goes when the block ends well; in a pipeline `run_stage` removes it, once the outputs are in place.
        """
        folder = self.kept("unfinished", label)
        yield folder
        if not self._is_draft:
            shutil.rmtree(folder, ignore_errors=True)

    def find(self, *parts: str, made_by: str) -> Path:
        """What an earlier stage made: in this workspace or in the pipeline's, whichever is newer.

        Raises:
            UserError: neither has it; the message names the stage to run.
        """
        paths = [base.joinpath("build", self.profile, *parts) for base in (self.out, self.root)]
        made = [path for path in paths if path.exists()]
        if made:
            return max(made, key=lambda path: path.stat().st_mtime_ns)
        raise UserError(
            f"Expected {paths[0]}, found nothing there. Run the stage before it first: {self.to_make(made_by)}."
        )

    def trained(self, methods: Iterable[str]) -> dict[str, Path]:
        """What training made of those of `methods` that were trained, by method."""
        found = {}
        for method in methods:
            with suppress(UserError):
                found[method] = self.find("train", method, made_by=f"train@{method}")
        return found

    def to_make(self, stage: str) -> str:
        """How a user makes what `stage` makes."""
        pipeline = f"dvc repro {stage}" if self.profile == MAIN else f"make repro PROFILE={self.profile}"
        return f"{pipeline}, or notebooks/{stage.partition('@')[0]}.ipynb"

    def shown(self, path: Path) -> str:
        """A path as a reader of a notebook should see it: relative to the repository where it lies in it."""
        base = self.out if self._is_draft and path.is_relative_to(self.out) else self.root
        return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()

    def resolve(self, path: str) -> Path:
        """A path from params.yaml: relative ones are relative to the repository."""
        return (self.root / path).resolve()


def require_data_root(root: Path, asked: str) -> None:
    """Raise UserError unless `root`, which data.root = `asked` stands for, is a folder."""
    if not root.is_dir():
        raise UserError(
            f"Expected a folder of images at data.root = {asked}, found none. Create it or mend the path (images that "
            f"lie elsewhere: ln -s /path/to/them {asked}). The layout is in docs/own-data.md; dgs manifest {asked} "
            f"--check looks at it."
        )
    if names := names_no_utf8(root):
        raise UserError(no_utf8(root, names))


def is_folder(entry: os.DirEntry[str]) -> bool:
    """True for a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a loop of links: reading it says so
        return False


def walk(
    top: Path, is_entered: Callable[[Path], bool] = lambda folder: True, again: bool = False
) -> Iterator[tuple[Path, list[Path]]]:
    """Every folder below `top` that `is_entered` lets in, with its files, by name; what cannot be opened is a file.

    Links are followed, and no folder is entered twice; or, with `again`, only none that it lies in.
    """
    entered: set[str] = set()
    todo: list[tuple[Path, frozenset[str]]] = [(top, frozenset())]
    while todo:
        folder, around = todo.pop()
        try:
            real = os.path.realpath(folder)
            if real in (around if again else entered):
                continue
            entered.add(real)
            inside = around | {real}
            with os.scandir(folder) as found:
                entries = {entry.name: is_folder(entry) for entry in sorted(found, key=lambda entry: entry.name)}
        except OSError:
            yield folder.parent, [folder]
            continue
        inner = [folder / name for name, is_folder in entries.items() if is_folder]
        todo += reversed([(child, inside) for child in inner if is_entered(child)])
        yield folder, [folder / name for name, is_folder in entries.items() if not is_folder]


def names_no_utf8(root: Path) -> list[Path]:
    """Files and folders below `root`, hidden ones too, whose own name is no UTF-8."""
    paths = (path for folder, files in walk(root) for path in (folder, *files) if not path.name.isascii())
    return sorted(path for path in paths if path != root and path.name.encode("utf-8", "ignore").decode() != path.name)


def escaped(path: Path) -> str:
    """A path with every byte that is no UTF-8 as \\xc9."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def no_utf8(root: Path, names: Sequence[Path]) -> str:
    """What to do about `names_no_utf8`, in a sentence."""
    first = escaped(names[0].relative_to(root))
    return (
        f"Expected names in UTF-8 in {root}, found {len(names)} in another encoding, first {first}: neither DVC nor "
        f"the manifest can name such a file. Rename them, for example: convmv -f ISO-8859-1 -t UTF-8 -r --notest {root}"
    )


def is_path(name: str, root: Path) -> bool:
    """Whether model.clip or model.pretrained = `name` is meant as a path (relative to `root`), not as a name."""
    named = ":" in name or name.startswith("timm/")  # hf-hub:owner/name, timm/name
    return (root / name).exists() or ("/" in name and not named)


def no_such_clip(asked: str, hint: str = "") -> UserError:
    """model.clip = `asked` is neither a folder nor a name."""
    embedded = " The embedded one is sample/clip." if "/" in asked else ""
    return UserError(f"Expected model.clip to be a folder or an open_clip name, found '{asked}'.{hint}{embedded}")


def weights_twice(clip: str, pretrained: str) -> UserError:
    """model.clip is a folder, which has weights, and model.pretrained names others."""
    return UserError(
        f"model.clip = {clip} is a folder and brings its weights, found model.pretrained = {pretrained} too. "
        f"Set model.pretrained: null."
    )


def external_checkpoints(given: Mapping[str, str], methods: Collection[str], root: Path) -> dict[tuple[str, int], Path]:
    """Folders of checkpoints that this run did not train, such as the authors', by (name, seed), in the order given.

    The seed is always 0: theirs is not known, or means nothing beside the seeds trained here. What is in the folders is
    checked when they are opened.

    Args:
        given: `evaluate.checkpoints`: folders by name.
        methods: names that are taken, as "frozen" is: tables call the CLIP itself so.

    Raises:
        UserError: a name that is taken, or a folder that is no checkpoint's.
    """
    found: dict[tuple[str, int], Path] = {}
    for name, path in given.items():
        if name in methods or name == "frozen":
            raise UserError(
                f"Expected names in evaluate.checkpoints that no method has, found {name}. Call it otherwise, for "
                f"example {name}-imported."
            )
        folder = root / path
        if not (folder / "dgs.json").is_file():
            raise UserError(
                f"Expected a checkpoint folder (with dgs.json) at evaluate.checkpoints.{name} = {path}, found none. "
                f"Mend the path, or make it: dgs import-release STEP2 --out {path}."
            )
        found[name, 0] = folder
    return found


def read_yaml_text(text: str) -> Any:
    """YAML 1.2, as DVC reads and writes it: 1e-4 is a number however it is spelled, yes and no are words."""
    return YAML(typ="safe", pure=True).load(text)


def yaml_text(content: Mapping[str, Any]) -> str:
    """As `read_yaml_text` and DVC read it back."""
    writer, stream = YAML(typ="safe", pure=True), io.StringIO()
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    writer.dump(dict(content), stream)
    return stream.getvalue()


def read_yaml(path: Path) -> dict[str, Any]:
    """A file of parameters, not yet validated.

    Raises:
        UserError: no file, or one that does not hold groups of parameters.
    """
    try:
        content = read_yaml_text(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"Expected a parameter file at {path}, found none.") from None
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror or error}). Name a parameter file.") from None
    except UnicodeDecodeError:
        raise UserError(f"Expected {path} to be text in UTF-8, found other bytes. Save it as UTF-8.") from None
    except Exception as error:  # a value that its tag or form does not fit fails in many ways
        reason = " ".join(str(error).partition("To suppress")[0].split())
        raise UserError(f"{path} is not valid YAML: {reason}. Mend that line.") from None
    if not isinstance(content, dict):
        raise UserError(f"Expected {path} to hold groups of parameters (key: value), found {type(content).__name__}.")
    return content
