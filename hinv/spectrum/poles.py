"""Poles and weights of rational functions of |H| and sign(H): sums over k of c_k / (s^2 + tau_k^2) on 0 <= s <= 1.

`Poles` for 1 / (s + ratio): minimax in relative error, |(s + ratio) sum_k c_k / (s^2 + tau_k^2) - 1| <= error for 0 <= s <= 1, fitted here by Remez's exchange
and kept in poles.json. As 1 / (s + ratio) = (2 / pi) Int tau^2 / (ratio^2 + tau^2) dtau / (s^2 + tau^2), all are positive. `python -m hinv.spectrum.poles`
fits them again and writes the file.
`zolotarev` for sign(s): Zolotarev's optimal ones, in closed form.
"""

import functools
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hinv.shapes import Float

DATA = Path(__file__).with_name("poles.json")
RATIOS = [10.0**-d for d in range(7)]
NUMBERS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20)
STEADY = 1e-8  # where a fit starts: the smaller the ratio, the better the start by quadrature


@dataclass(frozen=True)
class Poles:
    """`tau`, `c`: ascending; `error`: what the sum differs from the function by at most, relative to it, on the interval of its kind."""

    ratio: float
    error: float
    tau: Float[np.ndarray, " n"]
    c: Float[np.ndarray, " n"]


def chosen(ratio: float, rtol: float) -> Poles:
    """The fewest poles of an error of at most rtol, or else the most there are, for 1 / (s + ratio) on 0 <= s <= 1.

    They are those of the next smaller ratio in the file, r: with s and the poles scaled by ratio / r they serve a longer interval than is asked for.
    """
    fitted = next(r for r in RATIOS if r <= ratio)
    several = [p for p in load() if p.ratio == fitted]
    return next((p for p in several if p.error <= rtol), several[-1])


@functools.cache
def load() -> list[Poles]:
    """All that are kept, by ratio, then by number."""
    rows = json.loads(DATA.read_text())
    return [Poles(row["ratio"], row["error"], np.array(row["tau"]), np.array(row["c"])) for row in rows]


def error_of(
    s: Float[np.ndarray, " m"], ratio: float, tau: Float[np.ndarray, " n"], c: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " m"]:
    """(s + ratio) sum_k c_k / (s^2 + tau_k^2) - 1."""
    return (s + ratio) * (c / (s[:, None] ** 2 + tau**2)).sum(1) - 1.0


def zolotarev(gap: float, rtol: float) -> Poles:
    """s sum_k c_k / (s^2 + tau_k^2) for sign(s) on gap <= |s| <= 1, of an error of at most rtol.

    Source: Zolotarev (1877), as in van den Eshof, Frommer, Lippert, Schilling and van der Vorst, Comput. Phys. Commun. 146 (2002): with n poles
    a_j = gap sn(j K / 2n) / cn(j K / 2n), j = 1 .. 2n - 1, modulus^2 1 - gap^2, r(s) = M s prod (s^2 + a_2j^2) / prod (s^2 + a_(2j-1)^2).
    The error is measured on a fine grid, and M centres it.
    """
    from scipy.special import ellipj, ellipkm1

    s = np.geomspace(gap, 1.0, 20_000)
    for n in itertools.count(1):
        u = np.arange(1, n + 1) / (2 * n) * ellipkm1(gap**2)
        sn, cn, _, _ = ellipj(u, 1.0 - gap**2)
        half = gap * sn / cn
        a = np.concatenate([half, gap / half[-2::-1]])  # a_j a_(2n-j) = gap: beyond the middle cn loses its digits
        tau, zeros = a[::2], a[1::2]
        others = tau**2 - tau[:, None] ** 2 + np.eye(n)
        c = np.prod(zeros**2 - tau[:, None] ** 2, axis=1) / np.prod(others, axis=1)
        r = s * (c / (s[:, None] ** 2 + tau**2)).sum(1)
        error = (r.max() - r.min()) / (r.max() + r.min())
        if error <= rtol or n == NUMBERS[-1]:
            return Poles(gap, float(error), tau, 2.0 * c / (r.max() + r.min()))
    raise AssertionError


# -- the fit -----------------------------------------------------------------------------------------------------------


def fit(ratio: float, n: int) -> Poles:
    """n minimax poles for 1 / (s + ratio) by Remez's exchange: the error takes its largest value, with alternating signs, at 2 n + 1 points.

    Unknowns are log tau, log c and the error. From a quadrature at a ratio where that is close, fitted by least squares, in steps to the wanted one, each of which
    starts at the points of the one before; under a second.

    Raises:
        ArithmeticError: the exchange did not converge.
    """
    at = min(ratio, STEADY)
    x, points = _start(at, n)
    x, points = _exchanged(x, points, at) or (None, points)
    step = 3.0
    while x is not None and at < ratio:
        to = min(at * step, ratio)
        found = _exchanged(x, points, to)
        if found is None:
            step **= 0.5
            if step < 1.01:
                break
            continue
        (x, points), at, step = found, to, min(step**1.5, 4.0)
    if x is None or at < ratio:
        raise ArithmeticError(f"no {n} minimax poles found for the ratio {ratio:g}")
    tau, c = np.exp(x).reshape(2, -1)
    order = tau.argsort()
    tau, c = tau[order], c[order]
    return Poles(ratio, float(np.abs(error_of(points, ratio, tau, c)).max()), tau, c)


