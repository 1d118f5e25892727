"""What a head reads features through: erasers and scales, and heads that have taken them in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from settings import SurgeryParams
from sklearn.linear_model import LinearRegression
from torch import Tensor, nn

from dgs.model.methods.erasure import Affine, leace, null_space, standardise

COUNT, WIDTH = 400, 10


def images_and_captions() -> tuple[Tensor, Tensor]:
    """(N, D) features and captions: three caption directions show in the features, in other directions there."""
    generator = torch.Generator().manual_seed(0)
    meaning = torch.randn(COUNT, 3, generator=generator)
    towards, said = torch.randn(3, WIDTH, generator=generator), torch.randn(3, WIDTH, generator=generator)
    features = meaning @ towards + 0.5 * torch.randn(COUNT, WIDTH, generator=generator) + 2.0
    return features, meaning @ said + 0.01 * torch.randn(COUNT, WIDTH, generator=generator)


def explained(features: Tensor, captions: Tensor) -> float:
    """R^2 of captions by a linear map of features."""
    x, y = features.numpy(), captions.numpy()
    return float(LinearRegression().fit(x, y).score(x, y))


@pytest.mark.parametrize("lens", [leace, null_space, standardise])
def test_a_head_that_has_taken_the_map_in_decides_as_one_behind_it(lens: object) -> None:
    features, captions = images_and_captions()
    fitted = lens(features, captions, SurgeryParams(directions=3))  # type: ignore[operator]
    head = nn.Linear(WIDTH, 1)
    assert torch.allclose(nn.Sequential(fitted, head)(features), fitted.fold_into(head)(features), atol=1e-4)
    assert not fitted.fold_into(head).weight.requires_grad


def test_after_leace_no_linear_map_of_features_predicts_captions() -> None:
    features, captions = images_and_captions()
    erased = leace(features, captions, SurgeryParams(directions=3))(features)
    assert explained(features, captions) > 0.8
    assert explained(erased, captions) < 0.01
    assert torch.linalg.matrix_rank(erased - erased.mean(0), atol=1e-2) == WIDTH - 3
    assert torch.allclose(erased.mean(0), features.mean(0), atol=1e-4)


def test_the_null_space_of_captions_leaves_what_shows_in_other_directions() -> None:
    """Why LEACE and not this: features tell captions in directions that captions themselves do not have."""
    features, captions = images_and_captions()
    lens = null_space(features, captions, SurgeryParams(directions=3))
    span = torch.linalg.svd(captions - captions.mean(0)).Vh[:3]
    assert (lens(features) @ span.T).abs().max() < 1e-4
    assert explained(lens(features), captions) > 0.5


def test_standardised_features_have_mean_zero_and_spread_one_and_a_constant_one_stays_finite() -> None:
    features, captions = images_and_captions()
    features[:, 0] = 3.0
    seen = standardise(features, captions, SurgeryParams())(features)
    assert seen.mean(0).abs().max() < 1e-4
    assert np.allclose(seen.std(0)[1:], 1, atol=1e-4) and torch.isfinite(seen).all()


def test_maps_compose_over_leading_dimensions() -> None:
    lens = Affine(2 * torch.eye(3), torch.ones(3))
    assert torch.equal(lens(torch.ones(4, 5, 3)), torch.full((4, 5, 3), 3.0))
