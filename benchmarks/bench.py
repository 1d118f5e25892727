"""`make bench`: dgs against the release's step (tests/oracle.py) and against the student's own forward and backward.

Every ratio comes from one process in which both sides take turns, on one CPU thread (and, where there is one, a GPU).
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

import oracle  # noqa: E402  # the release's step lives with the tests that it is the oracle of
from timing import Timed, in_own_process, interleave, peak_megabytes, resident_megabytes  # noqa: E402

from dgs.data.patches import patch_indices, stitch  # noqa: E402
from dgs.model.backbone import Backbone  # noqa: E402
from dgs.model.clip import IMAGENET, RANDOM, load_clip  # noqa: E402
from dgs.model.gemm import resolve  # noqa: E402
from dgs.model.methods.base import Precomputed  # noqa: E402
from dgs.model.methods.registry import get_method  # noqa: E402
from dgs.model.release import Release, adapt, take_apart, write_clip  # noqa: E402
from dgs.model.step import stage2_step  # noqa: E402
from dgs.model.text import embed_tokens  # noqa: E402
from dgs.model.train import stage1, teacher_residuals  # noqa: E402
from dgs.params import Params, dotted, load_params  # noqa: E402
from dgs.workspace import MAIN  # noqa: E402

GEOMETRIES = {"ViT-B/32": oracle.VIT_B_32, "ViT-L/14": oracle.VIT_L_14, "reduced": oracle.REDUCED}
LR, EPOCHS_1 = 1e-4, 3
GEMM = resolve("auto")  # of dgs's side; the release's is torch as it ships
# What was set before measuring, where both sides multiply by torch and where dgs does by oneDNN.
REQUIRED = {
    "torch": {"step ViT-B/32": 2.0, "step ViT-L/14": 1.6, "stage 1": 2.7, "both stages": 2.3},
    "onednn": {"step ViT-B/32": 4.0, "step ViT-L/14": 3.5, "stage 1": 2.7, "both stages": 4.0},
}[GEMM]
SIDES = (256, 512, 1024, 2048)


@dataclass(frozen=True)
class Row:
    """One comparison. ratio: the reference's time by that of dgs (more is better); for memory and overhead that of dgs
    by the reference's (less is better). reference: the release, or for overhead the student alone. low and high: over
    rounds. required, stretch: what was set before measuring."""

    what: str
    unit: str
    reference: float
    dgs: float
    ratio: float
    low: float
    high: float
    required: str
    met: bool
    stretch: str = ""


def settings(side: int, precision: str = "fp32", batch: int = 16) -> Params:
    """The release's training settings."""
    own = {
        "data": {"layout": "folders", "rho": None},
        "model": {
            "clip": "clip",
            "image_size": side,
            "normalize": "imagenet",
            "precision": precision,
            "lora": {"rank": 6, "alpha": 6.0, "dropout": 0.8},
            "levels": [0],
        },
        "train": {"batch_size": batch, "stage1": {"epochs": EPOCHS_1, "lr": LR}, "stage2": {"epochs": 1, "lr": LR}},
        "compute": {"device": "cpu"},
    }
    return load_params(MAIN, HERE.parent).for_method("default").replaced(dotted(own))


class Student:
    """dgs's side: a tower with the release's weights, its heads, and a step."""

    def __init__(self, release: Release, params: Params, device: str = "cpu", whole: bool = False) -> None:
        self.params, self.method = params, get_method("dgs")
        with tempfile.TemporaryDirectory() as folder:
            write_clip(release, Path(folder, "clip"))
            self.clip = load_clip(params.model, Path(folder), params.image_size, text=whole, gemm=GEMM)
        self.clip.model.to(device)
        self.backbone: Backbone = adapt(self.clip, release, params).train().to(device)
        self.heads = {n: h.to(device).requires_grad_(n != "teacher") for n, h in release.heads.items()}
        learned = [p for n in ("image", "text") for p in self.heads[n].parameters()]
        self.optimizer = torch.optim.Adam([*self.backbone.adapter_parameters(), *learned], lr=LR)

    def step(self, images: Tensor, known: Precomputed) -> None:
        """One step of stage 2, from cached caption embeddings and teacher residuals."""
        noise = torch.randn(known.captions.shape, device=known.captions.device)
        stage2_step(self.method, self.backbone, self.heads, self.optimizer, images, known, noise, self.params)

    def forward_and_backward(self, images: Tensor) -> None:
        """The least that any training of these adapters costs."""
        for parameter in self.backbone.adapter_parameters():
            parameter.grad = None
        features = self.backbone(images)
        features.backward(torch.ones_like(features))

    def frozen(self, images: Tensor, batch: int) -> Tensor:
        """Features of the tower without adapters."""
        with self.backbone.frozen():
            return torch.cat([self.backbone(part) for part in images.split(batch)])

    def known(self, frozen: Tensor, tokens: Tensor, labels: Tensor, batch: int) -> Precomputed:
        """What is computed once beside frozen features: caption embeddings, teacher residuals."""
        with torch.no_grad():
            captions = torch.cat([embed_tokens(self.clip.model, part) for part in tokens.split(batch)])
        residual, ones = teacher_residuals(self.heads["teacher"], frozen, labels), torch.ones_like(labels)
        return Precomputed(labels, captions, frozen, ones, residual, torch.zeros_like(labels), ones)


