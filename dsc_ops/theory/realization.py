"""LISTA-CP as other networks: fully connected, convolutional, with other activations, with attention.

Each function takes a layer and returns a module of its own that computes the same, weights copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsc_ops import _checks, functional, reference
from dsc_ops.layers import LISTAConv, LISTAConv1d, LISTALinear
from dsc_ops.theory import _checks as check
from dsc_ops.theory.convolution import without_groups

__all__ = [
    "NetworkSize",
    "conv_to_attention",
    "lista_to_cnn",
    "lista_to_relu_network",
    "lista_to_transformer",
    "lista_with_activation",
    "matrix_to_cnn",
    "network_size",
]

Activation = str | Callable[[Tensor], Tensor]

# A head's softmax leaves exp(-SHARPNESS) to its second-best pixel: nothing beside the best one's 1 in any dtype.
SHARPNESS = 100.0


# --- fully connected --------------------------------------------------------------------------------------------------


def lista_to_relu_network(layer: LISTALinear, signal_bound: float | None = None) -> nn.Sequential:
    """LISTA-CP as a fully connected ReLU network: affine maps B_k, ReLU and linear maps A_k, K times.

    T(u) = relu(u - theta) - relu(-u - theta), and y is carried along:

        B_k (x, y) + c_k = (x + W_k^T(y - D x) - theta_k, -(...) - theta_k, y, -y),    A_k h = (h_1 - h_2, h_3 - h_4)

    Args:
        layer: :class:`dsc_ops.LISTALinear`.
        signal_bound: None carries y as relu(y) and relu(-y), exactly and whatever its size, with 2 d + 2 m rows in B_k.
            A number R >= |y| carries it as relu(y + R) - R, with the 2 d + m rows of the source, to rounding of R.

    Returns:
        nn.Sequential of nn.Linear and nn.ReLU: B_0, ReLU, A_0, B_1, ..., A_{K-1}; y (*, m) to codes (*, d), equal to
        ``layer(y)`` to rounding. Source: Li, Feng, Zhou, Lemma 5.3.

    >>> layer = LISTALinear(3, 5, iterations=2)
    >>> network = lista_to_relu_network(layer)
    >>> [tuple(module.weight.shape) for module in network if isinstance(module, torch.nn.Linear)]
    [(16, 3), (8, 16), (10, 8), (5, 10)]
    """
    name = "lista_to_relu_network"
    layer = check.module(name, "layer", layer, LISTALinear)
    if signal_bound is not None:
        signal_bound = _checks.number(name, "signal_bound", signal_bound, least=0)
    modules: list[nn.Module] = []
    for (A, a), (B, b) in _affine_maps(layer, signal_bound):
        modules += [_linear(B, b), nn.ReLU(), _linear(A, a)]
    return nn.Sequential(*modules)


Affine = tuple[Tensor, Tensor | None]


@torch.no_grad()
def _affine_maps(layer: LISTALinear, signal_bound: float | None) -> Iterator[tuple[Affine, Affine]]:
    """(A_k, a_k) and (B_k, c_k) of each iteration; the first B takes y alone, the last A gives x alone."""
    D, m, d = layer.dictionary, layer.in_features, layer.code_features
    one_m, one_d = torch.eye(m).to(D), torch.eye(d).to(D)
    for k in range(layer.iterations):
        W, theta = (layer.analysis[k], layer.theta[k]) if layer.untied else (layer.analysis, layer.theta)
        last = k == layer.iterations - 1
        on_code, on_signal = one_d - W @ D.T, W  # u = (1 - W^T D) x + W^T y, weights having atoms in rows
        u = on_signal if k == 0 else torch.cat([on_code, on_signal], dim=1)
        y = one_m if k == 0 else torch.cat([D.new_zeros(m, d), one_m], dim=1)
        signs = (1.0,) if layer.one_sided else (1.0, -1.0)
        rows, biases = [sign * u for sign in signs], [-theta for _ in signs]
        to_code, shift = torch.cat([sign * one_d for sign in signs], dim=1), None
        if not last and signal_bound is None:
            rows, biases = [*rows, y, -y], [*biases, D.new_zeros(2 * m)]
            back = torch.block_diag(to_code, torch.cat([one_m, -one_m], dim=1))
        elif not last:
            rows, biases = [*rows, y], [*biases, D.new_full((m,), signal_bound)]
            back, shift = torch.block_diag(to_code, one_m), torch.cat([D.new_zeros(d), D.new_full((m,), -signal_bound)])
        else:
            back = to_code
        yield (back, shift), (torch.cat(rows), torch.cat(biases))


@torch.no_grad()
def _linear(matrix: Tensor, bias: Tensor | None) -> nn.Linear:
    rows, columns = matrix.shape
    made = nn.Linear(columns, rows, bias=bias is not None, device=matrix.device, dtype=matrix.dtype)
    made.weight.copy_(matrix)
    if bias is not None:
        made.bias.copy_(bias)
    return made


# --- convolutional ----------------------------------------------------------------------------------------------------


class MatrixCNN(nn.Sequential):
    """See :func:`matrix_to_cnn`; (*, d) to (*, m)."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x.reshape(-1, 1, x.shape[-1]))
        return out.reshape(*x.shape[:-1], out.shape[1])


