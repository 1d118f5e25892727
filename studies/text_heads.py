"""Does surgery help once the text head has learned? DGS, its parts and controls, with the release's head and a fitted.

`python -m studies.text_heads` trains all at every strength of the shortcut, tests on fresh images, and writes
results/study/text_heads.csv. What reads no text head, such as LoRA, is trained once and compared with both, by rho and
seed. Settings are those that were searched with the same head (params.yaml, studies/fitted_settings.py).
"""

from __future__ import annotations

from dgs.model.methods.registry import METHODS
from dgs.workspace import find_root
from studies.fitted_settings import HEAD, settings
from studies.sweep import Arm, command

RHOS, HEADS = (0.9, 0.75, 0.5), ("release", "fitted")
FAMILY = [name for name, method in METHODS.items() if method.settings_of == ("dgs",)]
STUDIED = ["lora", "dgs", "suppression_only", "alignment_only", *FAMILY]


def arms() -> list[Arm]:
    """What reads the head with both, the others once."""
    found = settings(find_root())
    return [
        Arm(name, {"data.rho": rho, HEAD: head, **(found[name] if head == "fitted" else {})})
        for rho in RHOS
        for name in STUDIED
        for head in (HEADS if METHODS[name].needs_text else HEADS[:1])
    ]


if __name__ == "__main__":
    command("text_heads", arms)
