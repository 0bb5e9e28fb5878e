"""LISTA-CP as layers: convolutional in one and two dimensions, and dense."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import Self

from dsc_ops import _calls as calls
from dsc_ops import _checks as check
from dsc_ops import functional, reference
from dsc_ops.layers.state import WholeState
from dsc_ops.layers.threshold import weight_shape

# The step 1/L of a new layer holds for signals of any size: L is taken on one of this many kernel extents, where it has
# all but reached its limit.
_EXTENTS = 8


def _whole(parameter: Tensor) -> Tensor:
    """All of a parameter of which fully_shard leaves each process a part."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


class _Unrolled(WholeState):
    """The parameters of K iterations, dictionary, analysis and theta, and their start: K steps of ISTA."""

    def _make_parameters(self, shape: tuple[int, ...], device, dtype) -> None:
        per_iteration = (self.iterations,) if self.untied else ()
        self.dictionary = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.analysis = nn.Parameter(torch.empty(*per_iteration, *shape, device=device, dtype=dtype))
        self.theta = nn.Parameter(torch.empty(*per_iteration, shape[0], device=device, dtype=dtype))
        self.reset_parameters()

    def lipschitz(self) -> Tensor:
        """L, of which the start takes the step 1/L."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Random atoms of unit norm, analysis = dictionary / L, theta as given to the layer."""
        with torch.no_grad():
            atoms = torch.randn_like(self.dictionary).flatten(1)
            self._fill("dictionary", (atoms / atoms.norm(dim=1, keepdim=True)).view_as(self.dictionary))
        self.reset_iterations()

    def reset_iterations(self) -> None:
        """analysis = dictionary / L and theta as given: K steps of ISTA on the dictionary as it is now."""
        with torch.no_grad():
            self._fill("analysis", self.dictionary * reference.longest_step(self.lipschitz()))
            self._fill("theta", torch.full_like(self.theta, self._theta))

    def _fill(self, name: str, value: Tensor) -> None:
        if parametrize.is_parametrized(self, name):
            # By way of the parametrization's inverse; a copy_ would fill what the parametrization has computed.
            setattr(self, name, value.expand_as(getattr(self, name)))
        else:
            getattr(self, name).copy_(value)

    def _take_dictionary(self, dictionary: Tensor) -> Self:
        with torch.no_grad():
            self.dictionary.copy_(dictionary)
        self.reset_iterations()
        return self


class ConvolutionalCodes(nn.Module):
    """A layer whose codes have a convolutional dictionary: its geometry, and the way back to signals."""

    dims: int

    def _geometry(self) -> dict:
        return dict(stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups)

    def decode(self, codes: Tensor, signal_size: int | tuple[int, ...] | None = None) -> Tensor:
        """The signal of a code, S_D(codes): the adjoint of the analysis with the dictionary.

        Args:
            codes: (N, M, *code_size).
            signal_size: spatial size; None is the largest that has codes of this size (with the default padding, stride
                times code_size).
        """
        codes = check.tensor(f"{type(self).__name__}.decode", "codes", codes)
        if signal_size is None:
            sizes = zip(codes.shape[2:], self.stride, self.padding, self.dilation, self.kernel_size, strict=False)
            signal_size = tuple(n * s - 2 * p + d * (k - 1) for n, s, p, d, k in sizes)
            if len(signal_size) != self.dims:
                raise ValueError(
                    f"{type(self).__name__}.decode: codes has shape {tuple(codes.shape)}, "
                    f"it takes (N, {self.code_channels}, *code_size) with {self.dims} spatial dimensions"
                )
        return functional.synthesis(codes, self.dictionary, signal_size, **self._geometry())