@torch.no_grad()
def matrix_to_cnn(A: Tensor, kernel_size: int, bias: Tensor | None = None) -> nn.Sequential:
    """A matrix as a stack of convolutions with kernel and stride s: ceil(log_s d) of them compute A x exactly.

    Each convolution gathers s neighbours into channels, without arithmetic: after l of them a pixel holds s^l values of
    x. The last one, whose single pixel sees all of x, multiplies by A.

    Args:
        A: (m, d).
        kernel_size: s, at least 2.
        bias: (m,), of the last convolution, or None.

    Returns:
        nn.Sequential of nn.Conv1d; x (*, d), read as a signal of d pixels and one channel, to (*, m), the m channels of
        the one pixel left. Weights: sum_{l < L} s^{2 l} + m s^L with L = max(1, ceil(log_s d)), O(d (d + m)).
        Source: Li, Feng, Zhou, Lemma 5.3.

    >>> A = torch.arange(6.0).reshape(2, 3)
    >>> cnn = matrix_to_cnn(A, 2)
    >>> len(cnn), cnn(torch.tensor([1.0, 10.0, 100.0])).detach()
    (2, tensor([210., 543.]))
    """
    name = "matrix_to_cnn"
    A = check.matrix(name, "A", A)
    s = _checks.integer(name, "kernel_size", kernel_size, least=2)
    if bias is not None:
        bias = _checks.like(name, "bias", bias, "A", A)
        if bias.shape != A.shape[:1]:
            raise ValueError(f"{name}: bias has shape {tuple(bias.shape)}, it takes ({A.shape[0]},)")
    options = {"device": A.device, "dtype": A.dtype}
    # slots[c, p] is the number of the coordinate of x that channel c of pixel p holds; -1 is padding.
    slots = torch.arange(A.shape[1], device=A.device).unsqueeze(0)
    convolutions = []
    while slots.shape[1] > 1 or not convolutions:
        channels, length = slots.shape
        count = -(-length // s)
        padding = (s * count - length + 1) // 2
        padded = F.pad(slots, (padding, s * count - length), value=-1)[:, : s * count]
        slots = padded.reshape(channels, count, s).transpose(1, 2).reshape(channels * s, count)
        last = count == 1
        conv = nn.Conv1d(channels, len(A) if last else channels * s, s, s, padding, bias=False, **options)
        if last:
            columns = torch.cat([A, A.new_zeros(len(A), 1)], dim=1)[:, slots[:, 0]]  # -1 is the column of zeros
            conv.weight.copy_(columns.reshape(len(A), channels, s))
            if bias is not None:
                conv.bias = nn.Parameter(bias.detach().clone())
        else:
            conv.weight.copy_(torch.eye(channels * s).reshape(channels * s, channels, s))
        convolutions.append(conv)
    return MatrixCNN(*convolutions)


def lista_to_cnn(layer: LISTALinear, kernel_size: int, signal_bound: float | None = None) -> nn.Sequential:
    """LISTA-CP as a convolutional network: :func:`lista_to_relu_network` with each matrix by :func:`matrix_to_cnn`.

    Between two matrices the channels of the one pixel are read as pixels of one channel again.

    Args:
        layer: :class:`dsc_ops.LISTALinear`.
        kernel_size: s, kernel and stride of every convolution, at least 2.
        signal_bound: as in :func:`lista_to_relu_network`.

    Returns:
        nn.Sequential of stacks of nn.Conv1d, and nn.ReLU; y (*, m) to codes (*, d), equal to ``layer(y)`` to rounding.
        Its depth is O(K log_s(d + m)), its weights are O(K (d + m)^2); :func:`network_size` counts them. Source: Li,
        Feng, Zhou, Lemma 5.3.

    >>> network_size(lista_to_cnn(LISTALinear(4, 8, iterations=2), 2)).depth
    15
    """
    name = "lista_to_cnn"
    layer = check.module(name, "layer", layer, LISTALinear)
    kernel_size = _checks.integer(name, "kernel_size", kernel_size, least=2)
    dense = lista_to_relu_network(layer, signal_bound)
    return nn.Sequential(
        *[
            matrix_to_cnn(module.weight.detach(), kernel_size, module.bias) if isinstance(module, nn.Linear) else module
            for module in dense
        ]
    )


@dataclass(frozen=True)
class NetworkSize:
    """What a network consists of: its depth, its weights (biases included), and those that are not zero.

    >>> NetworkSize(depth=1, weights=6, nonzeros=5).depth
    1
    """

    depth: int
    weights: int
    nonzeros: int


def network_size(network: nn.Module) -> NetworkSize:
    """Depth, the number of linear maps in sequence, and weights of a network of convolutions or matrices.

    Args:
        network: made of nn.Conv1d, nn.Conv2d and nn.Linear one after the other, and modules without parameters.

    Returns:
        :class:`NetworkSize`. Source: the orders of Li, Feng, Zhou, Lemma 5.3, are in these terms.

    >>> network_size(torch.nn.Linear(2, 3))
    NetworkSize(depth=1, weights=9, nonzeros=9)
    """
    network = check.module("network_size", "network", network, nn.Module)
    linear = [module for module in network.modules() if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear)]
    parameters = [parameter for module in linear for parameter in module.parameters()]
    weights = sum(parameter.numel() for parameter in parameters)
    return NetworkSize(len(linear), weights, sum(int(parameter.count_nonzero()) for parameter in parameters))


