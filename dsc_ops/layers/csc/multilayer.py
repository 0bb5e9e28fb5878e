"""Multi-layer convolutional sparse coding: a CNN whose codes are estimated once more, together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dsc_ops import _checks as check
from dsc_ops import functional, reference
from dsc_ops.layers.threshold import ConvSoftThreshold

_ops = torch.ops.dsc_ops

METHODS = ("layered-thresholding", "layered-ista", "ml-ista", "ml-fista", "ml-lista")


class _Dictionary(nn.Module):
    """One layer's dictionary with its step c and its thresholds, and what is done with it."""

    def __init__(self, conv: nn.Module, method: str, one_sided: bool, learn_threshold: bool):
        super().__init__()
        if not isinstance(conv, (nn.Conv2d, ConvSoftThreshold)):
            raise TypeError(f"MLCSC: layers has a {type(conv).__name__}, it takes nn.Conv2d or ConvSoftThreshold")
        if isinstance(conv, nn.Conv2d):
            conv = ConvSoftThreshold.from_conv(conv, one_sided=one_sided)
        self.geometry = dict(stride=conv.stride, padding=conv.padding, dilation=conv.dilation, groups=conv.groups)
        self.one_sided = one_sided
        weight = conv.weight.detach()
        theta = conv.theta.detach() - (0 if conv.bias is None else conv.bias.detach())
        self.dictionary = nn.Parameter(weight.clone())
        self.scale = nn.Parameter(weight.new_ones(())) if method != "ml-lista" else None
        self.analysis = nn.Parameter(weight.clone()) if method == "ml-lista" else None
        self.theta = nn.Parameter(theta.clone(), requires_grad=learn_threshold)

    def reset_parameters(self) -> None:
        fan_in = self.dictionary[0].numel()
        for weight in (self.dictionary, self.analysis):
            if weight is not None:
                nn.init.normal_(weight, std=0.1 / math.sqrt(fan_in))
        if self.scale is not None:
            nn.init.ones_(self.scale)
        nn.init.zeros_(self.theta)

    def first(self, y: Tensor) -> Tensor:
        """T(A_W y), W = c D, or the analysis of ML-LISTA: a layer of a CNN."""
        return functional.conv_soft_threshold(y, self.weight(), self.theta, **self.geometry, one_sided=self.one_sided)

    def weight(self) -> Tensor:
        return self.dictionary * self.scale if self.analysis is None else self.analysis

    def ista(self, y: Tensor, iterations: int) -> Tensor:
        """That many ISTA steps on the signal y, from zero."""
        weight = self.weight()
        options = dict(iterations=iterations, **self.geometry, one_sided=self.one_sided)
        return functional.lista(y, self.dictionary, weight, self.theta, **options)

    def back(self, x: Tensor, weight: Tensor, size: torch.Size) -> Tensor:
        return reference.synthesis(x, weight, size, **self.geometry)

    def step(self, x: Tensor, towards: Tensor) -> Tensor:
        """T(x + A_W r): what the residual r of the layer before adds to a code."""
        u = reference.analysis(towards, self.weight(), **self.geometry)
        return self.threshold(u, x)

    def threshold(self, u: Tensor, x: Tensor) -> Tensor:
        """T(u + x) in one pass."""
        u, x = (t.contiguous() for t in (u, x.to(u.dtype)))
        return _ops.soft_threshold(u, self.theta.to(u.dtype), None, x, self.one_sided)


