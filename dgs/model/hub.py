"""Checkpoints on the Hugging Face hub, in its own layout: a model repository holds the files of a checkpoint folder."""

from __future__ import annotations

from pathlib import Path

from dgs.errors import UserError
from dgs.model.checkpoint import read_info, require_unchanged

SCHEME = "hf://"  # hf://OWNER/NAME or hf://OWNER/NAME@REVISION
FILES = ["dgs.json", "SHA256SUMS", "README.md", "adapter_config.json", "*.safetensors", "clip/*"]  # data, no code


def is_address(path: str | Path) -> bool:
    """Whether a checkpoint is named by an address on the hub."""
    return str(path).startswith((SCHEME, SCHEME.replace("//", "/")))  # a Path has one slash less


def located(path: str | Path) -> Path:
    """The folder that a path or an address names; raises as `download`."""
    return download(path) if is_address(path) else Path(path)


def download(address: str | Path) -> Path:
    """The folder of a checkpoint on the hub, in the hub's own cache; what is there already is not loaded again.

    Raises:
        UserError: no such address, no way to the hub, or no checkpoint there.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    name, _, revision = str(address).partition(":")[2].lstrip("/").partition("@")
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=FILES))
    except (HFValidationError, ValueError):
        raise UserError(f"Expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION, found {address}. Mend it.") from None
    except Exception as error:  # no connection, no such repository, no permission: the hub's own words
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"Cannot load {address} from the hub ({reason}). Mend the name, or log in with hf auth login."
        ) from None
    if not (folder / "dgs.json").is_file():
        raise UserError(f"Expected a checkpoint of dgs at {address}, found no dgs.json there. Name another.")
    return folder


def push(folder: Path, name: str, private: bool = False) -> str:
    """Put a checkpoint folder on the hub as the model OWNER/NAME, made where it is not there; its address.

    Raises:
        UserError: no checkpoint or a changed one, or the hub refuses.
    """
    from huggingface_hub import HfApi

    info = read_info(folder)
    for carried in (False, True):
        require_unchanged(folder, info, carried)
    try:
        hub = HfApi()
        hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=FILES, commit_message=f"A checkpoint of dgs: {folder.name}"
        )
    except Exception as error:  # no connection, no permission, a wrong name: the hub's own words
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"Cannot put {folder} on the hub as {name} ({reason}). Log in with hf auth login, or mend the name."
        ) from None
    return f"{SCHEME}{name}"
