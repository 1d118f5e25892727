"""The registry: each entry's defining property, on gradients small enough to check."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from settings import validate
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from dgs.data.manifest import ImageSource
from dgs.data.prepared import Prepared
from dgs.errors import UserError
from dgs.model.methods.base import Method, Precomputed
from dgs.model.methods.experts import cross_fitted, expert_terms, fit_text_head
from dgs.model.methods.registry import ENDED, METHODS, get_method
from dgs.model.step import surgery_step
from dgs.model.train import method_captions, stage1, text_side
from dgs.params import Params

COUNT, WIDTH = 12, 8


def settings(**surgery: object) -> Params:
    return validate({"data": {"layout": "folders", "rho": None}, "train": {"surgery": {"eps": 0.0, **surgery}}})


def some_heads() -> dict[str, nn.Linear]:
    torch.manual_seed(5)
    return {name: nn.Linear(WIDTH, 1).double() for name in ("image", "text", "teacher")}


def some_known(seed: int = 0) -> Precomputed:
    generator = torch.Generator().manual_seed(seed)
    captions, teacher = torch.randn(2, COUNT, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.arange(COUNT).remainder(2).double()
    residual = torch.rand(COUNT, generator=generator, dtype=torch.float64) * 0.5 - labels
    power = teacher.square().sum(1).mean().expand(COUNT)
    return Precomputed(labels, captions, teacher, power, residual, torch.zeros_like(labels), torch.ones_like(labels))


def step(name: str, known: Precomputed | None = None, seed: int = 1, **surgery: object) -> dict[str, Tensor]:
    """Gradients by name, of one step at features drawn from `seed`; "loss" is the task's."""
    generator = torch.Generator().manual_seed(seed)
    features, noise = torch.randn(2, COUNT, WIDTH, generator=generator, dtype=torch.float64)
    method = get_method(name)
    params = method.of(settings(**surgery))
    applied, losses, gradients = surgery_step(method, features, some_heads(), known or some_known(), noise, params)
    assert torch.equal(applied, gradients["applied"])
    return {**gradients, "features": features, "loss": torch.tensor(losses["loss_task"])}


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-12)


def along(a: Tensor, b: Tensor) -> Tensor:
    """Cosines between rows."""
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def test_every_method_has_a_name_and_says_where_it_comes_from() -> None:
    assert all(name == method.name and len(method.reference) > 20 for name, method in METHODS.items())
    assert list(METHODS)[:3] == ["probe", "lora", "dgs"]


def test_unknown_method_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"Unknown method 'loar'\. Did you mean 'lora'\? Known: probe, lora, dgs"):
        get_method("loar")
    with pytest.raises(UserError, match="Unknown method '3'"):
        get_method(3)  # type: ignore[arg-type]


def test_a_method_that_ended_says_why_and_names_the_one_to_take() -> None:
    with pytest.raises(UserError, match=r"found upgrad, which has ended: of two .* UPGrad is PCGrad, so use pcgrad\."):
        get_method("upgrad")
    assert not set(ENDED) & set(METHODS)


def test_lora_sends_the_task_gradient_untouched() -> None:
    out = step("lora")
    assert torch.equal(out["applied"], out["task"])


def test_suppression_is_orthogonal_to_the_harmful_direction_and_knows_no_teacher() -> None:
    known = some_known()
    out = step("suppression_only", known)
    assert along(out["applied"], out["harmful"]).abs().max() < 1e-12
    assert along(out["task"], out["harmful"]).abs().max() > 0.1
    other = replace(known, residual=-known.residual, teacher=known.teacher + 1)
    assert same(step("suppression_only", other)["applied"], out["applied"])


def test_alignment_adds_the_beneficial_direction_and_knows_no_captions() -> None:
    known = some_known()
    out = step("alignment_only", known, lam=0.7)
    assert same(out["applied"], out["task"] + 0.7 * out["beneficial"] / COUNT)
    assert same(step("alignment_only", replace(known, captions=-known.captions), lam=0.7)["applied"], out["applied"])


def test_dgs_in_the_papers_order_is_suppression_plus_alignment() -> None:
    parts = step("suppression_only")["applied"] + step("alignment_only")["applied"] - step("lora")["applied"]
    assert same(step("paper_order")["applied"], parts)
    assert same(step("paper_order")["applied"], step("dgs", order="paper")["applied"])
    assert not same(step("paper_order")["applied"], step("dgs")["applied"])


