"""Where it computes, and what makes it repeat."""

from __future__ import annotations

import os

import torch

from dgs.errors import UserError


def choose_device(name: str, setting: str = "compute.device") -> torch.device:
    """ "auto" is the first GPU if there is one, else the CPU; any other name is torch's.

    From then on convolutions round to float32, as everything else does: torch lets GPUs round them to TF32, 10 bits.

    Raises:
        UserError: a device that this machine does not have; calls what the user set `setting`.
    """
    torch.backends.cudnn.allow_tf32 = False
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"Cannot use {setting} = '{name}' here ({reason}). Use auto or cpu.") from None
    return device


def set_determinism(threads: int) -> None:
    """Fix what makes one machine's results differ from run to run: thread count and algorithms."""
    # CUDA's matrix products repeat only with a workspace of fixed size, and it is read when CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