# --- other activations ------------------------------------------------------------------------------------------------


class ActivationLISTA(nn.Module):
    """See :func:`lista_with_activation`."""

    def __init__(self, layer: LISTALinear | LISTAConv | LISTAConv1d, rho: Activation):
        super().__init__()
        self.rho, self.untied, self.one_sided, self.iterations = rho, layer.untied, layer.one_sided, layer.iterations
        self.dense = isinstance(layer, LISTALinear)
        self.geometry = {} if self.dense else layer._geometry()
        for name in ("dictionary", "analysis", "theta"):
            self.register_parameter(name, nn.Parameter(getattr(layer, name).detach().clone()))

    def shrink(self, u: Tensor, theta: Tensor) -> Tensor:
        if isinstance(self.rho, str):
            return functional.shrink(u, theta, activation=self.rho, one_sided=self.one_sided)
        theta = theta.reshape(-1, *[1] * (u.dim() - 2))
        above = self.rho(u - theta)
        return above if self.one_sided else above - self.rho(-u - theta)

    def forward(self, y: Tensor) -> Tensor:
        signal, D, W = y, self.dictionary, self.analysis
        if self.dense:
            signal, D, W = y.reshape(-1, y.shape[-1], 1), D.unsqueeze(-1), W.unsqueeze(-1)
        x = None
        for k in range(self.iterations):
            weight, theta = (W[k], self.theta[k]) if self.untied else (W, self.theta)
            size = signal.shape[2:]
            residual = signal if x is None else signal - functional.synthesis(x, D, size, **self.geometry)
            step = functional.analysis(residual, weight, **self.geometry)
            x = self.shrink(step if x is None else x + step, theta)
        return x.reshape(*y.shape[:-1], -1) if self.dense else x


def lista_with_activation(layer: LISTALinear | LISTAConv | LISTAConv1d, rho: Activation) -> nn.Module:
    """LISTA-CP with another activation in its threshold: T_rho(u) = rho(u - theta) - rho(-u - theta).

    With |rho(v) - relu(v)| <= beta, |T_rho - T| <= 2 beta, and the code differs by O(beta);
    :func:`certified_lista` gives the constants (its argument beta). A smaller beta comes from scaling:
    v -> t rho(v / t) has t beta, and the same Lipschitz constant.

    Args:
        layer: :class:`dsc_ops.LISTALinear` or :class:`dsc_ops.LISTAConv`.
        rho: relu (the layer itself), leaky_relu, elu, silu, mish, gelu, or a function of tensors.

    Returns:
        A module with the layer's parameters copied (dictionary, analysis, theta), trainable, y to codes as the layer.
        Source: Li, Feng, Zhou, Theorems 3.4 and 3.5, section 5.4.

    >>> layer = LISTALinear(3, 5)
    >>> bool(torch.equal(lista_with_activation(layer, "relu")(torch.zeros(2, 3)), layer(torch.zeros(2, 3))))
    True
    """
    name = "lista_with_activation"
    layer = check.module(name, "layer", layer, LISTALinear, LISTAConv, LISTAConv1d)
    if not callable(rho) and rho not in reference.ACTIVATIONS:
        raise ValueError(f"{name}: rho is {rho!r}, it takes a function or one of {', '.join(reference.ACTIVATIONS)}")
    return ActivationLISTA(layer, rho)


