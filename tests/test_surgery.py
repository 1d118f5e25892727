"""The equations of gradient surgery, as properties and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from dgs.model.surgery import alignment_loss, head_gradients, residual_directions, split_signs, suppress

shapes = st.tuples(st.integers(1, 8), st.integers(1, 16))


def gradients(shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    grad, other = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return grad, other


@given(shapes, st.integers(0, 1000))
def test_signs_split_into_nonnegative_harm_and_nonpositive_benefit_that_sum_to_the_gradient(
    shape: tuple[int, int], seed: int
) -> None:
    grad, _ = gradients(shape, seed)
    harmful, beneficial = split_signs(grad)
    assert (harmful >= 0).all() and (beneficial <= 0).all()
    assert torch.equal(harmful + beneficial, grad)
    assert torch.equal((harmful * beneficial).sum(1), torch.zeros(shape[0], dtype=torch.float64))


def test_harmful_is_the_part_that_raises_the_loss() -> None:
    harmful, beneficial = split_signs(torch.tensor([[3.0, -4.0, 0.0]]))
    assert harmful.tolist() == [[3.0, 0.0, 0.0]]
    assert beneficial.tolist() == [[0.0, -4.0, 0.0]]


def test_suppression_by_hand_in_two_dimensions() -> None:
    # g = (1, 1), h along x: what remains is (0, 1); along 45 degrees nothing remains.
    grad = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, -1.0]])
    harmful = torch.tensor([[2.0, 0.0], [5.0, 5.0], [5.0, 5.0]])
    assert torch.allclose(
        suppress(grad, harmful, eps=0), torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, -1.0]]), atol=1e-7
    )


@given(shapes, st.integers(0, 1000))
def test_exact_suppression_is_orthogonal_idempotent_and_blind_to_the_length_of_harm(
    shape: tuple[int, int], seed: int
) -> None:
    grad, other = gradients(shape, seed)
    harmful, _ = split_signs(other)
    once = suppress(grad, harmful, eps=0)
    assert torch.allclose((once * harmful).sum(1), torch.zeros(shape[0], dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.allclose(suppress(once, harmful, eps=0), once, rtol=0, atol=1e-12)
    assert torch.allclose(suppress(grad, 37.0 * harmful, eps=0), once, rtol=0, atol=1e-12)
    assert (once.norm(dim=1) <= grad.norm(dim=1) + 1e-12).all()


@given(shapes, st.integers(0, 1000), st.sampled_from([1e-6, 1e-2, 1.0]))
def test_epsilon_removes_the_share_s_squared_of_the_harmful_component(
    shape: tuple[int, int], seed: int, eps: float
) -> None:
    grad, other = gradients(shape, seed)
    harmful, _ = split_signs(other)
    norm = harmful.norm(dim=1)
    unit = torch.where(norm[:, None] > 0, harmful / norm[:, None], 0)
    s = norm / (norm + eps)
    before, after = (grad * unit).sum(1), (suppress(grad, harmful, eps) * unit).sum(1)
    assert torch.allclose(after, (1 - s**2) * before, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("residual", "share"), [(1e-2, 0.985), (1e-3, 0.866), (1e-4, 0.328), (1e-5, 0.014)])
def test_confident_samples_escape_through_the_releases_epsilon(residual: float, share: float) -> None:
    """The measured table: B = 32, |relu(w)| = 0.43, eps = 1e-6."""
    weight = torch.tensor([0.43, -1.0], dtype=torch.float64)
    harmful, _ = split_signs(residual_directions(torch.tensor([residual], dtype=torch.float64), weight) / 32)
    grad = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert 1 - suppress(grad, harmful, 1e-6)[0, 0].item() == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_a_row_without_harm_is_left_as_it_is(eps: float) -> None:
    grad = torch.randn(3, 4)
    harmful = torch.zeros(3, 4)
    harmful[1] = 1.0
    after = suppress(grad, harmful, eps)
    assert torch.equal(after[[0, 2]], grad[[0, 2]])
    assert not torch.allclose(after[1], grad[1])


@given(shapes, st.integers(0, 1000))
def test_alignment_pulls_features_along_the_teachers_beneficial_direction(shape: tuple[int, int], seed: int) -> None:
    features, teacher = gradients(shape, seed)
    features.requires_grad_()
    loss = alignment_loss(features, teacher)
    oracle = sum(float(f @ g.clamp(max=0)) for f, g in zip(features.detach(), teacher, strict=True)) / shape[0]
    assert loss.item() == pytest.approx(oracle, abs=1e-12)
    loss.backward()
    assert features.grad is not None
    assert torch.allclose(features.grad, teacher.clamp(max=0) / shape[0], rtol=0, atol=1e-15)


def test_alignment_sends_no_gradient_to_the_teacher() -> None:
    teacher = torch.randn(3, 4, requires_grad=True)
    features = torch.randn(3, 4, requires_grad=True)
    alignment_loss(features, teacher).backward()
    assert teacher.grad is None


@given(st.integers(1, 64), st.integers(0, 1000))
@settings(deadline=None)
def test_residual_directions_equal_autograd_through_a_linear_head(batch: int, seed: int) -> None:
    torch.manual_seed(seed)
    head = nn.Linear(5, 1).double()
    features = torch.randn(batch, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 2, (batch,)).double()
    logits = head(features).squeeze(1)
    F.binary_cross_entropy_with_logits(logits, labels, reduction="sum").backward()
    closed = residual_directions(logits.detach().sigmoid() - labels, head.weight.detach()[0])
    assert features.grad is not None
    assert torch.allclose(closed, features.grad, rtol=0, atol=1e-12)


@given(shapes, st.integers(0, 1000))
def test_head_gradients_equal_the_closed_form_of_a_linear_head(shape: tuple[int, int], seed: int) -> None:
    inputs, _ = gradients(shape, seed)
    torch.manual_seed(seed)
    head = nn.Linear(shape[1], 1).double()
    labels = torch.arange(shape[0]).remainder(2).double()
    closed = residual_directions(torch.sigmoid(head(inputs).squeeze(1)).detach() - labels, head.weight.detach()[0])
    assert torch.allclose(head_gradients(head, inputs, labels), closed, rtol=0, atol=1e-12)
    assert head.weight.grad is None and not inputs.requires_grad


def test_harmful_directions_of_a_linear_head_take_two_values_and_have_rank_two() -> None:
    weight = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0.0, 1.0] * 16, dtype=torch.float64)
    probability = torch.rand(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    harmful, _ = split_signs(residual_directions(probability - labels, weight))
    unit = F.normalize(harmful)
    for label, expected in (
        (0, F.normalize(weight.clamp(min=0), dim=0)),
        (1, F.normalize((-weight).clamp(min=0), dim=0)),
    ):
        assert torch.allclose(unit[labels == label], expected.expand(16, -1), rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(harmful).item() == 2


def linear_gradients(shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B, D) gradients r_i w of a linear head, (B,) residuals r_i, (D,) w, (B,) labels, both classes alike."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(shape[0]).remainder(2).double()
    residual = torch.rand(shape[0], generator=generator, dtype=torch.float64) * 0.98 + 0.01 - labels
    weight = torch.randn(shape[1], generator=generator, dtype=torch.float64)
    return residual_directions(residual, weight), residual, weight, labels


class TestProposition:
    """A linear head and directions that a class shares: surgery turns what all samples share, never a residual.

    docs/findings.md, "Why directions do not change which samples count", has the proof.
    """

    @given(shapes, st.integers(0, 1000))
    def test_what_is_left_of_every_gradient_is_its_residual_times_one_vector_a_class(
        self, shape: tuple[int, int], seed: int
    ) -> None:
        """Suppression by a linear text head, whatever captions and labels it has residuals of."""
        grad, residual, weight, labels = linear_gradients(shape, seed)
        text, *_ = linear_gradients(shape, seed + 1)
        harmful, _ = split_signs(text)
        after = suppress(grad, harmful, eps=0)
        for label in (0, 1):
            mine = labels == label
            unit = F.normalize(harmful[mine], dim=1)[:1]
            shared = weight - (unit @ weight)[:, None] * unit
            if mine.any():
                assert torch.allclose(after[mine], residual[mine, None] * shared, rtol=0, atol=1e-10)

    @given(shapes, st.integers(0, 1000), st.integers(1, 4))
    def test_so_it_is_for_planes_of_any_rank(self, shape: tuple[int, int], seed: int, rank: int) -> None:
        grad, residual, weight, labels = linear_gradients(shape, seed)
        generator = torch.Generator().manual_seed(seed)
        planes = torch.randn(2, shape[1], rank, generator=generator, dtype=torch.float64)
        projections = [torch.eye(shape[1], dtype=torch.float64) - q @ q.T for q in torch.linalg.qr(planes).Q]
        after = torch.stack([projections[int(y)] @ g for g, y in zip(grad, labels, strict=True)])
        shared = torch.stack([projections[int(y)] @ weight for y in labels])
        assert torch.allclose(after, residual[:, None] * shared, rtol=0, atol=1e-10)

    @given(st.integers(4, 16), st.integers(2, 16), st.integers(0, 1000))
    def test_no_sample_of_a_class_gains_on_another(self, batch: int, width: int, seed: int) -> None:
        """Those that contradict a shortcut weigh against those that obey it as they did before surgery."""
        grad, residual, *_, labels = linear_gradients((batch, width), seed)
        text, *_ = linear_gradients((batch, width), seed + 1)
        after = suppress(grad, split_signs(text)[0], eps=0)
        for label in (0, 1):
            lengths, sizes = after[labels == label].norm(dim=1), residual[labels == label].abs()
            assert torch.allclose(lengths * sizes.sum(), sizes * lengths.sum(), rtol=1e-6, atol=1e-12)

    def test_a_head_that_is_not_linear_escapes(self) -> None:
        """What it assumes is needed: with hidden units a sample's share that is left is its own."""
        torch.manual_seed(0)
        head = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1)).double()
        labels = torch.arange(12).remainder(2).double()
        features, _ = gradients((12, 8), 0)
        grad, text = head_gradients(head, features, labels), linear_gradients((12, 8), 1)[0]
        kept = suppress(grad, split_signs(text)[0], eps=0).norm(dim=1) / grad.norm(dim=1)
        assert kept[labels == 1].std() > 0.01

    def test_epsilon_is_a_share_of_its_own_for_every_sample(self) -> None:
        """The release's 1e-6 makes directions of a class unequal in length: the one way in which r_i gets in."""
        grad, *_, labels = linear_gradients((12, 8), 0)
        harmful, _ = split_signs(linear_gradients((12, 8), 1)[0])
        kept = suppress(grad, harmful, eps=0.5).norm(dim=1) / grad.norm(dim=1)
        assert kept[labels == 1].std() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    grad, other = torch.randn(2, 3, 4).to(dtype).unbind(0)
    harmful, beneficial = split_signs(other)
    assert {t.dtype for t in (harmful, beneficial, suppress(grad, harmful), alignment_loss(grad, other))} == {dtype}
    assert residual_directions(grad[:, 0], grad[0]).dtype == dtype


