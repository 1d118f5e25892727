"""Two gradients into the features, made to agree."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch import Tensor

from dgs.model.methods.aggregation import pcgrad, prograd

Rule = Callable[[Tensor, Tensor], Tensor]


def gradients(seed: int, agree: bool) -> tuple[Tensor, Tensor]:
    """(4, 3) task and prior, with a positive or negative product over the batch."""
    task, prior = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return task, prior if ((task * prior).sum() > 0) == agree else -prior


@given(seed=st.integers(0, 2**31))
def test_gradients_that_agree_are_added(seed: int) -> None:
    task, prior = gradients(seed, agree=True)
    assert torch.allclose(pcgrad(task, prior), task + prior, atol=1e-3 * (task + prior).norm().item())


@given(seed=st.integers(0, 2**31))
def test_gradients_in_conflict_give_one_that_is_against_neither(seed: int) -> None:
    task, prior = gradients(seed, agree=False)
    found = pcgrad(task, prior)
    slack = 1e-3 * task.norm() * prior.norm()
    assert (found * task).sum() >= -slack and (found * prior).sum() >= -slack


def test_a_prior_that_would_undo_the_task_does_not() -> None:
    task, prior = torch.tensor([[1.0, 0.0]]), torch.tensor([[-2.0, 0.2]])
    assert ((task + prior) * task).sum() < 0
    assert (pcgrad(task, prior) * task).sum() >= -1e-3


@given(seed=st.integers(0, 2**31), agree=st.booleans())
def test_two_gradients_leave_nothing_between_pcgrad_and_exact_upgrad(seed: int, agree: bool) -> None:
    """UPGrad (Quinton & Rey 2024): each gradient's nearest vector that conflicts with neither, then their sum.

    The nearest is g + w1 g1 + w2 g2 with w >= 0 of least length, found here as non-negative least squares.
    """
    both = torch.stack([g.flatten() for g in gradients(seed, agree)])
    nearest = [g + both.T @ torch.from_numpy(nnls(both.T.numpy(), -g.numpy())[0]) for g in both]
    found = pcgrad(*gradients(seed, agree)).flatten()
    assert torch.allclose(found, nearest[0] + nearest[1], atol=1e-4 * both.norm().item())


@given(seed=st.integers(0, 2**31))
def test_two_conflicting_gradients_leave_pcgrad_with_the_sum_of_two_projections(seed: int) -> None:
    task, prior = gradients(seed, agree=False)
    dot = (task * prior).sum()
    expected = task - dot / prior.square().sum() * prior + prior - dot / task.square().sum() * task
    assert torch.allclose(pcgrad(task, prior), expected, atol=1e-4 * (task.norm() + prior.norm()).item())


@pytest.mark.parametrize("rule", [pcgrad, prograd])
def test_without_a_prior_the_task_goes_through(rule: Rule) -> None:
    """As in the first step, when the student still is the teacher."""
    task, _ = gradients(0, agree=True)
    assert torch.equal(rule(task, torch.zeros_like(task)), task)
    assert rule(task.float(), torch.zeros(4, 3)).dtype is torch.float32


@given(seed=st.integers(0, 2**31))
def test_prograd_is_the_task_or_the_task_off_general_knowledge_and_never_adds_it(seed: int) -> None:
    task, general = gradients(seed, agree=True)
    assert torch.equal(prograd(task, general), task)
    found = prograd(task, -general)
    assert (found * general).sum().abs() < 1e-9 * task.norm() * general.norm() + 1e-12
    assert torch.allclose(found, task - (task * general).sum() / general.square().sum() * general)