# --- attention --------------------------------------------------------------------------------------------------------


class ConvAttention(nn.Module):
    """Multi-head self-attention over pixels that computes a convolution: see :func:`conv_to_attention`.

    Head h looks from each pixel at the one displaced by ``centres[h]``: the score of a pixel at displacement delta is
    -sharpness ||delta - centres[h]||^2, which is the inner product of (||delta||^2, delta) with a vector of the head.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ):
        super().__init__()
        _, channels, *kernel = weight.shape
        self.stride, self.padding = tuple(stride), tuple(padding)
        steps = [torch.arange(k, device=weight.device) * d for k, d in zip(kernel, dilation, strict=True)]
        centres = torch.cartesian_prod(*steps).reshape(-1, len(kernel))
        self.centres = nn.Parameter(centres.to(weight.dtype))
        self.sharpness = nn.Parameter(torch.tensor(SHARPNESS, device=weight.device, dtype=weight.dtype))
        # The output projection, one block of columns for each head; the value projections are identities.
        self.output = _linear(weight.detach().flatten(2).transpose(1, 2).flatten(1), bias)
        self.extent = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """-sharpness ||delta - centre||^2 + constant, (heads, queries, keys), for pixels (*, axes)."""
        displacement = keys.unsqueeze(0) - queries.unsqueeze(1)
        relative = torch.cat([displacement.square().sum(dim=-1, keepdim=True), displacement], dim=-1)
        head = torch.cat([-torch.ones_like(self.centres[:, :1]), 2 * self.centres], dim=1) * self.sharpness
        return torch.einsum("qkr,hr->hqk", relative, head.to(relative.dtype))

    def attention(self, size: Sequence[int]) -> Tensor:
        """Attention probabilities (heads, queries, keys) on a padded signal of one size."""
        options = {"device": self.centres.device, "dtype": torch.promote_types(self.centres.dtype, torch.float32)}
        places = [torch.arange(n, **options) for n in size]
        starts = [
            torch.arange(0, n - e + 1, s, **options) for n, e, s in zip(size, self.extent, self.stride, strict=True)
        ]
        grids = [torch.cartesian_prod(*axes).reshape(-1, len(size)) for axes in (starts, places)]
        return self.scores(*grids).softmax(dim=-1).to(self.centres.dtype)

    def forward(self, y: Tensor) -> Tensor:
        # Pixels beyond the border are tokens that hold zero.
        padded = F.pad(y, [p for pad in reversed(self.padding) for p in (pad, pad)])
        size = padded.shape[2:]
        heads = torch.einsum("hqk,nck->nqhc", self.attention(size), padded.flatten(2))
        out = self.output(heads.flatten(2)).transpose(1, 2)
        code = [(n - e) // s + 1 for n, e, s in zip(size, self.extent, self.stride, strict=True)]
        return out.reshape(*out.shape[:2], *code)


def conv_to_attention(conv: nn.Conv2d) -> nn.Module:
    """A convolution as multi-head self-attention with quadratic relative positions, one head a kernel pixel.

    Each head's scores depend on the displacement of two pixels alone, -alpha ||delta - delta_h||^2, and are so sharp
    that its softmax picks the one pixel at delta_h. The output projection holds the kernel.

    Args:
        conv: nn.Conv2d (or nn.Conv1d) with zero padding; any kernel, stride, dilation, groups.

    Returns:
        A module with parameters centres (heads, 2), sharpness, output.weight (out, heads in) and output.bias, y (N, C,
        H, W) to the convolution's output, to rounding. Its attention has H W values a query: for small pictures.
        Source: Cordonnier, Loukas, Jaggi (ICLR 2020), Theorem 1; Li, Feng, Zhou, Remark 3.6.

    >>> conv = torch.nn.Conv2d(3, 8, 3, padding=1)
    >>> y = torch.randn(2, 3, 6, 5)
    >>> bool(torch.allclose(conv_to_attention(conv)(y), conv(y), atol=1e-5))
    True
    """
    name = "conv_to_attention"
    conv = check.module(name, "conv", conv, nn.Conv2d, nn.Conv1d)
    if conv.padding_mode != "zeros":
        raise ValueError(f'{name}: conv has padding_mode {conv.padding_mode!r}, it takes "zeros"')
    padding = conv.padding
    if isinstance(padding, str):
        spans = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if padding == "same" and any(span % 2 for span in spans):
            raise ValueError(f'{name}: conv has padding "same" with kernel {conv.kernel_size}, it takes odd kernels')
        padding = [span // 2 if padding == "same" else 0 for span in spans]
    weight = without_groups(conv.weight.detach(), conv.groups)
    return ConvAttention(weight, conv.bias, conv.stride, padding, conv.dilation)


class SynthesisAttention(nn.Module):
    """S_D by attention: the convolution with the flipped atoms of the code with stride - 1 zeros between its pixels."""

    def __init__(self, layer: LISTAConv):
        super().__init__()
        atoms = without_groups(layer.dictionary.detach(), layer.groups)
        axes = tuple(range(2, atoms.dim()))
        dims = len(axes)
        flipped = atoms.flip(axes).transpose(0, 1)
        self.attention = ConvAttention(flipped, None, [1] * dims, [0] * dims, layer.dilation)
        self.stride, self.padding, self.extent = layer.stride, layer.padding, self.attention.extent

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        spread = x
        for axis, s in enumerate(self.stride, start=2):
            count = spread.shape[axis]
            spread = torch.stack([spread, *[torch.zeros_like(spread)] * (s - 1)], dim=axis + 1).flatten(axis, axis + 1)
            spread = spread.narrow(axis, 0, (count - 1) * s + 1)
        # Zeros around, so that each pixel of the signal sees a whole kernel; a border wider than the kernel is cut.
        margins = []
        for n, p, e, length in zip(size, self.padding, self.extent, spread.shape[2:], strict=True):
            left = e - 1 - p
            margins.append((left, n + e - 1 - left - length))
        return self.attention(F.pad(spread, [m for pair in reversed(margins) for m in pair]))


class TransformerBlock(nn.Module):
    """One LISTA-CP iteration: attention on the residual, added to the code, then a ReLU MLP a pixel.

    The MLP is T(u) = relu(u - theta) - relu(-u - theta): a Linear from M to 2 M, ReLU, a Linear back.
    """

    def __init__(self, layer: LISTAConv, weight: Tensor, theta: Tensor):
        super().__init__()
        full = without_groups(weight.detach(), layer.groups)
        self.analysis = ConvAttention(full, None, layer.stride, layer.padding, layer.dilation)
        one = torch.eye(len(full)).to(full)
        signs = (1.0,) if layer.one_sided else (1.0, -1.0)
        rise = _linear(torch.cat([sign * one for sign in signs]), torch.cat([-theta.detach() for _ in signs]))
        self.mlp = nn.Sequential(rise, nn.ReLU(), _linear(torch.cat([sign * one for sign in signs], dim=1), None))

    def forward(self, x: Tensor | None, residual: Tensor) -> Tensor:
        u = self.analysis(residual)
        return self.mlp((u if x is None else x + u).movedim(1, -1)).movedim(-1, 1)


class TransformerLISTA(nn.Module):
    """See :func:`lista_to_transformer`."""

    def __init__(self, layer: LISTAConv):
        super().__init__()
        self.synthesis = SynthesisAttention(layer)
        weights = layer.analysis if layer.untied else layer.analysis.expand(layer.iterations, *layer.analysis.shape)
        thetas = layer.theta if layer.untied else layer.theta.expand(layer.iterations, -1)
        self.blocks = nn.ModuleList(TransformerBlock(layer, W, t) for W, t in zip(weights, thetas, strict=True))

    def forward(self, y: Tensor) -> Tensor:
        x = None
        for block in self.blocks:
            x = block(x, y if x is None else y - self.synthesis(x, y.shape[2:]))
        return x


def lista_to_transformer(layer: LISTAConv) -> nn.Module:
    """A convolutional LISTA as a transformer: attention, a residual connection and a ReLU MLP an iteration.

    x <- MLP(x + attention(y - attention(x))): the attentions are A_W and S_D as in :func:`conv_to_attention`, the MLP
    is the threshold, relu(u - theta) - relu(-u - theta).

    Args:
        layer: :class:`dsc_ops.LISTAConv` or :class:`dsc_ops.LISTAConv1d`; any stride, padding, dilation, groups.

    Returns:
        A module, y (N, C, H, W) to codes (N, M, H', W'), equal to ``layer(y)`` to rounding. Source: Li, Feng, Zhou,
        Remark 3.6.

    >>> layer = LISTAConv(1, 4, 3, iterations=2)
    >>> y = torch.randn(1, 1, 5, 6)
    >>> bool(torch.allclose(lista_to_transformer(layer)(y), layer(y), atol=1e-5))
    True
    """
    return TransformerLISTA(check.module("lista_to_transformer", "layer", layer, LISTAConv, LISTAConv1d))