def test_empty_batch() -> None:
    empty = torch.zeros(0, 4)
    harmful, _ = split_signs(empty)
    assert suppress(empty, harmful).shape == (0, 4)
    assert alignment_loss(empty, empty).item() == 0.0
    assert residual_directions(torch.zeros(0), torch.zeros(4)).shape == (0, 4)


def test_nan_is_refused() -> None:
    bad = torch.full((2, 3), math.nan)
    good = torch.ones(2, 3)
    for call in (
        lambda: split_signs(bad),
        lambda: suppress(bad, good),
        lambda: suppress(good, bad),
        lambda: alignment_loss(good, bad),
    ):
        with pytest.raises(ValueError, match="NaN"):
            call()


def test_errors_say_what_was_expected_and_found() -> None:
    with pytest.raises(ValueError, match=r"should be \(B, D\).*\(3,\)"):
        split_signs(torch.ones(3))
    with pytest.raises(ValueError, match=r"one shape.*\(2, 3\).*\(2, 4\)"):
        suppress(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"`eps` should be >= 0"):
        suppress(torch.ones(2, 3), torch.ones(2, 3), eps=-1)
    with pytest.raises(ValueError, match=r"`residual` should be \(B,\)"):
        residual_directions(torch.ones(2, 1), torch.ones(3))
