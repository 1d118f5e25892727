"""How much of the caption does a text expert need? The shortcut's word is dropped from more and more training captions.

`python -m studies.dose_response` trains what reads captions at each share, tests on fresh images, and writes
results/study/dose_response.csv. What reads none is the same at every share, so it is trained at one. Which captions
lose the word goes by the image's hash: the same ones for every seed, and of a smaller share among those of a larger
one.
"""

from __future__ import annotations

from dgs.model.methods.registry import get_method
from studies.sweep import Arm, command

DROPPED, SHARES = "data.caption_drop", (0.0, 0.25, 0.5, 0.75, 1.0)
METHODS = ("poe_distillation", "dgs", "content_poe_distillation", "lora")


def arms() -> list[Arm]:
    """Each method at each share, or at the first where it reads no captions."""
    return [
        Arm(method, {DROPPED: share})
        for method in METHODS
        for share in (SHARES if get_method(method).needs_text else SHARES[:1])
    ]


if __name__ == "__main__":
    command("dose_response", arms)