def data(geometry: oracle.Geometry, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, 3, S, S) uint8, tokens (N, 77), labels (N,)."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (count, 3, geometry.image, geometry.image), dtype=np.uint8))
    tokens = torch.zeros(count, 77, dtype=torch.long)
    tokens[:, :12] = torch.from_numpy(rng.integers(1, 49_406, (count, 12)))  # a caption of BLIP's length
    tokens[:, 12] = 49_407
    return images, tokens, torch.arange(count).remainder(2).float()


def normalised(images: Tensor) -> Tensor:
    """As the release feeds them."""
    mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in IMAGENET)
    return (images / 255 - mean) / std


def arbitrary(labels: Tensor, width: int) -> Precomputed:
    """What a step reads, made up: its values do not change what a step costs."""
    captions, teacher = torch.randn(2, len(labels), width, device=labels.device)
    ones = torch.ones_like(labels)
    return Precomputed(labels, captions, teacher, ones, torch.rand_like(labels) - 0.5, torch.zeros_like(labels), ones)


def both(geometry: oracle.Geometry, batch: int) -> tuple[oracle.Release, Student]:
    """Both sides with the same weights."""
    torch.manual_seed(0)
    theirs = oracle.Release(geometry, dropout=0.8, lr=LR)
    release = take_apart(theirs.state_dict(), Path("oracle"))
    return theirs, Student(release, settings(geometry.image, batch=batch), whole=True)


def row(what: str, timed: Timed, required: float) -> Row:
    """A speed-up over the release's side."""
    ratio, low, high = timed.ratio("release", "dgs")
    need = f">= {required:g}"
    return Row(what, "s", timed.median("release"), timed.median("dgs"), ratio, low, high, need, ratio >= required)


def bench_step(name: str, batch: int, rounds: int) -> list[Row]:
    """Time of a stage-2 step, and its overhead over the student's own forward and backward."""
    geometry = GEOMETRIES[name]
    images, tokens, labels = data(geometry, batch)
    theirs, mine = both(geometry, batch)
    known, pixels = mine.known(mine.frozen(images, batch), tokens, labels, batch), normalised(images)
    timed = interleave(
        {
            "release": lambda: theirs.step(pixels, tokens, labels),
            "dgs": lambda: mine.step(images, known),
            "student": lambda: mine.forward_and_backward(images),
        },
        rounds,
    )
    over, low, high = timed.ratio("dgs", "student")
    what = f"stage-2 step, {name}, B {batch}"
    overhead = Row(f"{what}: overhead over the student's forward + backward", "s", timed.median("student"),
                   timed.median("dgs"), over, low, high, "<= 1.25", over <= 1.25, "<= 1.05")  # fmt: skip
    return [row(what, timed, REQUIRED.get(f"step {name}", 0.0)), overhead]