class MLCSC(nn.Module):
    """Multi-layer convolutional sparse coding: y = S_1 x_1, x_1 = S_2 x_2, ..., estimated from a CNN's forward pass.

    Args:
        layers: the CNN, shallowest first: nn.Conv2d modules, each followed by ReLU in thought, or
            :class:`dsc_ops.ConvSoftThreshold`. Their weights and biases are copied: dictionary = weight, theta = -bias.
        method: how the codes are estimated, see below.
        unfoldings: further estimates after the forward pass. 0 is the plain CNN, whatever the method.
        one_sided: codes x >= 0 (ReLU); else of both signs.
        learn_threshold: whether theta is learned.

    Every method starts with x_i = T_i(c_i A_i x_{i-1}), x_0 = y. Then, for each unfolding,

    - "layered-thresholding" has none;
    - "layered-ista": layer i takes its steps x_i <- T_i(x_i + c_i A_i(x_{i-1} - S_i x_i)) before layer i + 1 starts;
    - "ml-ista": from the deepest code g_L = x_L down, g_{i-1} = S_i g_i; then up, x_i = T_i(g_i - c_i A_i(S_i g_i -
      x_{i-1})). With K unfoldings ISTA on all layers together;
    - "ml-fista": the same with g_L = x_L + (t - 1) / t' (x_L - its value before), t' = (1 + sqrt(1 + 4 t^2)) / 2;
    - "ml-lista": g_{i-1} = S_{B_i} g_i down, x_i = T_i(g_i - A_i S_i g_i + A_{B_i} x_{i-1}) up, also in the first pass
      A_{B_i}, with an analysis B_i that is learned besides the dictionary.

    Shape: y (N, C, H, W) to the deepest code x_L; :meth:`codes` returns all of them. state_dict, by layer: dictionary,
    theta (M,), and scale (0-d, c_i, starting at 1) or, for "ml-lista", analysis (B_i, starting as the dictionary).
    Raises ``ValueError`` for another method, for unfoldings of "layered-thresholding" and for layers that do not follow
    each other. Source: Sulam et al. (TPAMI 2019); for "layered-ista" Papyan, Romano, Elad (JMLR 2017).

    >>> convolutions = [nn.Conv2d(3, 8, 4, 2, 1), nn.Conv2d(8, 16, 4, 2, 1)]
    >>> layer = MLCSC(convolutions, method="ml-fista", unfoldings=2)
    >>> [tuple(x.shape) for x in layer.codes(torch.zeros(1, 3, 8, 8))]
    [(1, 8, 4, 4), (1, 16, 2, 2)]
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        method: str = "ml-ista",
        unfoldings: int = 0,
        *,
        one_sided: bool = True,
        learn_threshold: bool = True,
    ):
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"MLCSC: method is {method!r}, it takes one of {', '.join(METHODS)}")
        self.method = method
        self.unfoldings = check.integer("MLCSC", "unfoldings", unfoldings, least=0)
        if method == "layered-thresholding" and unfoldings:
            raise ValueError(f"MLCSC: unfoldings is {unfoldings}, layered-thresholding takes 0")
        if not isinstance(layers, (Sequence, nn.Sequential, nn.ModuleList)) or not len(layers):
            raise TypeError(f"MLCSC: layers must be a sequence of at least one convolution, got {layers!r}")
        self.layers = nn.ModuleList(
            _Dictionary(conv, method, bool(one_sided), bool(learn_threshold)) for conv in layers
        )
        for i, (before, after) in enumerate(zip(self.layers, self.layers[1:], strict=False)):
            atoms, channels = before.dictionary.shape[0], after.dictionary.shape[1] * after.geometry["groups"]
            if atoms != channels:
                raise ValueError(f"MLCSC: layers[{i}] has {atoms} code channels, layers[{i + 1}] takes {channels}")

    def reset_parameters(self) -> None:
        """The published start: weights from N(0, 0.01 / fan_in), c = 1, theta = 0."""
        for layer in self.layers:
            layer.reset_parameters()

    def forward(self, y: Tensor) -> Tensor:
        return self.codes(y)[-1]

    def codes(self, y: Tensor) -> list[Tensor]:
        """x_1, ..., x_L of a signal."""
        iterations = 1 + self.unfoldings if self.method == "layered-ista" else 1
        x = [y]
        for layer in self.layers:
            x.append(layer.first(x[-1]) if iterations == 1 else layer.ista(x[-1], iterations))
        if self.method in ("ml-ista", "ml-fista", "ml-lista"):
            unfold = self._lista if self.method == "ml-lista" else self._ista
            x = self._unfolded(x, unfold)
        return x[1:]

    def _unfolded(self, x: list[Tensor], unfold: Callable[[list[Tensor], Tensor], list[Tensor]]) -> list[Tensor]:
        momentum = "fista" if self.method == "ml-fista" else None
        before = x[-1]
        # The weights of `lista`, of which the first belongs to the forward pass.
        weights = reference.momentum_weights(momentum, 1 + self.unfoldings)[1:] or [0.0] * self.unfoldings
        for weight in weights:
            deepest = torch.lerp(before, x[-1], 1 + weight) if weight else x[-1]
            before = x[-1]
            x = unfold(x, deepest)
        return x

    def _ista(self, x: list[Tensor], deepest: Tensor) -> list[Tensor]:
        """One unfolding of ML-ISTA. What goes down, S_i g_i, is what layer i compares with x_{i-1} on the way up."""
        down = [deepest]
        for layer, signal in zip(reversed(self.layers), reversed(x[:-1]), strict=True):
            down.append(layer.back(down[-1], layer.dictionary, signal.shape[2:]))
        down.reverse()
        up = [x[0]]
        for i, layer in enumerate(self.layers):
            up.append(layer.step(down[i + 1], up[i] - down[i]))
        return up

    def _lista(self, x: list[Tensor], deepest: Tensor) -> list[Tensor]:
        down = [deepest]
        for layer, signal in zip(reversed(self.layers[1:]), reversed(x[1:-1]), strict=True):
            down.append(layer.back(down[-1], layer.analysis, signal.shape[2:]))
        down.reverse()
        up = [x[0]]
        for g, layer in zip(down, self.layers, strict=True):
            u = reference.analysis(
                layer.back(g, layer.dictionary, up[-1].shape[2:]), layer.dictionary, **layer.geometry
            )
            u = reference.analysis(up[-1], layer.analysis, **layer.geometry) - u
            up.append(layer.threshold(u, g))
        return up

    def extra_repr(self) -> str:
        return f"method={self.method!r}, unfoldings={self.unfoldings}"