def test_distillation_pulls_to_the_teacher_and_ends_there() -> None:
    known = some_known()
    out = step("distillation", known, distill=0.5)
    pull = out["applied"] - out["task"]
    assert torch.allclose(along(pull, out["features"] - known.teacher), torch.ones(COUNT, dtype=torch.float64))
    there = step("distillation", replace(known, teacher=out["features"]))
    assert same(there["applied"], there["task"])
    assert same(step("distillation", known, distill=1.0)["applied"] - out["task"], 2 * pull)


def test_distillation_does_not_depend_on_the_scale_of_features() -> None:
    """Its gradient, times the features, is the same at ten times the features."""
    method = get_method("distillation")
    known = some_known()
    found = []
    for scale in (1.0, 10.0):
        features = scale * torch.ones(COUNT, WIDTH, dtype=torch.float64)
        scaled = replace(known, teacher=scale * known.teacher, feature_norm2=scale**2 * known.feature_norm2)
        heads = some_heads()
        heads["image"].weight.data /= scale
        applied, losses, gradients = surgery_step(method, features, heads, scaled, features, settings())
        found.append((scale * (applied - gradients["task"]), losses["loss_alignment"]))
    assert same(found[0][0], found[1][0])
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-12)


@pytest.mark.parametrize("name", ["product_of_experts", "poe_distillation"])
def test_a_product_of_experts_asks_little_where_the_expert_already_knows(name: str) -> None:
    known = some_known()
    sure = replace(known, expert=6 * (2 * known.labels - 1))
    alone, helped = step(name, known), step(name, sure)
    assert (helped["task"].norm(dim=1) < 0.05 * alone["task"].norm(dim=1)).all()
    wrong = step(name, replace(known, expert=-sure.expert))
    assert (wrong["task"].norm(dim=1) > alone["task"].norm(dim=1)).all()
    pull = helped["applied"] - helped["task"]
    assert (pull.abs().max() > 0) == (name == "poe_distillation")


def test_holding_the_shared_space_leaves_levels_free() -> None:
    """Six columns of CLIP's features, two of levels: the anchor pulls at the six alone, the expert takes its part."""
    known = replace(some_known(), captions=some_known().captions[:, : WIDTH - 2])
    heads = {**some_heads(), "text": nn.Linear(WIDTH - 2, 1).double()}
    features = known.teacher + 1.0
    noise = torch.zeros(COUNT, WIDTH - 2, dtype=torch.float64)
    method = get_method("levels_poe_distillation")
    applied, _, gradients = surgery_step(method, features, heads, known, noise, settings())
    pull = applied - gradients["task"]
    assert (pull[:, : WIDTH - 2] > 0).all() and not pull[:, WIDTH - 2 :].any()
    assert not gradients["harmful"][:, WIDTH - 2 :].any()  # the text side knows nothing of levels
    sure = replace(known, expert=6 * (2 * known.labels - 1))
    _, _, helped = surgery_step(method, features, heads, sure, noise, settings())
    assert (helped["task"].norm(dim=1) < 0.05 * gradients["task"].norm(dim=1)).all()


def test_general_knowledge_is_the_teachers_opinion() -> None:
    """A teacher that is right says what the task says; one that is sure of the other label stands against it."""
    known, heads = some_known(), some_heads()
    features = torch.randn(COUNT, WIDTH, dtype=torch.float64)
    right = replace(known, residual=torch.zeros_like(known.labels))
    noise = torch.zeros_like(features)
    applied, _, gradients = surgery_step(get_method("prograd"), features, heads, right, noise, settings())
    assert same(applied, gradients["task"])
    wrong = replace(known, residual=1 - 2 * known.labels)
    applied, _, gradients = surgery_step(get_method("prograd"), features, heads, wrong, noise, settings())
    assert applied.norm() < gradients["task"].norm()


def test_a_control_takes_the_settings_of_what_it_controls() -> None:
    controls = {name for name, method in METHODS.items() if "dgs" in method.settings_of}
    assert controls == {
        "random_direction", "shuffled_captions", "signed", "random_alignment", "per_sample", "paper_order"
    }  # fmt: skip
    assert {METHODS[name].settings_of for name in controls} == {("dgs",)}