def bench_stages(name: str, images_count: int, batch: int, rounds: int) -> list[Row]:
    """Stage 1 (three epochs), and both stages, from images in memory to trained heads and adapters."""
    geometry = GEOMETRIES[name]
    images, tokens, labels = data(geometry, images_count)
    order = [torch.arange(images_count).roll(epoch).split(batch) for epoch in range(EPOCHS_1 + 1)]
    theirs, mine = both(geometry, batch)
    frozen_clip = theirs.clip_model_frozen.clip_model_frozen
    head = theirs.clip_model_frozen.img_frozen_fc.requires_grad_()

    def release_stage_1() -> None:
        optimizer = torch.optim.Adam(head.parameters(), lr=LR)
        for epoch in range(EPOCHS_1):
            for part in order[epoch]:
                with torch.no_grad():
                    features = frozen_clip.visual(normalised(images[part]))
                loss = nn.functional.binary_cross_entropy_with_logits(head(features).squeeze(1), labels[part])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def release_both() -> None:
        release_stage_1()
        for part in order[EPOCHS_1]:
            theirs.step(normalised(images[part]), tokens[part], labels[part])

    def dgs_stage_1() -> Tensor:
        frozen = mine.frozen(images, batch)
        stage1(frozen[None], labels, mine.params, 0)
        return frozen

    def dgs_both() -> None:
        known = mine.known(dgs_stage_1(), tokens, labels, batch)
        for part in order[EPOCHS_1]:
            mine.step(images[part], known[part])

    first = interleave({"release": release_stage_1, "dgs": dgs_stage_1}, rounds)
    whole = interleave({"release": release_both, "dgs": dgs_both}, rounds)
    size = f"{name}, {images_count} images"
    return [
        row(f"{what}, {size}", timed, REQUIRED[what.partition(",")[0]])
        for what, timed in ((f"stage 1, {EPOCHS_1} epochs", first), ("both stages", whole))
    ]


def bench_prefix(rounds: int) -> list[Row]:
    """A stage-2 step at ViT-B/16 with adapters in the last four blocks, from images and from kept tokens."""
    batch = 16
    changes = {"model.clip": "ViT-B-16", "model.pretrained": RANDOM, "model.lora.blocks": [8, 9, 10, 11]}
    params = settings(224, batch=batch).replaced(changes)
    clip = load_clip(params.model, HERE.parent, params.image_size, text=False, gemm=GEMM)
    backbone = Backbone(clip, params.model.lora).train()
    heads = {name: nn.Linear(512, 1).requires_grad_(name != "teacher") for name in ("image", "text", "teacher")}
    learned = [p for name in ("image", "text") for p in heads[name].parameters()]
    optimizer = torch.optim.Adam([*backbone.adapter_parameters(), *learned], lr=LR)
    images, labels = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8), torch.arange(batch) % 2.0
    known, noise = arbitrary(labels, 512), torch.randn(batch, 512)
    with backbone.frozen():
        tokens = backbone.lower(images)

    def step(given: Tensor) -> None:
        stage2_step(get_method("dgs"), backbone, heads, optimizer, given, known, noise, params)

    timed = interleave({"release": lambda: step(images), "dgs": lambda: step(tokens)}, rounds)
    what = f"stage-2 step, ViT-B/16, B {batch}, adapters in the last 4 blocks: with tokens kept to without"
    return [row(what, timed, 2.2)]


def bench_patches(rounds: int) -> list[Row]:
    """Patch selection from pixels to canvas; the canvases have to be equal."""
    rows = []
    for side in SIDES:
        image = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
        order = np.random.default_rng(1).permutation(49)

        def mine(image: Any = image) -> Any:
            return stitch(image, patch_indices(image), 32, 49, 1)

        def theirs(image: Any = image, order: Any = order) -> Any:
            return oracle.select_patches(image, order)

        if not np.array_equal(mine(), theirs()):
            raise SystemExit(f"patch selection at {side} px differs from the definition")
        timed = interleave({"release": theirs, "dgs": mine}, rounds * (4 if side < 1024 else 1))
        rows.append(row(f"patch selection, {side} px, equal output", timed, 10.0 if side > 256 else 8.0))
    return rows


def measure_memory(side: str, name: str, batch: int) -> dict[str, float]:
    """Peak resident memory of three steps of one side, in this process; run it in one of its own."""
    geometry = GEOMETRIES[name]
    images, tokens, labels = data(geometry, batch)
    base = resident_megabytes()
    torch.manual_seed(0)
    if side == "release":
        model = oracle.Release(geometry, dropout=0.8, lr=LR)
        pixels = normalised(images)
        parameters = sum(p.numel() for p in model.parameters())
        task: Callable[[], object] = lambda: [model.step(pixels, tokens, labels) for _ in range(3)]  # noqa: E731
    else:
        release = take_apart(oracle.Release(geometry, dropout=0.8).state_dict(), Path("oracle"))
        mine = Student(release, settings(geometry.image, batch=batch))
        del release
        known = arbitrary(labels, geometry.embed)
        modules = [mine.clip.model, *mine.heads.values()]
        parameters = sum(p.numel() for module in modules for p in module.parameters())
        task = lambda: [mine.step(images, known) for _ in range(3)]  # noqa: E731
    gc.collect()
    return {"peak": peak_megabytes(task) - base, "parameters": parameters * 4 / 2**20}