class _LISTAConv(ConvolutionalCodes, _Unrolled):
    """See :class:`LISTAConv`."""

    def __init__(
        self,
        in_channels: int,
        code_channels: int,
        kernel_size: int | tuple[int, ...],
        iterations: int = 3,
        *,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str | None = None,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        theta: float = 0.1,
        untied: bool = True,
        one_sided: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        name = type(self).__name__
        shape = weight_shape(name, self.dims, in_channels, code_channels, kernel_size, groups)
        self.in_channels, self.code_channels, self.groups = in_channels, code_channels, groups
        self.kernel_size = shape[2:]
        self.iterations = check.integer(name, "iterations", iterations, least=1)
        self.untied, self.one_sided = bool(untied), bool(one_sided)
        self._theta = check.number(name, "theta", theta)
        weight = torch.empty(shape, device="meta")
        if padding is None:
            strides = check.integers(name, "stride", stride, self.dims, least=1)
            dilations = check.integers(name, "dilation", dilation, self.dims, least=1)
            strided = any(s != 1 for s in strides)
            halves = tuple(d * (k - 1) // 2 for d, k in zip(dilations, self.kernel_size, strict=True))
            padding = halves if strided else "same"
        conv = check.geometry(name, "dictionary", weight, stride, padding, dilation, groups)
        self.stride, self.padding, self.dilation = tuple(conv.stride), tuple(conv.padding), tuple(conv.dilation)
        self._make_parameters(shape, device, dtype)

    @classmethod
    def from_dictionary(cls, dictionary: Tensor, iterations: int = 3, *, groups: int = 1, **options) -> Self:
        """A layer with a copy of a given dictionary (M, C/groups, *kernel), starting as K steps of ISTA on it.

        ``options`` are the layer's keyword arguments: stride, padding, dilation, theta, untied, one_sided.
        """
        dictionary = check.weight(f"{cls.__name__}.from_dictionary", "dictionary", dictionary)
        if dictionary.dim() != cls.dims + 2:
            raise ValueError(
                f"{cls.__name__}.from_dictionary: dictionary has shape {tuple(dictionary.shape)}, "
                f"it takes {cls.dims + 2} dimensions, (M, C/groups, *kernel)"
            )
        atoms, channels, *kernel = dictionary.shape
        options = {"device": dictionary.device, "dtype": dictionary.dtype} | options
        layer = cls(channels * groups, atoms, tuple(kernel), iterations, groups=groups, **options)
        return layer._take_dictionary(dictionary)

    def _apply(self, fn, recurse=True):
        """What .to() does to a weight it does to each iteration's: channels_last exists in four dimensions alone."""

        def each(t: Tensor) -> Tensor:
            return fn(t.flatten(0, 1)).unflatten(0, t.shape[:2]) if t.dim() == 5 else fn(t)

        return super()._apply(each, recurse)

    def lipschitz(self) -> Tensor:
        """L of the dictionary, on a signal of eight kernel extents along each axis."""
        size = [_EXTENTS * (d * (k - 1) + 1) for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        return functional.lipschitz(_whole(self.dictionary), size, **self._geometry())

    def forward(self, y: Tensor) -> Tensor:
        dictionary = self.dictionary
        conv = check.layer_signal(self, y, "dictionary", dictionary)
        return calls.lista(y, dictionary, self.analysis, self.theta, None, [], self.iterations, conv, self.one_sided)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.code_channels}, kernel_size={self.kernel_size}, iterations={self.iterations}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"untied={self.untied}, one_sided={self.one_sided}"
        )


class LISTAConv(_LISTAConv):
    """K unrolled LISTA-CP iterations: x <- T_k(x + A_{W_k}(y - S_D x)) from zero.

    Args:
        in_channels: C.
        code_channels: M, the number of atoms.
        kernel_size: of the atoms.
        iterations: K.
        stride, dilation, groups: as in nn.Conv2d.
        padding: as in nn.Conv2d; None is "same", or (kernel - 1) // 2 (times dilation) when strided.
        theta: initial threshold of every atom and iteration.
        untied: one analysis and one theta per iteration; else one for all.
        one_sided: codes of one sign, max(u - theta, 0).

    Shape: y (N, C, H, W) to codes (N, M, H', W'). state_dict: dictionary (M, C/groups, kh, kw), analysis (K, M,
    C/groups, kh, kw) and theta (K, M) when untied, else without K.

    A new layer is exactly K steps of ISTA with lam = theta L: random atoms of unit norm, analysis = dictionary / L, L
    being the dictionary's Lipschitz constant on large signals. Source: Chen, Liu, Wang, Yin (NeurIPS 2018); Li, Feng,
    Zhou, eq. 6.

    >>> layer = LISTAConv(3, 16, 5)
    >>> codes = layer(torch.zeros(2, 3, 8, 8))
    >>> codes.shape, layer.decode(codes).shape
    (torch.Size([2, 16, 8, 8]), torch.Size([2, 3, 8, 8]))
    """

    dims = 2


class LISTAConv1d(_LISTAConv):
    """:class:`LISTAConv` for signals (N, C, length); arguments as there.

    >>> LISTAConv1d(1, 16, 9, iterations=5)(torch.zeros(2, 1, 32)).shape
    torch.Size([2, 16, 32])
    """

    dims = 1


class LISTALinear(_Unrolled):
    """K unrolled LISTA-CP iterations on vectors: x <- T_k(x + W_k (y - x D)), rows being samples.

    Args:
        in_features: m, length of a signal.
        code_features: d, the number of atoms.
        iterations: K.
        theta, untied, one_sided: as in :class:`LISTAConv`.

    Shape: y (*, m) to codes (*, d). state_dict: dictionary (d, m), one atom a row, analysis (K, d, m) and theta (K, d)
    when untied, else without K. A new layer is exactly K steps of ISTA with lam = theta L, L the squared spectral norm.

    >>> LISTALinear(20, 50)(torch.zeros(4, 20)).shape
    torch.Size([4, 50])
    """

    def __init__(
        self,
        in_features: int,
        code_features: int,
        iterations: int = 3,
        *,
        theta: float = 0.1,
        untied: bool = True,
        one_sided: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.in_features = check.integer("LISTALinear", "in_features", in_features, least=1)
        self.code_features = check.integer("LISTALinear", "code_features", code_features, least=1)
        self.iterations = check.integer("LISTALinear", "iterations", iterations, least=1)
        self.untied, self.one_sided = bool(untied), bool(one_sided)
        self._theta = check.number("LISTALinear", "theta", theta)
        self._make_parameters((code_features, in_features), device, dtype)

    @classmethod
    def from_dictionary(cls, dictionary: Tensor, iterations: int = 3, **options) -> Self:
        """A layer with a copy of a given dictionary (d, m), one atom a row, starting as K steps of ISTA on it."""
        dictionary = check.tensor("LISTALinear.from_dictionary", "dictionary", dictionary)
        if dictionary.dim() != 2 or 0 in dictionary.shape:
            raise ValueError(
                f"LISTALinear.from_dictionary: dictionary has shape {tuple(dictionary.shape)}, "
                "it takes (code_features, in_features)"
            )
        options = {"device": dictionary.device, "dtype": dictionary.dtype} | options
        layer = cls(dictionary.shape[1], dictionary.shape[0], iterations, **options)
        return layer._take_dictionary(dictionary)

    def lipschitz(self) -> Tensor:
        """L: the squared spectral norm of the dictionary."""
        dictionary = _whole(self.dictionary)
        wide = dictionary if dictionary.dtype == torch.float64 else dictionary.float()
        return torch.linalg.matrix_norm(wide, 2).square().to(dictionary.dtype)

    def forward(self, y: Tensor) -> Tensor:
        y = check.tensor("LISTALinear", "y", y)
        if y.dim() < 1 or y.shape[-1] != self.in_features:
            raise ValueError(f"LISTALinear: y has shape {tuple(y.shape)}, it takes (*, {self.in_features})")
        # Signals of one pixel under kernels of one pixel. On a GPU, whose kernels take eight pixels of a row at a time,
        # one signal whose pixels are the samples, unless there are none.
        rows = y.reshape(-1, self.in_features)
        across = rows.is_cuda and rows.shape[0] > 0
        codes = functional.lista(
            rows.t().unsqueeze(0) if across else rows.unsqueeze(-1),
            self.dictionary.unsqueeze(-1),
            self.analysis.unsqueeze(-1),
            self.theta,
            iterations=self.iterations,
            one_sided=self.one_sided,
        )
        codes = codes.squeeze(0).t() if across else codes.squeeze(-1)
        return codes.reshape(*y.shape[:-1], self.code_features).contiguous()

    def decode(self, codes: Tensor) -> Tensor:
        """The signals of codes (*, d): codes @ dictionary."""
        codes = check.tensor("LISTALinear.decode", "codes", codes)
        if codes.dim() < 1 or codes.shape[-1] != self.code_features:
            raise ValueError(
                f"LISTALinear.decode: codes has shape {tuple(codes.shape)}, it takes (*, {self.code_features})"
            )
        return codes @ self.dictionary

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.code_features}, iterations={self.iterations}, untied={self.untied}, "
            f"one_sided={self.one_sided}"
        )