def shortcut(count: int = 2_000) -> tuple[Tensor, np.ndarray, Tensor]:
    """Features (strong shortcut, weak evidence), captions that tell the shortcut, labels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, count)
    group = np.where(rng.random(count) < 0.9, labels, 1 - labels)
    features = np.stack([4 * group - 2, labels - 0.5], 1) + rng.normal(size=(count, 2)) * [0.1, 1.0]
    captions = np.stack([group, 1 - group, rng.normal(size=count)], 1)
    return torch.tensor(features, dtype=torch.float32), captions.astype(np.float32), torch.tensor(labels).float()


def reliance(features: Tensor, labels: Tensor, **terms: Tensor) -> float:
    """How far a probe rests on the shortcut rather than on evidence, by weight times spread of the feature."""
    params = validate({"data": {"layout": "folders", "rho": None}, "train": {"stage1": {"epochs": 40, "lr": 0.02}}})
    by_feature = (stage1(features[None], labels, params, 0, **terms).weight[0] * features.std(0)).abs()
    return float(by_feature[0] / by_feature[1])


def test_a_probe_with_a_text_expert_leaves_the_shortcut_to_it() -> None:
    features, captions, labels = shortcut()
    expert, _ = expert_terms("add", cross_fitted(captions, labels.numpy().astype(np.int64), 0), labels)
    assert reliance(features, labels) > 1
    assert reliance(features, labels, expert=expert) < 0.2


def test_weighed_images_leave_the_shortcut_to_nobody() -> None:
    """A probe rests on the shortcut less than plainly, and no expert stands beside it."""
    features, captions, labels = shortcut()
    expert, weights = expert_terms("reweight", cross_fitted(captions, labels.numpy().astype(np.int64), 0), labels)
    assert weights.mean() == pytest.approx(1, abs=1e-6)
    group = torch.tensor(captions[:, 0])
    share = [(weights * (group == side) * (labels == 1)).sum() / (weights * (group == side)).sum() for side in (0, 1)]
    assert share == pytest.approx([0.5, 0.5], abs=0.03)  # of fakes, where it was 0.1 and 0.9
    assert reliance(features, labels, weight=weights) < 0.3 * reliance(features, labels)
    assert not expert.any()


def test_a_weighed_image_counts_as_many_times() -> None:
    known = some_known()
    weight = torch.linspace(0, 2, COUNT, dtype=torch.float64)
    plain, weighed = step("weighed_lora", known), step("weighed_lora", replace(known, weight=weight))
    assert same(weighed["task"], weight[:, None] * plain["task"])
    assert same(weighed["applied"], weighed["task"])
    assert same(step("lora", known)["task"], plain["task"])


def test_two_methods_reweight_and_no_other_weight_leaves_one() -> None:
    _, captions, labels = shortcut()
    assert {name for name, method in METHODS.items() if method.expert and method.expert_use == "reweight"} == {
        "weighed_probe", "weighed_lora"
    }  # fmt: skip
    for use in ("add", None):
        logits, weights = expert_terms(use, cross_fitted(captions, labels.numpy().astype(np.int64), 0), labels)
        assert (weights == 1).all() and logits.any() == (use == "add")


def test_an_expert_is_cross_fitted() -> None:
    """Captions that name each image would be learned by heart; from the other folds they say nothing."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    own = np.eye(60, dtype=np.float32)
    logits = cross_fitted(own, labels, 0)
    assert abs(np.mean((logits > 0) == labels) - 0.5) < 0.2 and np.abs(logits).max() < 2
    _, captions, told = shortcut()
    found = cross_fitted(captions, told.numpy().astype(np.int64), 0)
    assert np.mean((found > 0) == told.numpy()) == pytest.approx(0.9, abs=0.02)
    assert np.array_equal(found, cross_fitted(captions, told.numpy().astype(np.int64), 0))
    with pytest.raises(UserError, match=r"at least 5 training images of each label.*found 2"):
        cross_fitted(own[:6], np.array([0, 0, 0, 0, 1, 1]), 0)


