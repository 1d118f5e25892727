"""Which library multiplies the matrices of a tower with adapters: the one torch takes, or the oneDNN in its wheel.

For float32 on x86 torch takes MKL, which runs at about half speed on processors that are not Intel's. The rounding of
the two differs, nothing else.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dgs.errors import UserError

Gemm = Literal["torch", "onednn"]
CPUINFO = Path("/proc/cpuinfo")


@cache
def is_mkl_slow(cpuinfo: str) -> bool:
    """True for an AMD processor with AVX-512, by the text of /proc/cpuinfo; others were not measured to gain."""
    return "AuthenticAMD" in cpuinfo and " avx512f " in cpuinfo


def has_onednn() -> bool:
    """True where this torch has the operator that is used here."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def resolve(asked: str) -> Gemm:
    """compute.gemm to the library: "auto" goes by what the processor is, so that a machine always gets the same.

    Raises:
        UserError: "onednn" where torch has none.
    """
    if asked == "onednn" and not has_onednn():
        raise UserError(
            "Expected a torch with oneDNN for compute.gemm: onednn, found one without it. Set compute.gemm: auto."
        )
    if asked == "auto":
        gains = has_onednn() and CPUINFO.exists() and is_mkl_slow(CPUINFO.read_text())
        return "onednn" if gains else "torch"
    return "onednn" if asked == "onednn" else "torch"


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """x W^T + b, and its gradients by x, W and b, each as one product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        by_x, by_weight, by_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        # Transposed at each call: a second copy of every weight would double the memory of a tower.
        return (
            _multiply(grad.contiguous(), weight.T.contiguous()) if by_x else None,
            _multiply(rows.T.contiguous(), x.reshape(-1, x.shape[-1]).T.contiguous()) if by_weight else None,
            rows.sum(0) if by_bias else None,
        )


class OneDnnLinear(nn.Linear):
    """nn.Linear with oneDNN's products, for float32 on the CPU; for anything else it is nn.Linear."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is torch.float32 and x.device.type == "cpu" and x.numel():
            return _Linear.apply(x.contiguous(), self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def use(tower: nn.Module, gemm: Gemm) -> None:
    """Let every linear layer of `tower` multiply by `gemm`, in place; their names and parameters stay."""
    kind = OneDnnLinear if gemm == "onednn" else nn.Linear
    for module in tower.modules():
        if type(module) in (nn.Linear, OneDnnLinear):
            module.__class__ = kind
