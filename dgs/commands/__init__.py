"""What every command has: the application, one sentence for a user's mistake, notes on stderr, data on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from dgs.errors import UserError, printable

if TYPE_CHECKING:
    from dgs.params import Params
    from dgs.workspace import Workspace


@contextmanager
def for_users() -> Iterator[None]:
    """In this block a user's mistake becomes one sentence on stderr and exit code 2."""
    try:
        yield
    except UserError as error:
        say(f"dgs: {printable(str(error))}")
        sys.exit(2)


class _ForUsers(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        with for_users():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_ForUsers,
    help="Distillation-guided gradient surgery for AI-generated image detection.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
minibench = typer.Typer(help="The embedded benchmark.", no_args_is_help=True)
app.add_typer(minibench, name="minibench")

Json = Annotated[bool, typer.Option("--json", help="data as JSON, one object a line")]
ParamsFile = Annotated[Path | None, typer.Option(help="a complete parameter file; default params.yaml")]


def _printed(line: str) -> str:
    """Names of files that are no UTF-8 escaped: no stream takes them."""
    return line.encode("utf-8", "backslashreplace").decode()


def say(message: str) -> None:
    """A note for people, on stderr."""
    print(_printed(message), file=sys.stderr, flush=True)


def show(as_json: bool, record: dict[str, Any], text: str | None = None) -> None:
    """A command's data on stdout, at once: one JSON object, in ASCII for any terminal; or the text for people."""
    line = json.dumps(record) if as_json else text
    if line is not None:
        print(_printed(line), flush=True)


def prepared(profile: str | None = None) -> tuple[Params, Workspace, Path]:
    """A profile's parameters (default: DGS_PROFILE's, or mini's), its workspace, and what was prepared last there."""
    from dgs.params import load_params
    from dgs.workspace import Workspace

    params = load_params(profile)
    workspace = Workspace.of(params.profile)
    return params, workspace, workspace.find("prepare", made_by="prepare")