def _start(ratio: float, n: int) -> tuple[Float[np.ndarray, " twice"], Float[np.ndarray, " points"]]:
    """(log tau, log c) by the trapezoidal rule of the integral over log tau, between the best of some ends, then by least squares; and its extrema."""
    from scipy.optimize import least_squares

    starts = []
    for low, high in itertools.product(np.geomspace(1e-7 * ratio, ratio, 40), np.geomspace(1.0, 30.0, 12)):
        u, h = np.linspace(np.log(low), np.log(high), n, retstep=True)
        tau = np.exp(u)
        c = 2.0 / np.pi * h * tau**3 / (ratio**2 + tau**2)
        starts.append((np.abs(error_of(_grid(tau, 8), ratio, tau, c)).max(), tau, c))
    _, tau, c = min(starts, key=lambda start: start[0])
    s = _grid(tau, 20)
    x = least_squares(
        lambda x: error_of(s, ratio, *np.exp(x).reshape(2, -1)),
        np.log(np.concatenate([tau, c])),
        lambda x: _slopes(s, ratio, *np.exp(x).reshape(2, -1)),
        method="lm",
        xtol=1e-12,
    ).x
    return x, _extrema(ratio, *np.exp(x).reshape(2, -1))


def _exchanged(
    x: Float[np.ndarray, " twice"], points: Float[np.ndarray, " points"], ratio: float
) -> tuple[Float[np.ndarray, " twice"], Float[np.ndarray, " points"]] | None:
    """Remez's exchange from these poles and points: Newton's method for an error that alternates in them, then the extrema of what that gives."""
    for _ in range(20):
        if len(points) != len(x) + 1:
            return None
        found = _alternating(x, points, ratio)
        if found is None:
            return None
        x = found
        tau, c = np.exp(x).reshape(2, -1)
        points = _extrema(ratio, tau, c)
        size = np.abs(error_of(points, ratio, tau, c))
        if len(points) == len(x) + 1 and size.max() < (1 + 1e-5) * size.min():
            return x, points
    return None


def _alternating(
    x: Float[np.ndarray, " twice"], points: Float[np.ndarray, " points"], ratio: float
) -> Float[np.ndarray, " twice"] | None:
    signs = (-1.0) ** np.arange(len(points))
    for _ in range(30):
        tau, c = np.exp(x).reshape(2, -1)
        system = np.column_stack([_slopes(points, ratio, tau, c), -signs])
        step = np.linalg.solve(system, -error_of(points, ratio, tau, c))[:-1]
        largest = np.abs(step).max()
        x = x + step * min(1.0, 0.5 / largest)
        if not np.isfinite(x).all():
            return None
        if largest < 1e-8:
            return x
    return None


def _slopes(
    s: Float[np.ndarray, " m"], ratio: float, tau: Float[np.ndarray, " n"], c: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "m twice"]:
    """Derivatives of `error_of` in log tau and log c."""
    q = 1.0 / (s[:, None] ** 2 + tau**2)
    terms = (s + ratio)[:, None] * c * q
    return np.concatenate([-2.0 * terms * tau**2 * q, terms], axis=1)


def _grid(tau: Float[np.ndarray, " n"], fine: int) -> Float[np.ndarray, " m"]:
    """0, and up to 1 from far below the smallest scale there is."""
    return np.concatenate([[0.0], np.geomspace(1e-2 * tau.min(), 1.0, fine * len(tau))])


def _extrema(ratio: float, tau: Float[np.ndarray, " n"], c: Float[np.ndarray, " n"]) -> Float[np.ndarray, " points"]:
    """Where the error is largest between its changes of sign: on a grid, then by a parabola in log s."""
    s = _grid(tau, 200)
    e = error_of(s, ratio, tau, c)
    points = []
    for run in np.split(np.arange(len(s)), np.flatnonzero(np.diff(np.sign(e))) + 1):
        i = run[np.abs(e[run]).argmax()]
        if 1 < i < len(s) - 1:
            before, here, after = e[i - 1 : i + 2]
            curvature = before - 2.0 * here + after
            shift = 0.5 * (before - after) / curvature if curvature else 0.0
            points.append(s[i] * (s[i + 1] / s[i]) ** np.clip(shift, -1.0, 1.0))
        else:
            points.append(s[i])
    return np.array(points)


def write() -> None:
    """poles.json: for each ratio the numbers of poles up to the first of an error below 1e-8, which is where rounding begins."""
    rows = []
    for ratio in RATIOS:
        for n in NUMBERS:
            p = fit(ratio, n)
            # the error in three digits, rounded up, is that of the rounded poles too
            tau, c = (np.array([float(f"{v:.11e}") for v in values]) for values in (p.tau, p.c))
            error = np.abs(error_of(_grid(tau, 2000), ratio, tau, c)).max()
            exponent = np.floor(np.log10(error)) - 3
            error = float(f"{(np.floor(error / 10**exponent) + 1) * 10**exponent:.3e}")
            rows.append({"ratio": ratio, "error": error, "tau": tau.tolist(), "c": c.tolist()})
            if error < 1e-8:
                break
    DATA.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    write()
