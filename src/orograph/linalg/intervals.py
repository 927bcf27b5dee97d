r"""How far a trace estimate may be off: variance, dependence and skewness of the quadratic forms that it averages.

All estimators average forms $q = v^\top B v$, with $v$ uniform on the sphere of radius $\sqrt d$ of a $d$-dimensional subspace that
does not depend on $v$. The variance need not be read off the scatter of the $q$. With the tangential part $w = \|B v\|^2 - q^2 / d$,

$$\operatorname{Var} q = 2\, \mathbb{E}\, w \quad \text{exactly}$$

(on this sphere $\mathbb{E} q^2 = (\tau^2 + 2 \operatorname{tr} B^2)\, d / (d + 2)$, $\tau = \operatorname{tr} B$; insert and compare), and
every product $B v$ that was paid for $q$ gives $w$ as well. For traceless $B$ and $x = \operatorname{tr} B^4 / (\operatorname{tr} B^2)^2
\le 1$, the mean of m $w$'s has relative variance $2x/m$, the sample variance of the $q$ $(2 + 12x)/m$: at least seven times more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_SKEW = math.sqrt(8.0)  # of one quadratic form, reached at rank one
PARALLEL = 1e-12  # squared sine below which two directions are one
FULL = 1e-8  # leverage this near to 1 counts as 1


@dataclass(frozen=True)
class Moments:
    """A trace estimate and the spread of its error; `noise` is the part of `sem` that rounding makes."""

    value: float
    sem: float
    dof: float
    skew: float
    noise: float


def spread(forms: Tensor, tangents: Tensor, dependence: float, noise: float) -> Moments:
    r"""Mean of m quadratic forms (m,) with standard error, degrees of freedom and skewness, from their tangential parts (m,).

    $\mathrm{sem}^2 = \rho \cdot 2 \bar w / m$ (`dependence` $\rho$: 1 if independent); Satterthwaite: dof $= m / (\rho x)$ with
    $x = \widehat{\operatorname{Var}}\, w / (2 \bar w^2)$; skewness of one form $\gamma = 8 \operatorname{tr} B^3 / (2 \operatorname{tr}
    B^2)^{3/2} = 4 \operatorname{Cov}(q, w) / (2 \bar w)^{3/2}$, so $x \ge \gamma^2 / 8$ by Cauchy-Schwarz. Fewer than four forms say
    nothing about $x$: the worst, 1.
    """
    count, value = len(forms), float(forms.mean())
    tangents = tangents.clamp_min(0.0)
    mean = float(tangents.mean())
    if mean <= 1e-150:  # its square would underflow
        return Moments(value, noise, math.inf, 0.0, noise)
    concentration, skewness = 1.0, 0.0
    if count >= 4:
        joint = float(((forms - value) * (tangents - mean)).sum()) / (count - 1)
        skewness = min(max(4 * joint / (2 * mean) ** 1.5, -MAX_SKEW), MAX_SKEW)
        concentration = min(max(float(tangents.var()) / (2 * mean**2), skewness**2 / 8, 1e-9), 1.0)
    sem = math.sqrt(dependence * 2 * mean / count + noise**2)
    dof = max(count / (concentration * dependence), 1.0)  # below 1 the quantiles of t say nothing any more
    return Moments(value, sem, dof, skewness * math.sqrt(dependence / count), noise)


def combine(first: Moments, second: Moments) -> Moments:
    r"""The mean of two uncorrelated estimates of one number, weighted by their inverse variances.

    dof by Welch and Satterthwaite; the third cumulants add up. Rounding is common to both, and stays.
    """
    ours, theirs = (m.sem**2 - m.noise**2 for m in (first, second))
    if not ours > 0 or not theirs > 0:  # rounding alone is left of one of them
        return first if first.sem <= second.sem else second
    share = theirs / (ours + theirs)  # the first one's weight
    variance = ours * share
    parts = ((share, ours, first), (1 - share, theirs, second))
    cumulant = sum((weight * math.sqrt(part)) ** 3 * m.skew for weight, part, m in parts)
    freedom = sum((weight**2 * part) ** 2 / m.dof for weight, part, m in parts)
    noise = max(first.noise, second.noise)
    return Moments(
        value=share * first.value + (1 - share) * second.value,
        sem=math.sqrt(variance + noise**2),
        dof=variance**2 / freedom if freedom > 0 else math.inf,
        skew=cumulant / variance**1.5,
        noise=noise,
    )


@dataclass(frozen=True)
class SketchAlgebra:
    """XTrace in coordinates: samples G (n, k), A G = Q R, E = (I - QQ')AQ; all float64, O(k^2) numbers."""

    size: int  # n
    core: Tensor  # (r, r)  Q'AQ
    factor: Tensor  # (r, k)  R
    within: Tensor  # (r, k)  Q'G
    outside: Tensor  # (r, k)  E'G
    radius: Tensor  # (k,)  squared norms of (I - QQ')G
    gram: Tensor  # (r, r)  E'E


def leave_one_out(a: SketchAlgebra) -> tuple[Tensor, Tensor, float]:
    r"""XTrace's k exchangeable estimates, their tangential parts, and the dependence of their mean.

    Estimate i leaves sample i out of the basis: $t_i = \operatorname{tr} Q_i^\top A Q_i + \frac{d}{\|P_i g_i\|^2} g_i^\top P_i A P_i g_i$,
    $P_i = I - Q_i Q_i^\top$ (resphered). $Q_i$ is Q without the direction $s_i \perp R_j, j \ne i$, a row of $R^+$; where sample i
    adds nothing to the range (leverage below 1), $Q_i = Q$. Epperly, Tropp, Webber 2024, arXiv:2301.07825.
    """
    U, scale, Vt = torch.linalg.svd(a.factor, full_matrices=False)
    kept = scale > scale[0] * torch.finfo(torch.float64).eps * max(a.factor.shape)
    U, scale, V = U[:, kept], scale[kept], Vt[kept].T
    alone = (V**2).sum(dim=1) > 1 - FULL  # (k,) sample i adds a direction of its own
    S = (U / scale) @ V.T  # (r, k)
    S = S / S.norm(dim=0).clamp_min(1e-300) * alone  # a sample whose image vanishes has no direction
    alpha = (S * a.within).sum(dim=0)  # s_i' g_i
    C = a.within - S * alpha  # Q_i' g_i in the coordinates of Q
    X = a.factor - a.core @ C  # Q'(A g_i - A Q_i Q_i' g_i)
    slope = (S * X).sum(dim=0)
    beyond = -(a.outside * C).sum(dim=0)  # what lies outside the whole of Q
    dimension = a.size - len(a.core) + alone.double()
    stretch = dimension / (a.radius + alpha**2)
    forms = stretch * (alpha * slope + beyond)
    squares = stretch * (slope**2 + (C * (a.gram @ C)).sum(dim=0))
    tangents = (squares - forms**2 / dimension).clamp_min(0.0)
    values = torch.trace(a.core) - (S * (a.core @ S)).sum(dim=0) + forms
    total = 2 * float(tangents.sum())
    extra = _pair_covariance(a, S, C, X, forms) if total > 0 else 0.0
    return values, tangents, 1 + max(extra / total, 0.0) if total > 0 else 1.0


def _pair_covariance(a: SketchAlgebra, S: Tensor, C: Tensor, X: Tensor, forms: Tensor) -> float:
    r"""Unbiased estimate of $\sum_{i \ne j} \operatorname{Cov}(t_i, t_j)$, from leaving two samples out.

    With $t_{ij}$: estimate i with j left out too, and $b_{ij} = t_{ij} - t_i$. Given all other samples, $t_{ij}$ and $t_{ji}$ are
    independent and unbiased, and $\mathbb{E}[b_{ji} \mid g_i] = \mathbb{E}[b_{ij} \mid g_j] = 0$; in $\operatorname{Cov}(t_{ij} - b_{ij},\,
    t_{ji} - b_{ji})$ all terms but $\mathbb{E}[b_{ij} b_{ji}]$ vanish. All k^2 of them cost O(k^3) and no product.
    """
    HS, alone = a.core @ S, S.norm(dim=0) > 0.5
    cosine, SHS, SX, SE = S.T @ S, S.T @ HS, S.T @ X, S.T @ a.outside  # [i, j]; SX[j, i] = s_j' X_i
    sine2 = 1 - cosine**2
    usable = (sine2 > PARALLEL) & alone & alone[:, None] & ~torch.eye(len(alone), dtype=torch.bool)
    sine = torch.where(usable, sine2, 1.0).sqrt()
    own = torch.diagonal(SHS)[:, None]
    alpha, slope = (S * a.within).sum(dim=0)[:, None], torch.diagonal(SX)[:, None]
    # p: the unit vector of s_j orthogonal to s_i, so that s_i and p span what the pair (i, j) adds to the basis
    beta = ((S.T @ a.within).T - cosine * alpha) / sine  # p' g_i
    mixed = (SHS - cosine * own) / sine  # s_i' A p
    second = (own.T - 2 * cosine * SHS + cosine**2 * own) / sine**2  # p' A p
    rise = (SX.T - cosine * slope) / sine  # p' X_i
    edge = (SE.T - cosine * torch.diagonal(SE)[:, None]) / sine  # (E'g_i) . p
    beyond = -(a.outside * C).sum(dim=0)[:, None]
    raw = alpha * (slope + mixed * beta) + beta * (rise + second * beta) + beyond + beta * edge
    dimension = a.size - len(a.core) + 2
    change = dimension / (a.radius[:, None] + alpha**2 + beta**2) * raw - second - forms[:, None]
    change = torch.where(usable, change, 0.0)
    return float((change * change.T).sum())