def test_the_converged_text_head_is_the_experts_regression_on_captions_as_they_are() -> None:
    """Captions far from the origin and of unlike spreads, as embeddings are: what learns by Adam is slow there."""
    _, captions, labels = shortcut()
    moved = 6.0 + captions * np.array([0.1, 3.0, 1.0], np.float32)
    truth = labels.numpy().astype(np.int64)
    head, loss = fit_text_head(torch.from_numpy(moved), labels)
    expert = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1_000)).fit(moved, truth)
    logits = expert.decision_function(moved)
    assert np.allclose(head(torch.from_numpy(moved)).squeeze(1).numpy(), logits, atol=1e-3)
    assert loss == pytest.approx(-0.9 * np.log(0.9) - 0.1 * np.log(0.1), abs=0.02)  # the entropy of the shortcut
    assert not any(parameter.requires_grad for parameter in head.parameters())


def fitted(seed: int = 0) -> tuple[Precomputed, nn.Linear]:
    """Images whose captions tell the shortcut, and their text head fitted before stage 2."""
    _, text, labels = shortcut(200)
    ones, captions = torch.ones_like(labels), torch.from_numpy(text)
    known = Precomputed(labels, captions, captions, ones, 0.5 - labels, 0 * ones, ones)
    heads, (known,), constants = text_side([known], settings(text_head="fitted"), seed)
    assert np.isfinite(constants["loss_text_floor"])
    return known, heads["text"]


def test_a_fitted_text_head_gives_its_cross_fitted_residuals_and_its_weight_and_learns_no_more() -> None:
    known, head = fitted()
    expected = cross_fitted(known.captions.numpy(), known.labels.numpy().astype(np.int64), 0)
    assert known.text_logits is not None and np.allclose(known.text_logits, expected)
    before = head.weight.clone()
    heads = {"image": nn.Linear(3, 1), "text": head, "teacher": nn.Linear(3, 1)}
    _, values, found = surgery_step(METHODS["dgs"], known.teacher, heads, known, known.captions, settings())
    residual = known.text_logits.sigmoid() - known.labels
    assert torch.allclose(found["harmful"], (residual[:, None] * head.weight[0] / 200).clamp(min=0), atol=1e-9)
    assert values["text_acc"] == pytest.approx(0.9, abs=0.06)
    assert head.weight.grad is None and torch.equal(head.weight, before)


def test_a_captions_own_label_does_not_decide_a_fitted_heads_residual() -> None:
    """Captions that name each image: learned by heart, every residual would be nothing."""
    labels = torch.arange(60).remainder(2).float()
    ones, captions = torch.ones_like(labels), torch.eye(60)
    known = Precomputed(labels, captions, captions, ones, 0.5 - labels, 0 * ones, ones)
    heads, (known,), constants = text_side([known], settings(text_head="fitted"), 0)
    assert constants["loss_text_floor"] < 0.3 and known.text_logits is not None
    assert (known.text_logits.sigmoid() - labels).abs().min() > 0.3
    assert ((heads["text"](captions).squeeze(1) > 0) == (labels == 1)).all()


def test_a_text_head_that_cannot_be_fitted_is_refused_and_one_that_learns_has_no_floor_then() -> None:
    labels = torch.zeros(20)
    ones, captions = torch.ones_like(labels), torch.randn(20, 4)
    known = Precomputed(labels, captions, captions, ones, 0.5 - labels, 0 * ones, ones)
    _, (given,), constants = text_side([known], settings(), 0)
    assert given is known and np.isnan(constants["loss_text_floor"])
    with pytest.raises(UserError, match="at least 5 training images of each label"):
        text_side([known], settings(text_head="fitted"), 0)


@pytest.mark.parametrize("name", ["dgs", "suppression_only", "signed", "random_direction", "paper_order"])
def test_every_method_that_asks_the_text_head_gets_the_fitted_ones_directions(name: str) -> None:
    """A random direction its length; those that ask nothing go on as they were."""
    known = some_known()
    other = replace(known, text_logits=torch.full_like(known.labels, 3.0))
    assert not same(step(name, known, eps=0.1)["applied"], step(name, other, eps=0.1)["applied"])
    for unmoved in ("lora", "alignment_only"):
        assert same(step(unmoved, known)["applied"], step(unmoved, other)["applied"])


