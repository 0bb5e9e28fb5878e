"""The published definitions of this family in plain PyTorch: the oracle of the tests, the baseline of the benchmarks.

Arguments are tensors in the order of the layers' parameters and are not checked. Sources as in the layers' docstrings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def csc_conv(
    y: Tensor,
    dictionary: Tensor,
    lam: float | Tensor,
    step: Tensor,
    iterations: int,
    stride,
    padding,
    fista: bool = True,
) -> Tensor:
    """SDNet's layer, one-sided: z_1 = P(eta A y); z <- P(z + eta A(y - S z)), P(u) = max(0, u - lam eta)."""
    x = before = torch.relu(step * F.conv2d(y, dictionary, None, stride, padding) - lam * step)
    z, m = x, 1.0
    signal = [n + 2 * p - k for n, p, k in zip(y.shape[2:], padding, dictionary.shape[2:], strict=True)]
    extra = [n % s for n, s in zip(signal, stride, strict=True)]
    for _ in range(iterations - 1):
        if fista:
            # x_1 is the first step from zero: its momentum carries x_1 - 0.
            m_next = (1 + math.sqrt(1 + 4 * m * m)) / 2
            z = x + (m - 1) / m_next * (x - before)
            m = m_next
        else:
            z = x
        residual = y - F.conv_transpose2d(z, dictionary, None, stride, padding, extra)
        before, x = x, torch.relu(z + step * F.conv2d(residual, dictionary, None, stride, padding) - lam * step)
    return x


def ml_csc(
    y: Tensor,
    dictionaries: Sequence[Tensor],
    biases: Sequence[Tensor],
    scales: Sequence[Tensor | float],
    geometry: Sequence[tuple[int, int]],
    method: str,
    unfoldings: int,
    analyses: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """ML-CSC; geometry has stride and padding of each layer, analyses is for "ml-lista". Sizes that strides divide."""

    def up(x: Tensor, i: int, weight: Sequence[Tensor] = dictionaries) -> Tensor:
        return F.conv2d(x, weight[i], None, *geometry[i])

    def down(x: Tensor, i: int, weight: Sequence[Tensor] = dictionaries) -> Tensor:
        return F.conv_transpose2d(x, weight[i], None, *geometry[i])

    b = [bias.view(1, -1, 1, 1) for bias in biases]
    layers = range(len(dictionaries))
    g: list[Tensor] = []
    for i in layers:
        x = g[i - 1] if i else y
        g.append(torch.relu(up(x, i, analyses) + b[i]) if analyses else torch.relu(scales[i] * up(x, i) + b[i]))
        if method == "layered-ista":
            for _ in range(unfoldings):
                g[i] = torch.relu(g[i] - scales[i] * up(down(g[i], i) - x, i) + b[i])
    if method.startswith("layered"):
        return g
    t, before = 1.0, g[-1]
    for _ in range(unfoldings):
        if method == "ml-fista":
            t_before, t = t, (1 + math.sqrt(1 + 4 * t * t)) / 2
            before, g[-1] = g[-1], g[-1] + (t_before - 1) / t * (g[-1] - before)
        for i in reversed(layers[1:]):
            g[i - 1] = down(g[i], i, analyses or dictionaries)
        for i in layers:
            x = g[i - 1] if i else y
            if analyses:
                g[i] = torch.relu(g[i] - up(down(g[i], i), i) + up(x, i, analyses) + b[i])
            else:
                g[i] = torch.relu(g[i] - scales[i] * up(down(g[i], i) - x, i) + b[i])
    return g


def msd_csc(
    y: Tensor,
    filters: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    norms: Sequence[Sequence[torch.nn.BatchNorm2d]],
    dilations: Sequence[int],
    unfoldings: int,
    fista: bool = False,
    one_sided: bool = True,
) -> Tensor:
    """MSD-CSC with its concatenations; norms[p][i] is layer i's batch norm in pass p."""

    def up(x: Tensor, i: int) -> Tensor:
        return torch.cat([x, F.conv2d(x, filters[i], None, 1, dilations[i], dilations[i])], 1)

    def down(x: Tensor, i: int) -> Tensor:
        z = x[:, -filters[i].shape[0] :]
        image = F.conv_transpose2d(z, filters[i], None, 1, dilations[i], 0, 1, dilations[i])
        return x[:, : -filters[i].shape[0]] + image

    b = [bias.view(1, -1, 1, 1) for bias in biases]
    layers = range(len(filters))
    x = [y]
    for i in layers:
        x.append(norm_threshold(norms[0][i], scales[i] * up(x[i], i) + b[i], 0.0, one_sided))
    t, before = 1.0, x[-1]
    for p in range(1, 1 + unfoldings):
        if fista:
            t_before, t = t, (1 + math.sqrt(1 + 4 * t * t)) / 2
            before, x[-1] = x[-1], x[-1] + (t_before - 1) / t * (x[-1] - before)
        for i in reversed(layers[1:]):
            x[i] = down(x[i + 1], i)
        for i in layers:
            u = x[i + 1] - scales[i] * (up(down(x[i + 1], i), i) - up(x[i], i)) + b[i]
            x[i + 1] = norm_threshold(norms[p][i], u, 0.0, one_sided)
    return x[-1]


def res_csc(
    x: Tensor,
    dictionaries: tuple[Tensor, Tensor],
    norms: Sequence[torch.nn.BatchNorm2d],
    scale: Tensor | float,
    stride: int = 1,
    shortcut: bool = True,
    fista: bool = False,
    one_sided: bool = True,
) -> Tensor:
    """Res-CSC's pair of layers; scale 0 is ResNet, without the shortcut it is "simplified", without both plain. A step
    for each norm after the first."""
    first, second = dictionaries
    g = norm_threshold(norms[0], F.conv2d(x, first, None, stride, 1), 0.0, one_sided)
    x = x[:, :, ::stride, ::stride]
    if x.shape[1] < g.shape[1]:
        x = torch.cat([x, x.new_zeros(x.shape[0], g.shape[1] - x.shape[1], *x.shape[2:])], 1)
    t, before = 1.0, x
    for norm in norms[1:]:
        z = x
        if fista and norm is not norms[1]:
            t_before, t = t, (1 + math.sqrt(1 + 4 * t * t)) / 2
            z = x + (t_before - 1) / t * (x - before)
        step = F.conv2d(F.conv_transpose2d(z, second, None, 1, 1), second, None, 1, 1)
        u = F.conv2d(g, second, None, 1, 1) + scale * step
        before, x = x, norm_threshold(norm, u, z if shortcut else 0.0, one_sided)
    return x


def norm_threshold(norm: torch.nn.BatchNorm2d, u: Tensor, z: Tensor | float, one_sided: bool) -> Tensor:
    """T(norm(u) + z): ReLU, or the soft threshold of that less the norm's shift, which is minus the threshold."""
    if one_sided:
        return torch.relu(norm(u) + z)
    shift = norm.bias.view(1, -1, 1, 1)
    u = norm(u) - shift + z
    return torch.sign(u) * torch.relu(u.abs() - torch.relu(-shift))
