"""Files of public repositories at a commit, by git: one commit without history, and no other file's content."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from dgs.atomic import replacing
from dgs.errors import UserError

HOST = "https://github.com/"
# A network that stalls ends; nobody is asked for a password; files are checked out byte for byte.
SETTINGS = {
    "http.lowSpeedLimit": "1000",
    "http.lowSpeedTime": "60",
    "core.autocrlf": "false",
    "advice.detachedHead": "false",
}
REASONS = (  # of what git says when it cannot fetch, and what to do; the first that fits
    (r"not our ref|couldn't find remote ref|no such remote ref", "that commit is not there (any more)"),
    (r"not found|does not exist|not appear to be a git|could not read Username", "no public repository is there"),
    (r"", "it cannot be reached"),
)


def place_of(repository: str) -> str:
    """The folder of a repository among clones side by side: "owner/name", whatever stands before it."""
    return "/".join(repository.removesuffix(".git").rstrip("/").split("/")[-2:])


def _git(folder: Path, *arguments: str, given: str = "") -> str:
    own = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX"}  # of a repository that we may be run from
    environment = {name: value for name, value in os.environ.items() if name not in own}
    settings = [word for name, value in SETTINGS.items() for word in ("-c", f"{name}={value}")]
    done = subprocess.run(
        ["git", *settings, "-C", str(folder), *arguments],
        input=given,
        capture_output=True,
        text=True,
        errors="replace",
        env={**environment, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"},
        check=False,
    )
    if done.returncode:
        raise OSError(done.stderr.strip() or f"git {arguments[0]} ended with {done.returncode}")
    return done.stdout


def require_git() -> None:
    """Raise UserError unless git is installed."""
    if shutil.which("git") is None:
        raise UserError(
            "Expected git to fetch repositories with, found none. Install it, or give their folder: --from."
        )


def _holds(folder: Path, commit: str, paths: Iterable[str]) -> bool:
    try:
        return _git(folder, "rev-parse", "HEAD").strip() == commit and all((folder / path).is_file() for path in paths)
    except OSError:
        return False


def fetch(repository: str, commit: str, paths: list[str], folder: Path) -> None:
    """Files of a repository at a commit, as a clone in `folder`; one that is whole there is kept as it is.

    Only that commit is fetched, and where the server can filter, only the content of `paths`. No hook and no other
    code of the repository is run.

    Args:
        repository: "owner/name" on GitHub, or an address that git knows.
        paths: in the repository; those that the commit lacks are left out.

    Raises:
        UserError: no git, no network, no such repository or commit.
    """
    require_git()
    if _holds(folder, commit, paths):
        return
    address = repository if "://" in repository else f"{HOST}{repository}.git"
    escaped = [
        re.sub(r"([\\*?\[\]!#])|( +$)", lambda found: "".join(f"\\{c}" for c in found[0]), path) for path in paths
    ]
    with replacing(folder) as draft:
        try:
            _git(draft, "init", "--quiet")
            _git(draft, "remote", "add", "origin", address)
            _git(
                draft, "sparse-checkout", "set", "--no-cone", "--stdin", given="\n".join(f"/{path}" for path in escaped)
            )
            _git(draft, "fetch", "--quiet", "--depth=1", "--filter=blob:none", "origin", commit)
            _git(draft, "checkout", "--quiet", "FETCH_HEAD")
        except OSError as error:
            said = str(error)
            reason = next(words for pattern, words in REASONS if re.search(pattern, said))
            last = said.splitlines()[-1]
            raise UserError(
                f"Expected {repository} at {commit[:12]} from {address}, found that {reason} ({last}). Run the same "
                f"command again, or get the files otherwise and give their folder: --from."
            ) from None