def bench_memory(name: str, batch: int) -> list[Row]:
    """Memory of a step, each side in a process of its own."""
    found = {side: in_own_process(Path(__file__), "--memory", side, name, str(batch)) for side in ("release", "dgs")}
    rows = []
    for what, key, required in (("peak memory of", "peak", 0.6), ("parameters held in", "parameters", 0.3)):
        theirs, mine = found["release"][key], found["dgs"][key]
        share = mine / theirs
        rows.append(Row(f"{what} a stage-2 step, {name}, B {batch}", "MiB", theirs, mine, share, share, share,
                        f"<= {required:g}", share <= required))  # fmt: skip
    return rows


def bench_gpu(rounds: int) -> list[dict[str, Any]]:
    """Images a second of a stage-2 step on a GPU, fp32 and bf16."""
    found = []
    for name, batch in (("ViT-B/32", 256), ("ViT-L/14", 32)):
        geometry = GEOMETRIES[name]
        release = take_apart(oracle.Release(geometry).state_dict(), Path("oracle"))
        for precision in ("fp32", "bf16"):
            mine = Student(release, settings(geometry.image, precision, batch), "cuda")
            images, _, labels = (part.cuda() for part in data(geometry, batch))
            known = arbitrary(labels, geometry.embed)
            timed = interleave({"dgs": lambda: mine.step(images, known)}, rounds)  # noqa: B023
            found.append(
                {
                    "what": f"stage-2 step, {name}, B {batch}, {precision}",
                    "images_per_second": batch / timed.median("dgs"),
                    "card": torch.cuda.get_device_name(),
                }
            )
    return found


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())  # fmt: skip
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "cpu": cpu,
        "threads": "1",
        "gemm": GEMM,
        "gpu": card,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def table(rows: list[Row], on: dict[str, str], gpu: list[dict[str, Any]]) -> str:
    """results.md."""
    lines = [
        f"Measured {on['date']} on one thread of: {on['cpu']}, torch {on['torch']}; compute.gemm: {on['gemm']}.",
        "Ratio: median of the rounds [lowest, highest]; of time saved (more is better), of memory and overhead needed.",
        "",
        "| what | reference | dgs | ratio | required | stretch |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        spread = f" [{r.low:.2f}, {r.high:.2f}]" if r.low != r.high else ""
        mark = "" if r.met else " **missed**"
        digits = 0 if r.unit == "MiB" else 2 if r.reference >= 0.5 else 4
        lines.append(
            f"| {r.what} | {r.reference:.{digits}f} {r.unit} | {r.dgs:.{digits}f} {r.unit} | {r.ratio:.2f}{spread} | "
            f"{r.required}{mark} | {r.stretch} |"
        )
    lines += [""] + [f"- {g['what']}: {g['images_per_second']:.0f} images/s ({g['card']})" for g in gpu]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Measure, write results.json and results.md beside this file, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a small geometry, to see that everything runs; no file")
    parser.add_argument("--memory", nargs=3, metavar=("SIDE", "GEOMETRY", "BATCH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        side, name, batch = arguments.memory
        print(json.dumps(measure_memory(side, name, int(batch))))
        return
    rounds = arguments.rounds
    if arguments.quick:
        rows = bench_step("reduced", 4, 2) + bench_stages("reduced", 8, 4, 1) + bench_memory("reduced", 4)
        print(table(rows, machine(), []))
        return
    rows = bench_patches(rounds)
    rows += bench_step("ViT-B/32", 16, rounds) + bench_memory("ViT-B/32", 16)
    rows += bench_step("ViT-L/14", 2, rounds) + bench_memory("ViT-L/14", 2)
    rows += bench_stages("ViT-B/32", 32, 16, max(rounds - 1, 1))
    rows += bench_prefix(rounds)
    gpu = bench_gpu(rounds) if torch.cuda.is_available() else []
    on = machine()
    content = {"machine": on, "rows": [asdict(r) for r in rows], "gpu": gpu}
    (HERE / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    (HERE / "results.md").write_text(table(rows, on, gpu))
    print(table(rows, on, gpu))


if __name__ == "__main__":
    main()
