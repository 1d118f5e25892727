"""Spectral entropies of patches in float32, each with a proven bound of its error.

Let x be a patch's grey values times 1000: whole numbers of at most 255,000, exact in float32. F is their spectrum,
P = |F|^2, n = size^2, u = 2^-24. X0 = F[0] is the exact sum, m the mean, rounded to a whole number. The transform is of
x - m, so its error e is small where a patch is nearly flat. A is the sum of P without P[0] = X0^2, S = A + X0^2,
a = A / S. ^ marks what float32 finds.

1. |e|_2 <= eps |F(x - m)|_2, eps = (log2 n + 2) 7u. Higham, Accuracy and Stability of Numerical Algorithms (2002),
   theorem 24.2, has log2(n) eta, eta = u + gamma_4 (sqrt 2 + u) < 7u, for radix 2 with twiddle factors right to u.
   Radix 4 and 8 round no more often; 2 stages more are for the two halves of a real transform. Other sizes: no bound.
2. sum |P^ - P| <= |e| (|F| + |F^|) + 2u A^, by Cauchy and Schwarz and two roundings in re^2 + im^2. The total variation
   of P / S and P^ / S^ is at most that sum over the larger S, so t = 2.01 (eps sqrt(M A^) + u A^) / S^ with
   M = |F(x - m)|^2 = A + (X0 - n m)^2. (Unless x is flat, A >= n - 1 and M <= 33^2 A; so 1 % covers the difference
   between A and A^ and all that is of second order. Where x is flat, everything is exactly 0.)
3. Audenaert (2007): entropies of two distributions of n values differ by at most t log2(n - 1) + h(t), h a coin's,
   and h(t) <= t log2(e / t).
4. Evaluated is H^ = (A log2 S - L) / S - q log2 q, q = 1 - a, L = sum P log2 P: A and L by sums of k = size / 2 + 1
   values in float32, those in float64, the logarithm right to 4 ulp = 8u. That errs by k u of A and (k + 10) u of
   sum |P log2 P| <= A (H_ac + |log2 A|), where a H_ac <= H and a |log2 A| <= a |log2 S| + H; H by A's derivative and
   L's by at most k u (H + a |log2 S| + 1.5 a) + (k + 10) u (2 H + a |log2 S|) < (3k + 20) u (H + a |log2 S| + a).
5. The definition adds 1e-12 twice: kappa = 1e-12 / (c^2 S), c the scale of a grey value, moves the entropy by at most
   kappa (H + 1.45), the one in the logarithm by at most 1.45e-12 n. Float64 itself is right to 1e-11 (1 to 4 with
   u = 2^-53, m = 0). Flat patches have P[0] alone, for which the definition is evaluated as it stands.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fft import rfft2

SIZES = (2, 4, 8, 16, 32, 64)  # sides that have a bound: beyond, sums of whole numbers leave float32
U = 2.0**-24
UNIT = 2.0**-18  # of a grey value times 1000 here: exact, and powers come near 1
GRAY = np.array([299, 587, 114], dtype=np.float32)
PIXELS = 1 << 15  # at a time: what an FFT batch and its spectrum need stays in the cache
Pixels = NDArray[np.uint8]  # of patches: (rows, columns, size, 3 * size)
Floats = NDArray[np.float64]


def pieces(patches: Pixels, pixels: int = PIXELS) -> Iterator[tuple[slice, slice]]:
    """Rectangles of patches, row-major, none with more than so many pixels where a patch is smaller."""
    rows, columns, size = patches.shape[:3]
    wide = max(1, pixels // size**2)
    high = max(1, wide // columns)
    for top in range(0, rows, high):
        for left in range(0, columns, wide):
            yield slice(top, top + high), slice(left, left + wide)


def gray(patches: Pixels, unit: float = 1.0) -> NDArray[np.float32]:
    """1000 x (0.299 R + 0.587 G + 0.114 B) x unit, a power of two: exact. (N, size, size), row-major."""
    found, weights, done = np.empty(patches.size // 3, np.float32), GRAY * np.float32(unit), 0
    for piece in pieces(patches, PIXELS // 2):
        colours = patches[piece].astype(np.float32, order="C").reshape(-1, 3)
        np.matmul(colours, weights, out=found[done : done + len(colours)])
        done += len(colours)
    return found.reshape(-1, *patches.shape[2:3] * 2)


def measure(patches: Pixels) -> tuple[Floats, Floats, Floats, Floats, NDArray[np.float32]]:
    """X0, m, A and sum P log2 P of N patches in units of `UNIT`, see above, and a mark that equal ones share: (N,)."""
    x = gray(patches, UNIT)
    number, size = x.shape[:2]
    total = (x.reshape(-1, size) @ np.ones(size, np.float32)).reshape(-1, size).sum(1, dtype=np.float64)
    mean = np.rint(total * (1 / (UNIT * size**2))) * UNIT
    flat = x.reshape(number, -1)
    flat -= mean.astype(np.float32)[:, None]
    spectrum = rfft2(torch.from_numpy(x)).numpy().view(np.float32)
    mark = spectrum[:, :2, 2:4].sum((1, 2))  # F[0, 1] and F[1, 1]: another after a shift or in a mirror
    spectrum *= spectrum
    power = (spectrum.reshape(-1, 2) @ np.ones(2, np.float32)).reshape(number, size, -1)
    power[:, 0, 0] = 0.0
    power += np.float32(1e-37)  # no logarithm of zero; below all bounds
    twice = np.full(size // 2 + 1, 2.0, dtype=np.float32)  # how often a column stands in the whole spectrum
    twice[[0, -1]] = 1.0

    def summed() -> Floats:
        return (power.reshape(-1, twice.size) @ twice).reshape(-1, size).sum(1, dtype=np.float64)

    ac = summed()
    power *= np.log2(power)
    return total, mean, ac, summed(), mark


def bounded(measured: Floats, size: int, scale: float) -> tuple[Floats, Floats]:
    """Entropies in bits, and how far each may be from float64's; not at all (0.0) where a patch is flat: (N,) each.

    measured: (4, N), as `measure` gives it. scale: c, of a grey value times 1000.
    """
    total, mean, ac, logs = measured
    n = size**2
    flat = ac < n * 1e-36
    ac = np.where(flat, 1.0, ac)
    power = total**2
    whole = power + ac
    share, rest, log = ac / whole, power / whole, np.log2(whole)
    entropy = share * log - logs / whole - rest * np.log2(np.maximum(rest, 1e-300))
    eps = (np.log2(n) + 2) * 7 * U
    t = 2.01 * (eps * np.sqrt((ac + (total - n * mean) ** 2) * ac) + U * ac) / whole
    bound = t * (np.log2(n) + 1.45 - np.log2(t))
    bound += (3 * (size // 2 + 1) + 20) * U * (entropy + share * (np.abs(log) + 1.0))
    bound += 1e-12 / (scale / UNIT) ** 2 * (entropy + 1.45) / whole + (1.45e-12 * n + 1e-11)
    if flat.any():
        p = (n * (total[flat] / (n * UNIT) * scale)) ** 2
        p /= p + 1e-12
        entropy[flat] = -(p * torch.from_numpy(p + 1e-12).log2_().numpy())
        bound[flat] = 0.0
    return entropy, bound


def undecided(entropies: Floats, bounds: Floats, count: int) -> NDArray[np.int64]:
    """Which have to be known exactly, so that the `count // 2` lowest, the rest highest and their order are certain.

    The others are exact (their bound is 0), certainly not among those, or out of reach of all that may be. Order is
    that after rounding to 1e-9, which moves by 5e-10.
    """
    reach = bounds + 6e-10
    below, above = entropies - reach, entropies + reach
    low, high = (min(part, len(entropies)) for part in (count // 2, count - count // 2))
    near = above >= np.partition(below, -high)[-high]
    if low:
        near |= below <= np.partition(above, low - 1)[low - 1]
    order = np.flatnonzero(near)
    order = order[np.argsort(below[order])]
    touches = below[order][1:] <= np.maximum.accumulate(above[order])[:-1]
    order = order[np.append(False, touches) | np.append(touches, False)]
    return order[bounds[order] > 0]
