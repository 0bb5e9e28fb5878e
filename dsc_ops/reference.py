"""Every function of :mod:`dsc_ops.functional` in plain PyTorch: the definition, the oracle of the tests, the baseline
of the benchmarks.

Names and arguments are those of :mod:`dsc_ops.functional`, where they are documented; arguments are not checked here.
Formulas: Li, Feng, Zhou (arXiv 2408.05540); Chen, Liu, Wang, Yin (NeurIPS 2018) for LISTA-CP; Beck, Teboulle (2009) for
FISTA.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "silu": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
}

# Steps of the Lanczos iteration behind `lipschitz`.
LANCZOS_STEPS = 40


def per_channel(theta: float | Tensor, u: Tensor) -> Tensor:
    """A threshold, 0-d or (M,), shaped so that it broadcasts over the code u (N, M, *)."""
    theta = torch.as_tensor(theta, dtype=u.dtype, device=u.device)
    return theta if theta.dim() == 0 else theta.reshape(-1, *[1] * (u.dim() - 2))


def spatial_tuple(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)


def conv_arguments(
    weight: Tensor, stride, padding, dilation
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """stride, padding and dilation as one tuple each; "same" becomes numbers."""
    dims = weight.dim() - 2
    stride, dilation = spatial_tuple(stride, dims), spatial_tuple(dilation, dims)
    if padding == "same":
        padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, weight.shape[2:], strict=True))
    return stride, spatial_tuple(padding, dims), dilation


def soft_threshold(u: Tensor, theta: float | Tensor, *, one_sided: bool = False) -> Tensor:
    theta = per_channel(theta, u)
    if one_sided:
        return F.relu(u - theta)
    return torch.sign(u) * F.relu(u.abs() - theta)


def shrink(u: Tensor, theta: float | Tensor, *, activation: str = "relu", one_sided: bool = False) -> Tensor:
    theta, rho = per_channel(theta, u), ACTIVATIONS[activation]
    return rho(u - theta) if one_sided else rho(u - theta) - rho(-u - theta)


def hard_threshold(u: Tensor, alpha: float = 1e-6) -> Tensor:
    return torch.where(u.abs() > alpha, u, torch.zeros_like(u))


def density(x: Tensor, alpha: float = 1e-6) -> Tensor:
    return (x.abs() > alpha).sum() / max(x.numel(), 1)


def analysis(y: Tensor, weight: Tensor, *, stride=1, padding=0, dilation=1, groups: int = 1) -> Tensor:
    stride, padding, dilation = conv_arguments(weight, stride, padding, dilation)
    conv = F.conv1d if weight.dim() == 3 else F.conv2d
    return conv(y, weight, None, stride, padding, dilation, groups)


def synthesis(x: Tensor, weight: Tensor, signal_size, *, stride=1, padding=0, dilation=1, groups: int = 1) -> Tensor:
    stride, padding, dilation = conv_arguments(weight, stride, padding, dilation)
    smallest = [
        (n - 1) * s - 2 * p + d * (k - 1) + 1
        for n, s, p, d, k in zip(x.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True)
    ]
    signal_size = spatial_tuple(signal_size, weight.dim() - 2)
    output_padding = [n - m for n, m in zip(signal_size, smallest, strict=True)]
    conv_transpose = F.conv_transpose1d if weight.dim() == 3 else F.conv_transpose2d
    return conv_transpose(x, weight, None, stride, padding, output_padding, groups, dilation)


def conv_soft_threshold(
    y: Tensor,
    weight: Tensor,
    theta: float | Tensor,
    bias: Tensor | None = None,
    *,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    one_sided: bool = False,
) -> Tensor:
    u = analysis(y, weight, stride=stride, padding=padding, dilation=dilation, groups=groups)
    if bias is not None:
        u = u + per_channel(bias, u)
    return soft_threshold(u, theta, one_sided=one_sided)


def lista_step(
    x: Tensor,
    y: Tensor,
    dictionary: Tensor,
    analysis: Tensor,
    theta: float | Tensor,
    *,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    one_sided: bool = False,
) -> Tensor:
    geometry = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    residual = y - synthesis(x, dictionary, y.shape[2:], **geometry)
    return soft_threshold(x + _analysis(residual, analysis, **geometry), theta, one_sided=one_sided)


_analysis = analysis  # under a name that no argument hides


def momentum_weights(momentum: str | Sequence[float] | None, iterations: int) -> list[float]:
    """Weights w_k of z_k = x_k + w_k (x_k - x_{k-1}), k = 0 .. iterations - 1; empty without momentum."""
    if momentum is None:
        return []
    if momentum != "fista":
        return [float(weight) for weight in momentum]
    weights, m = [0.0], 1.0
    while len(weights) < iterations:
        m_next = (1 + math.sqrt(1 + 4 * m * m)) / 2
        weights.append((m - 1) / m_next)
        m = m_next
    return weights[:iterations]


def iteration_count(dictionary: Tensor, analysis: Tensor, theta: float | Tensor, iterations: int | None) -> int:
    """K, from the first argument that tells it."""
    if analysis.dim() > dictionary.dim():
        return analysis.shape[0]
    if isinstance(theta, Tensor) and theta.dim() == 2:
        return theta.shape[0]
    return iterations


def lista(
    y: Tensor,
    dictionary: Tensor,
    analysis: Tensor,
    theta: float | Tensor,
    *,
    iterations: int | None = None,
    x0: Tensor | None = None,
    momentum: str | Sequence[float] | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    one_sided: bool = False,
) -> Tensor:
    geometry = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    iterations = iteration_count(dictionary, analysis, theta, iterations)
    weights = momentum_weights(momentum, iterations)
    x = before = x0
    for k in range(iterations):
        weight = analysis[k] if analysis.dim() > dictionary.dim() else analysis
        step_theta = theta[k] if isinstance(theta, Tensor) and theta.dim() == 2 else theta
        if isinstance(step_theta, Tensor) and step_theta.numel() == 1:
            step_theta = step_theta.reshape(())
        if x is None:
            x = conv_soft_threshold(y, weight, step_theta, **geometry, one_sided=one_sided)
            before = torch.zeros_like(x)
            continue
        z = x + weights[k] * (x - before) if weights else x
        before, x = x, lista_step(z, y, dictionary, weight, step_theta, **geometry, one_sided=one_sided)
    return x


def ista(
    y: Tensor,
    dictionary: Tensor,
    lam: float | Tensor,
    *,
    iterations: int,
    step: float | Tensor | None = None,
    x0: Tensor | None = None,
    fast: bool = False,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    one_sided: bool = False,
) -> Tensor:
    geometry = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    if step is None:
        step = longest_step(lipschitz(dictionary, y.shape[2:], **geometry))
    momentum = "fista" if fast else None
    theta, weight = lam * step, dictionary * step
    return lista(
        y, dictionary, weight, theta, iterations=iterations, x0=x0, momentum=momentum, **geometry, one_sided=one_sided
    )


def longest_step(lipschitz: Tensor) -> Tensor:
    """1/L; 1 where L is 0, where no code has a signal and every step is right."""
    return 1 / torch.where(lipschitz == 0, 1, lipschitz)


def lipschitz(dictionary: Tensor, signal_size, *, stride=1, padding=0, dilation=1, groups: int = 1) -> Tensor:
    geometry = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    signal_size = spatial_tuple(signal_size, dictionary.dim() - 2)
    wide = dictionary if dictionary.dtype == torch.float64 else dictionary.float()
    with without_autocast(dictionary.device.type):
        with torch.no_grad():
            top = top_signal(wide.detach(), signal_size, geometry)
        # The Rayleigh quotient at the top eigenvector: its gradient is that of the eigenvalue.
        return analysis(top, wide, **geometry).square().sum().to(dictionary.dtype)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """The device meta knows no autocast, and refuses to be told to do without."""
    return contextlib.nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def top_signal(dictionary: Tensor, signal_size: tuple[int, ...], geometry: dict) -> Tensor:
    """Unit eigenvector of S_D A_D of the largest eigenvalue, which is also that of A_D S_D.

    Lanczos with full reorthogonalisation: the same products as power iteration, and an error that falls with the square
    root of the spectral gap instead of the gap. The starting signal is fixed pseudo-random noise.
    """
    shape = (1, dictionary.shape[1] * geometry["groups"], *signal_size)
    index = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64, device=dictionary.device)
    start = (torch.sin(index) * 43758.5453).frac().to(dictionary.dtype)
    steps = min(LANCZOS_STEPS, start.numel())
    basis = (start / start.norm()).unsqueeze(0)
    tiny = torch.finfo(dictionary.dtype).tiny
    diagonal, off_diagonal = [], []
    for step in range(steps):
        q = basis[-1]
        product = synthesis(
            analysis(q.reshape(shape), dictionary, **geometry), dictionary, signal_size, **geometry
        ).flatten()
        diagonal.append(product @ q)
        for _ in range(2):  # twice is enough to keep the basis orthogonal to rounding
            product = product - basis.T @ (basis @ product)
        norm = product.norm()
        # A residual of rounding errors alone: the basis spans an invariant subspace and the rest decouples.
        norm = torch.where(norm > 1e3 * torch.finfo(norm.dtype).eps * diagonal[0].abs(), norm, torch.zeros_like(norm))
        if step + 1 < steps:
            off_diagonal.append(norm)
            basis = torch.cat([basis, (product / norm.clamp(min=tiny) * (norm > 0)).unsqueeze(0)])
    matrix = torch.diag(torch.stack(diagonal))
    if off_diagonal:
        side = torch.stack(off_diagonal)
        matrix = matrix + torch.diag(side, 1) + torch.diag(side, -1)
    combination = torch.linalg.eigh(matrix).eigenvectors[:, -1]
    top = combination @ basis
    return (top / top.norm().clamp(min=tiny)).reshape(shape)  # zero where the operator is zero


def lasso_objective(
    x: Tensor, y: Tensor, dictionary: Tensor, lam: float | Tensor, *, stride=1, padding=0, dilation=1, groups: int = 1
) -> Tensor:
    residual = y - synthesis(
        x, dictionary, y.shape[2:], stride=stride, padding=padding, dilation=dilation, groups=groups
    )
    return residual.square().flatten(1).sum(1) / 2 + (per_channel(lam, x) * x.abs()).flatten(1).sum(1)


def l1_penalty(features: Tensor | Sequence[Tensor], weights: Tensor | Sequence[float] | None = None) -> Tensor:
    if isinstance(features, Tensor):
        features = [features]
    if weights is None:
        weights = [1 / max(math.prod(x.shape[1:]), 1) for x in features]
    wide = [x if x.dtype == torch.float64 else x.float() for x in features]
    return sum(w * x.abs().sum() / max(x.shape[0], 1) for w, x in zip(weights, wide, strict=True))
