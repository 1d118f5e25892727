"""The registry of methods: each entry says what is trained, which losses and which map of the gradient it has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from dgs.errors import UserError, did_you_mean
from dgs.model.fusion import LateFusion
from dgs.model.methods.aggregation import pcgrad, prograd
from dgs.model.methods.base import (
    Method,
    aggregated,
    agreement,
    distillation,
    prior_alignment,
    random_alignment,
    random_harm,
    signed_text,
    suppression,
    text_harm,
)
from dgs.model.methods.constraints import effort_projection, squared_update
from dgs.model.methods.erasure import leace, null_space, standardise
from dgs.model.pixel_cnn import PixelCNN

_CORE = (
    Method(
        "probe",
        "Frozen CLIP, one linear layer: stage 1 of DGS-Net; UniversalFakeDetect (Ojha et al. 2023).",
        adapters=False,
    ),
    Method("lora", "LoRA on q, k, v and a linear head (Hu et al. 2021); DGS-Net's stage 2 without its surgery."),
    Method(
        "dgs",
        "DGS-Net (arXiv 2511.13108): orthogonal suppression and prior alignment, the release's formulas.",
        prior=prior_alignment,
        gradient=suppression(text_harm),
        tuned_param="lam",
    ),
    Method("suppression_only", "DGS-Net's orthogonal suppression alone.", gradient=suppression(text_harm)),
    Method("alignment_only", "DGS-Net's prior alignment alone.", prior=prior_alignment, tuned_param="lam"),
    Method(
        "distillation",
        "Features held near the frozen tower's (Li & Hoiem 2016 with features for outputs).",
        prior=distillation,
        tuned_param="distill",
    ),
    Method(
        "poe_probe",
        "Product of experts (Clark et al. 2019) on frozen CLIP, with a text expert as the biased one.",
        adapters=False,
        expert="text",
    ),
    Method(
        "product_of_experts",
        "Product of experts (Clark et al. 2019) with LoRA, with a text expert as the biased one.",
        expert="text",
    ),
    Method(
        "poe_distillation",
        "product_of_experts and distillation together.",
        prior=distillation,
        expert="text",
        tuned_param="distill",
    ),
    Method(
        "leace",
        "LEACE (Belrose et al. 2023) on frozen CLIP: what features tell of captions is erased, then a probe.",
        adapters=False,
        feature_map=leace,
        tuned_param="directions",
    ),
    Method(
        "dgs_plus",
        "DGS-Net's idea with other means: a text expert takes over what captions explain; the frozen tower's output is "
        "held, its probe is where the head starts; weights are averaged along the way.",
        prior=distillation,
        expert="text",
        init_head_from_probe=True,
        average="swad",
        tuned_param="distill",
    ),
)

_PARTS = (
    Method(
        "poe_swad",
        "dgs_plus without holding the tower's output: SWAD with a text expert.",
        expert="text",
        init_head_from_probe=True,
        average="swad",
    ),
    Method(
        "levels_probe",
        "Frozen CLIP, a linear layer on tokens of several depths (RINE, Koutlis & Papadopoulos 2024), here on their "
        "mean and spread.",
        adapters=False,
        levels=True,
        feature_map=standardise,
    ),
    Method(
        "levels_poe_probe",
        "levels_probe with poe_probe's text expert.",
        adapters=False,
        levels=True,
        feature_map=standardise,
        expert="text",
    ),
    Method(
        "levels_distillation",
        "Reading levels, and distillation of the tower's output.",
        prior=distillation,
        levels=True,
        feature_map=standardise,
        tuned_param="distill",
    ),
    Method(
        "levels_poe",
        "Reading levels, with a text expert.",
        levels=True,
        feature_map=standardise,
        expert="text",
    ),
    Method(
        "levels_poe_distillation",
        "poe_distillation that reads levels: what dgs_plus was in the first study.",
        prior=distillation,
        expert="text",
        levels=True,
        feature_map=standardise,
        tuned_param="distill",
    ),
)


def _control(name: str, reference: str, **changes: Any) -> Method:
    """dgs with one thing changed, and with the settings that dgs was tuned to."""
    return replace(_CORE[2], name=name, reference=reference, settings_of=("dgs",), tuned_param=None, **changes)


_CONTROLS = (
    _control(
        "random_direction",
        "Control of dgs: a random direction in the harmful one's place, equally long, anew in each step.",
        gradient=suppression(random_harm),
    ),
    _control("shuffled_captions", "Control of dgs: captions of other images.", shuffled=True),
    _control(
        "signed",
        "Control of dgs: the whole text gradient instead of its non-negative half.",
        gradient=suppression(signed_text),
    ),
    _control("random_alignment", "Control of dgs: alignment with random signs.", prior=random_alignment),
    _control("per_sample", "dgs without the release's 1/B in its directions.", settings={"scale": "per_sample"}),
    _control(
        "paper_order",
        "dgs in the paper's order: suppress the task gradient, then add alignment.",
        settings={"order": "paper"},
    ),
)

_NEIGHBOURS = (
    Method(
        "weighed_probe",
        "Frozen CLIP, a linear layer that learns from images weighed by 1 / P(label given caption), the text expert "
        "giving P (inverse propensity weighting, Horvitz & Thompson 1952).",
        adapters=False,
        expert="text",
        expert_use="reweight",
    ),
    Method(
        "weighed_lora",
        "LoRA whose images are weighed by 1 / P(label given caption), as weighed_probe's are.",
        expert="text",
        expert_use="reweight",
    ),
    Method(
        "lp_ft",
        "LP-FT (Kumar et al. 2022) with LoRA: fine-tuning starts from the probe's head.",
        init_head_from_probe=True,
    ),
    Method(
        "wise_ft",
        "WiSE-FT (Wortsman et al. 2022) with LoRA: tuned weights and head averaged with frozen tower and probe.",
        init_head_from_probe=True,
        average="wise_ft",
        tuned_param="mix",
    ),
    Method(
        "swad",
        "SWAD (Cha et al. 2021) with LoRA: weights and head are averaged over the last two thirds of steps.",
        average="swad",
    ),
    Method(
        "l2_sp",
        "L2-SP (Li et al. 2018) with LoRA: the squared distance to the pre-trained weights as a penalty.",
        penalty=squared_update,
        tuned_param="decay",
    ),
    Method(
        "pcgrad",
        "PCGrad (Yu et al. 2020) of the task's and distillation's gradients, at the features.",
        prior=distillation,
        gradient=aggregated(pcgrad),
        whole_batch=True,
        tuned_param="distill",
    ),
    Method(
        "prograd",
        "ProGrad (Zhu et al. 2023) at the features, with the frozen probe's opinion as general knowledge.",
        prior=agreement,
        gradient=aggregated(prograd),
        whole_batch=True,
    ),
    Method(
        "effort",
        "Effort (Yan et al. 2025) with LoRA: updates stay in the weights' smallest singular directions.",
        project=effort_projection,
    ),
    Method(
        "null_space",
        "A probe on frozen CLIP off the principal directions of caption embeddings.",
        adapters=False,
        feature_map=null_space,
        tuned_param="directions",
    ),
)

_WITHOUT_CLIP = (
    Method(
        "pixel_cnn",
        "A convolutional network of 20,000 parameters from scratch, on pixels and their grain: is CLIP needed at all?",
        adapters=False,
        model=PixelCNN,
    ),
)

_CONTENT = (
    Method(
        "content_probe",
        "poe_probe without captions: the biased expert reads frozen CLIP on pictures whose traces are destroyed.",
        adapters=False,
        expert="content",
        settings_of=("poe_probe",),
    ),
    Method(
        "content_poe_distillation",
        "poe_distillation without captions, with content_probe's expert.",
        prior=distillation,
        expert="content",
        settings_of=("poe_distillation",),
    ),
    Method(
        "content_pixel_cnn",
        "pixel_cnn with content_probe's expert.",
        adapters=False,
        model=PixelCNN,
        expert="content",
        settings_of=("pixel_cnn",),
    ),
)

_COMPOSED = (
    Method(
        "late_fusion",
        "The sum of content_poe_distillation's and content_pixel_cnn's logits, each divided by its standard deviation "
        "on validation images.",
        adapters=False,
        model=LateFusion,
        members=_CONTENT[1:],
        settings_of=("poe_distillation", "pixel_cnn"),
    ),
)

METHODS: dict[str, Method] = {
    method.name: method for method in (*_CORE, *_PARTS, *_CONTROLS, *_NEIGHBOURS, *_WITHOUT_CLIP, *_CONTENT, *_COMPOSED)
}

ENDED = {  # methods that results still name, and why there is none any more
    "upgrad": "of two gradients exact UPGrad is PCGrad, so use pcgrad"
}


def require_text(names: Iterable[str], text: str) -> None:
    """Raise UserError where model.text = `text` is "none" and one of the methods learns from captions."""
    if text == "none" and (reading := [name for name in names if get_method(name).needs_text]):
        others = ", ".join(name for name, method in METHODS.items() if not method.needs_text)
        raise UserError(
            f"Expected methods that read no captions with model.text: none, found {', '.join(reading)}. Leave out "
            f"what reads captions, or set model.text to own or aligned; these run without: {others}."
        )


def get_method(name: str) -> Method:
    """A method by name.

    Raises:
        UserError: no such method, the message lists those there are; or one that has ended.
    """
    if isinstance(name, str) and name in ENDED:
        raise UserError(f"Expected a method of the registry, found {name}, which has ended: {ENDED[name]}.")
    if not isinstance(name, str) or name not in METHODS:  # a notebook's `method` may be anything
        raise UserError(f"Unknown method '{name}'.{did_you_mean(str(name), METHODS)} Known: {', '.join(METHODS)}.")
    return METHODS[name]