def test_a_random_direction_is_as_long_as_the_harmful_one_and_knows_no_captions() -> None:
    known = some_known()
    out = step("random_direction", known, lam=0.0)
    removed = out["task"] - out["applied"]
    assert (removed.norm(dim=1) > 0).all()
    assert along(removed, out["harmful"]).abs().max() < 0.99
    other = step("random_direction", replace(known, captions=-known.captions), lam=0.0)
    assert same(other["applied"], out["applied"])
    large = step("random_direction", known, lam=0.0, eps=1.0)
    text = step("suppression_only", known, eps=1.0)
    for direction, projected in ((removed, large), (text["harmful"], text)):
        unit = direction / direction.norm(dim=1, keepdim=True)
        share = 1 - (projected["applied"] * unit).sum(1) / (projected["task"] * unit).sum(1)
        length = out["harmful"].norm(dim=1)
        assert same(share, (length / (length + 1.0)) ** 2)  # the epsilon sees the length


def test_signed_directions_are_one_line_for_both_classes() -> None:
    out = step("signed", lam=0.0)
    weight = some_heads()["text"].weight[0].expand(COUNT, -1)
    assert along(out["applied"], weight).abs().max() < 1e-12
    halves = step("suppression_only")["harmful"]
    assert torch.linalg.matrix_rank(halves) == 2


def test_random_alignment_keeps_lengths_and_draws_signs() -> None:
    plain = step("alignment_only", lam=1.0)
    teacher = COUNT * (plain["applied"] - plain["task"])
    drawn = step("random_alignment", lam=1.0, eps=1e9)  # nothing is projected
    pulled = COUNT * (drawn["applied"] - drawn["task"])
    assert ((pulled == 0).double().mean() - 0.5).abs() < 0.15 and (pulled <= 1e-12).all()
    kept = (pulled != 0) & (teacher < -1e-9)
    assert torch.allclose(pulled[kept], teacher[kept], rtol=0, atol=1e-9)


def test_per_sample_is_dgs_with_that_scale() -> None:
    assert same(step("per_sample")["applied"], step("dgs", scale="per_sample")["applied"])
    assert not same(step("per_sample")["applied"], step("dgs")["applied"])
    assert METHODS["dgs"].of(settings()) == settings()


def prepared() -> Prepared:
    rows: list[dict[str, Any]] = [{"split": "train", "label": i % 2} for i in range(COUNT)]
    captions = np.random.default_rng(0).normal(size=(COUNT, WIDTH)).astype(np.float32)
    return Prepared(pd.DataFrame(rows), {}, captions, {}, None, ImageSource(None))  # type: ignore[arg-type]


def test_shuffled_captions_are_the_same_captions_with_other_images() -> None:
    data = prepared()
    own, shuffled, again = (
        method_captions(get_method(name), data, 3) for name in ("dgs", "shuffled_captions", "shuffled_captions")
    )
    assert np.array_equal(own, data.caption_embeddings)
    assert np.array_equal(np.sort(shuffled, 0), np.sort(own, 0))
    assert (shuffled != own).any(1).mean() > 0.5
    assert np.array_equal(shuffled, again)


def in_parts(method: Method, known: Precomputed, parts: int) -> Tensor:
    """What is sent into the tower for every image of a batch that is worked off in so many parts."""
    features, noise = torch.randn(2, COUNT, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    params, heads, size = settings(), some_heads(), COUNT // parts
    slices = [slice(start, start + size) for start in range(0, COUNT, size)]
    sent = [surgery_step(method, features[s], heads, known[s], noise[s], params, COUNT)[0] for s in slices]
    return torch.cat(sent)


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_in_parts_is_the_whole_batch_or_refused(name: str) -> None:
    """Every method of the registry: gradients are a sample's own, or the method says that it needs whole batches."""
    method, known = get_method(name), some_known()
    known = replace(known, teacher=-known.teacher)
    assert same(in_parts(method, known, 1), in_parts(method, known, 3)) == (not method.whole_batch)
    content = settings().model_dump()
    for split in ("accumulate", "processes"):
        params = validate({**content, "train": {**content["train"], split: 3}})
        if not method.whole_batch:
            assert method.of(params).train.accumulate == params.train.accumulate
            continue
        with pytest.raises(UserError, match=rf"to be 1 for {name}, which takes .* found (3 and 1|1 and 3)\. Set both"):
            method.of(params)
