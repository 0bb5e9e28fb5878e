"""Fused sparse coding operators with gradients.

Conventions (all functions): a signal y is (N, C, *size), a code x is (N, M, *code_size), with one or two spatial axes;
a dictionary or an analysis weight is (M, C/groups, *kernel), the shape of a :class:`torch.nn.Conv2d` weight from signal
to code. ``stride``, ``padding`` (also ``"same"``, for odd kernels and stride 1), ``dilation`` and ``groups`` mean what
they mean in :func:`torch.nn.functional.conv2d`. A threshold ``theta`` is a number, a 0-d tensor or one value per atom,
(M,); it is taken in the dtype of the codes, and theta >= 0 is meant: a negative one is computed by the same formula,
which is then no longer a proximal operator.

Any strides and memory formats, float32, float64, bfloat16 and float16 (computed in float32), empty batches. NaN and
infinity give what the formulas give; for gradients a NaN code is a non-zero. Every tensor argument has a gradient; a
second derivative exists for ``analysis``, ``synthesis`` and ``l1_penalty`` and is refused by name elsewhere (but see
:func:`lipschitz`), as is forward mode everywhere. Wrong arguments raise ``TypeError`` (type, dtype) or
``ValueError`` (anything else), naming the argument, what it got and what it takes.

:mod:`dsc_ops.reference` has the same functions in plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dsc_ops import _calls as calls
from dsc_ops import _checks as check
from dsc_ops import reference

__all__ = [
    "analysis",
    "conv_soft_threshold",
    "density",
    "hard_threshold",
    "ista",
    "l1_penalty",
    "lasso_objective",
    "lipschitz",
    "lista",
    "lista_step",
    "shrink",
    "soft_threshold",
    "synthesis",
]

_ops = torch.ops.dsc_ops

Size = int | Sequence[int]
Padding = int | Sequence[int] | str


def _channels(u: Tensor) -> int | None:
    return u.shape[1] if u.dim() >= 2 else None


def soft_threshold(u: Tensor, theta: float | Tensor, *, one_sided: bool = False) -> Tensor:
    """Soft threshold: T(u) = sign(u) max(|u| - theta, 0), or T+(u) = max(u - theta, 0) when ``one_sided``.

    Args:
        u: any shape; (N, M, *) when theta is (M,).
        theta: number, 0-d or (M,).
        one_sided: keep only what lies above theta.

    Returns:
        Codes of u's shape. At |u| = theta the code is 0 and the subgradient is taken as 0.

    Equivalent to ``torch.sign(u) * torch.relu(u.abs() - theta)``. Source: proximal operator of theta ||.||_1.

    >>> soft_threshold(torch.tensor([-2.0, 0.5, 2.0]), 1.0)
    tensor([-1., 0., 1.])
    """
    u = check.tensor("soft_threshold", "u", u)
    theta = check.threshold("soft_threshold", "theta", theta, u, _channels(u))
    return _ops.soft_threshold(u, theta, None, None, bool(one_sided))


def shrink(u: Tensor, theta: float | Tensor, *, activation: str = "relu", one_sided: bool = False) -> Tensor:
    """Generalised soft threshold: T_rho(u) = rho(u - theta) - rho(-u - theta), or rho(u - theta) when ``one_sided``.

    Args:
        u: any shape; (N, M, *) when theta is (M,).
        theta: number, 0-d or (M,).
        activation: rho, one of relu (then T_rho is the soft threshold), leaky_relu, elu, silu, mish, gelu, each with
            PyTorch's default parameters.
        one_sided: the first term alone.

    Equivalent to ``rho(u - theta) - rho(-u - theta)``. Source: Li, Feng, Zhou, section 5.4.

    >>> shrink(torch.tensor([-2.0, 0.5, 2.0]), 1.0, activation="relu")
    tensor([-1., 0., 1.])
    """
    u = check.tensor("shrink", "u", u)
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"shrink: activation is {activation!r}, it takes one of {', '.join(reference.ACTIVATIONS)}")
    theta = check.threshold("shrink", "theta", theta, u, _channels(u))
    return _ops.shrink(u, theta, activation, bool(one_sided))


def hard_threshold(u: Tensor, alpha: float = 1e-6) -> Tensor:
    """Hard threshold: H(u) = u where |u| > alpha, else 0.

    >>> hard_threshold(torch.tensor([1e-7, -1.0]))
    tensor([ 0., -1.])
    """
    u = check.tensor("hard_threshold", "u", u)
    return reference.hard_threshold(u, check.number("hard_threshold", "alpha", alpha, least=0))


def density(x: Tensor, alpha: float = 1e-6) -> Tensor:
    """Fraction of the entries with |x| > alpha, as a 0-d tensor (0 for an empty x). One pass, no gradient.

    >>> density(torch.tensor([0.0, 1.0, -2.0, 0.0]))
    tensor(0.5000)
    """
    x = check.tensor("density", "x", x)
    count = _ops.l1_norm(x.detach(), check.number("density", "alpha", alpha, least=0))[1]
    return count / max(x.numel(), 1)


def analysis(
    y: Tensor, weight: Tensor, *, stride: Size = 1, padding: Padding = 0, dilation: Size = 1, groups: int = 1
) -> Tensor:
    """Analysis A_W(y), signal to code: the correlation of y with every atom.

    Args:
        y: signal (N, C, *size).
        weight: (M, C/groups, *kernel).

    Returns:
        (N, M, *code_size). Equivalent to ``F.conv2d(y, weight, None, stride, padding, dilation, groups)``.

    >>> analysis(torch.ones(1, 1, 3), torch.ones(1, 1, 3), padding=1)
    tensor([[[2., 3., 2.]]])
    """
    name = "analysis"
    weight = check.weight(name, "weight", weight)
    conv = check.geometry(name, "weight", weight, stride, padding, dilation, groups)
    y = check.signal(name, "y", y, "weight", weight, groups)
    check.code_size(name, "y", y.shape[2:], weight, conv)
    return _ops.analysis(y, weight, *conv.arguments())


def synthesis(
    x: Tensor,
    weight: Tensor,
    signal_size: Size,
    *,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """Synthesis S_W(x), code to signal: the sum of the atoms weighted by the code, the adjoint of :func:`analysis`.

    Args:
        x: code (N, M, *code_size).
        weight: (M, C/groups, *kernel).
        signal_size: spatial size of the signal, as analysis would have to be given it to return x's size.

    Returns:
        (N, C, *signal_size). Equivalent to ``torch.nn.functional.conv_transpose2d`` with the output_padding that leads
        to signal_size. Costs as much as x has non-zeros.

    >>> synthesis(torch.tensor([[[0.0, 2.0, 0.0]]]), torch.tensor([[[1.0, 3.0, 1.0]]]), 3, padding=1)
    tensor([[[2., 6., 2.]]])
    """
    name = "synthesis"
    weight = check.weight(name, "weight", weight)
    conv = check.geometry(name, "weight", weight, stride, padding, dilation, groups)
    size = check.integers(name, "signal_size", signal_size, weight.dim() - 2, least=1)
    x = check.code(name, "x", x, "weight", weight, None, check.code_size(name, "a signal", size, weight, conv))
    return _ops.synthesis(x, weight, size, *conv.arguments())


def conv_soft_threshold(
    y: Tensor,
    weight: Tensor,
    theta: float | Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    one_sided: bool = False,
) -> Tensor:
    """Convolution and soft threshold in one pass: T(A_W(y) + bias).

    Args:
        y: signal (N, C, *size).
        weight: (M, C/groups, *kernel).
        theta: number, 0-d or (M,).
        bias: (M,) or None.

    Returns:
        Codes (N, M, *code_size). Equivalent to ``soft_threshold(conv2d(y, weight, bias, ...), theta)``.

    >>> conv_soft_threshold(torch.ones(1, 1, 3), torch.ones(1, 1, 3), 2.5, padding=1)
    tensor([[[0.0000, 0.5000, 0.0000]]])
    """
    name = "conv_soft_threshold"
    weight = check.weight(name, "weight", weight)
    conv = check.geometry(name, "weight", weight, stride, padding, dilation, groups)
    y = check.signal(name, "y", y, "weight", weight, groups)
    check.code_size(name, "y", y.shape[2:], weight, conv)
    theta = check.threshold(name, "theta", theta, y, weight.shape[0])
    if bias is not None:
        bias = check.like(name, "bias", bias, "weight", weight)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}: bias has shape {tuple(bias.shape)}, it takes ({weight.shape[0]},)")
    return calls.conv_soft_threshold(y, weight, bias, theta, conv, one_sided)


def lista_step(
    x: Tensor,
    y: Tensor,
    dictionary: Tensor,
    analysis: Tensor,
    theta: float | Tensor,
    *,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    one_sided: bool = False,
) -> Tensor:
    """One LISTA-CP step: T(x + A_W(y - S_D x)).

    Args:
        x: code (N, M, *code_size).
        y: signal (N, C, *size).
        dictionary: D, (M, C/groups, *kernel).
        analysis: W, of the dictionary's shape.
        theta: number, 0-d or (M,).

    Returns:
        The next code, of x's shape. Equivalent to
        ``soft_threshold(x + conv2d(y - conv_transpose2d(x, dictionary), analysis), theta)``.
        Source: Chen, Liu, Wang, Yin (NeurIPS 2018); Li, Feng, Zhou, eq. 6.

    >>> one = torch.ones(1, 1, 1)
    >>> lista_step(torch.zeros(1, 1, 2), torch.tensor([[[3.0, 0.5]]]), one, one, 1.0)
    tensor([[[2., 0.]]])
    """
    x = check.tensor("lista_step", "x", x)
    return _lista(
        "lista_step", "x", y, dictionary, analysis, theta, 1, x, None, stride, padding, dilation, groups, one_sided
    )


def lista(
    y: Tensor,
    dictionary: Tensor,
    analysis: Tensor,
    theta: float | Tensor,
    *,
    iterations: int | None = None,
    x0: Tensor | None = None,
    momentum: str | Sequence[float] | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    one_sided: bool = False,
) -> Tensor:
    """K LISTA-CP steps: x_{k+1} = T_k(z_k + A_{W_k}(y - S_D z_k)), z_k = x_k + momentum_k (x_k - x_{k-1}).

    Args:
        y: signal (N, C, *size).
        dictionary: D, (M, C/groups, *kernel).
        analysis: W, of the dictionary's shape, shared by all iterations, or (K, *dictionary shape).
        theta: number, 0-d, (M,), or one for each iteration, (K, 1) or (K, M).
        iterations: K; needed only when neither analysis nor theta tells it.
        x0: first code, (N, M, *code_size); None is zero, and saves the first synthesis.
        momentum: None (z = x), "fista" (the weights of Beck and Teboulle), or K numbers, momentum[k] for iteration k
            counted from 0; x_{-1} is x_0, so momentum[0] has no effect.

    Returns:
        x_K, (N, M, *code_size). Equivalent to K times :func:`lista_step`. Source: Chen, Liu, Wang, Yin (NeurIPS 2018).

    >>> one = torch.ones(1, 1, 1)
    >>> lista(torch.tensor([[[3.0, 0.5]]]), one, 0.5 * one, 0.5, iterations=20)
    tensor([[[2.0000, 0.0000]]])
    """
    return _lista(
        "lista",
        "x0",
        y,
        dictionary,
        analysis,
        theta,
        iterations,
        x0,
        momentum,
        stride,
        padding,
        dilation,
        groups,
        one_sided,
    )


def _iterations(name: str, dictionary: Tensor, analysis: Tensor, theta: float | Tensor, iterations: int | None) -> int:
    """K, told by analysis, theta and iterations, which have to agree."""
    told = {}
    if analysis.dim() == dictionary.dim() + 1:
        told["analysis"] = analysis.shape[0]
    if isinstance(theta, Tensor) and theta.dim() == 2:
        told["theta"] = theta.shape[0]
    if iterations is not None:
        told["iterations"] = check.integer(name, "iterations", iterations, least=1)
    if not told:
        raise ValueError(f"{name}: iterations is needed when neither analysis nor theta has one entry per iteration")
    if len(set(told.values())) > 1:
        counts = ", ".join(f"{source} says {count}" for source, count in told.items())
        raise ValueError(f"{name}: the number of iterations is not clear: {counts}")
    count = next(iter(told.values()))
    if count < 1:
        raise ValueError(f"{name}: the number of iterations is {count}, it takes at least 1")
    return count


def _momentum(name: str, momentum: str | Sequence[float] | None, iterations: int) -> list[float]:
    if isinstance(momentum, str) and momentum != "fista":
        raise ValueError(f'{name}: momentum is {momentum!r}, it takes None, "fista" or {iterations} numbers')
    if momentum is not None and not isinstance(momentum, str):
        if isinstance(momentum, Tensor) or not isinstance(momentum, Sequence):
            raise TypeError(
                f'{name}: momentum is a {type(momentum).__name__}, it takes None, "fista" or {iterations} numbers'
            )
        if len(momentum) != iterations:
            raise ValueError(f"{name}: momentum has {len(momentum)} numbers, it takes {iterations}, one an iteration")
        momentum = [check.number(name, "momentum", weight) for weight in momentum]
    return reference.momentum_weights(momentum, iterations)


def _lista(
    name: str,
    x0_name: str,
    y: Tensor,
    dictionary: Tensor,
    analysis: Tensor,
    theta: float | Tensor,
    iterations: int | None,
    x0: Tensor | None,
    momentum: str | Sequence[float] | None,
    stride: Size,
    padding: Padding,
    dilation: Size,
    groups: int,
    one_sided: bool,
) -> Tensor:
    dictionary = check.weight(name, "dictionary", dictionary)
    conv = check.geometry(name, "dictionary", dictionary, stride, padding, dilation, groups)
    y = check.signal(name, "y", y, "dictionary", dictionary, groups)
    size = check.code_size(name, "y", y.shape[2:], dictionary, conv)
    analysis = check.like(name, "analysis", analysis, "dictionary", dictionary)
    if analysis.shape != dictionary.shape and (name == "lista_step" or analysis.shape[1:] != dictionary.shape):
        one_each = "" if name == "lista_step" else " or one such weight per iteration"
        raise ValueError(
            f"{name}: analysis has shape {tuple(analysis.shape)}, it takes {tuple(dictionary.shape)}{one_each}"
        )
    if x0 is not None:
        x0 = check.code(name, x0_name, x0, "dictionary", dictionary, y.shape[0], size)
    atoms = dictionary.shape[0]
    if name == "lista":
        iterations = _iterations(name, dictionary, analysis, theta, iterations)
    if name == "lista" and isinstance(theta, Tensor) and theta.dim() == 2:
        theta = check.tensor(name, "theta", theta)
        if theta.shape[1] not in (1, atoms):
            raise ValueError(
                f"{name}: theta has shape {tuple(theta.shape)}, it takes ({iterations}, 1) or ({iterations}, {atoms})"
            )
        if theta.device != y.device:
            raise ValueError(f"{name}: theta is on {theta.device}, y on {y.device}")
    else:
        theta = check.threshold(name, "theta", theta, y, atoms)
    weights = _momentum(name, momentum, iterations)
    return calls.lista(y, dictionary, analysis, theta, x0, weights, iterations, conv, one_sided)


def ista(
    y: Tensor,
    dictionary: Tensor,
    lam: float | Tensor,
    *,
    iterations: int,
    step: float | Tensor | None = None,
    x0: Tensor | None = None,
    fast: bool = False,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    one_sided: bool = False,
) -> Tensor:
    """ISTA, or FISTA when ``fast``, for min_x 1/2 ||y - S_D x||^2 + lam ||x||_1 (x >= 0 when ``one_sided``).

    It is :func:`lista` with W = step D and theta = step lam; ISTA's objective never rises.

    Args:
        y: signal (N, C, *size).
        dictionary: D, (M, C/groups, *kernel).
        lam: weight of the l1 norm: number, 0-d or (M,).
        iterations: K.
        step: number or 0-d tensor; None is 1 / :func:`lipschitz` (1 for a dictionary of zeros).
        x0: first code; None is zero.
        fast: with the momentum of FISTA.

    Returns:
        x_K, (N, M, *code_size). Source: Beck, Teboulle (SIAM J. Imaging Sciences, 2009).

    >>> one = torch.ones(1, 1, 1)
    >>> ista(torch.tensor([[[3.0, 0.5]]]), one, 1.0, iterations=1, step=1.0)
    tensor([[[2., 0.]]])
    """
    name = "ista"
    dictionary = check.weight(name, "dictionary", dictionary)
    iterations = check.integer(name, "iterations", iterations, least=1)
    geometry = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    conv = check.geometry(name, "dictionary", dictionary, stride, padding, dilation, groups)
    y = check.signal(name, "y", y, "dictionary", dictionary, groups)
    size = check.code_size(name, "y", y.shape[2:], dictionary, conv)
    if x0 is not None:
        x0 = check.code(name, "x0", x0, "dictionary", dictionary, y.shape[0], size)
    if step is None:
        step = reference.longest_step(reference.lipschitz(dictionary, y.shape[2:], **geometry))
    elif isinstance(step, Tensor):
        step = check.threshold(name, "step", step, dictionary, None)
    else:
        step = check.number(name, "step", step)
        if not step > 0:
            raise ValueError(f"{name}: step is {step}, it takes a number above 0")
    if isinstance(lam, Tensor):
        lam = check.threshold(name, "lam", lam, dictionary, dictionary.shape[0])
    else:
        lam = check.number(name, "lam", lam)
    return lista(
        y,
        dictionary,
        dictionary * step,
        lam * step,
        iterations=iterations,
        x0=x0,
        momentum="fista" if fast else None,
        **geometry,
        one_sided=one_sided,
    )


def lipschitz(
    dictionary: Tensor,
    signal_size: Size,
    *,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """Largest eigenvalue of A_D S_D on signals of one size: the constant L of the gradient of 1/2 ||y - S_D x||^2.

    Args:
        dictionary: D, (M, C/groups, *kernel).
        signal_size: spatial size of the signal.

    Returns:
        0-d tensor, differentiable. The eigenvector comes from power iteration in its Krylov space (Lanczos, 40 steps
        with reorthogonalisation, a fixed start), the value and its gradient from the Rayleigh quotient there. Its
        second derivative leaves out how the eigenvector changes: do not use it.

    >>> lipschitz(torch.full((1, 1, 1), 3.0), 1)
    tensor(9.)
    """
    name = "lipschitz"
    dictionary = check.weight(name, "dictionary", dictionary)
    conv = check.geometry(name, "dictionary", dictionary, stride, padding, dilation, groups)
    size = check.integers(name, "signal_size", signal_size, dictionary.dim() - 2, least=1)
    check.code_size(name, "a signal", size, dictionary, conv)
    return reference.lipschitz(dictionary, size, stride=stride, padding=padding, dilation=dilation, groups=groups)


def lasso_objective(
    x: Tensor,
    y: Tensor,
    dictionary: Tensor,
    lam: float | Tensor,
    *,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """The lasso's objective of each sample: 1/2 ||y - S_D x||^2 + lam ||x||_1.

    Args:
        x: code (N, M, *code_size).
        y: signal (N, C, *size).
        dictionary: D, (M, C/groups, *kernel).
        lam: number, 0-d or (M,).

    Returns:
        (N,)

    >>> one = torch.ones(1, 1, 1)
    >>> lasso_objective(torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[3.0, 0.5]]]), one, 1.0)
    tensor([2.6250])
    """
    name = "lasso_objective"
    dictionary = check.weight(name, "dictionary", dictionary)
    conv = check.geometry(name, "dictionary", dictionary, stride, padding, dilation, groups)
    y = check.signal(name, "y", y, "dictionary", dictionary, groups)
    size = check.code_size(name, "y", y.shape[2:], dictionary, conv)
    x = check.code(name, "x", x, "dictionary", dictionary, y.shape[0], size)
    lam = check.threshold(name, "lam", lam, x, dictionary.shape[0])
    residual = y - _ops.synthesis(x, dictionary, y.shape[2:], *conv.arguments())
    return residual.square().flatten(1).sum(1) / 2 + (reference.per_channel(lam, x) * x.abs()).flatten(1).sum(1)


def l1_penalty(features: Tensor | Sequence[Tensor], weights: Tensor | Sequence[float] | None = None) -> Tensor:
    """Mean over the batch of sum_j w_j ||x_j||_1; each norm and its gradient is one pass over memory.

    Args:
        features: x_j, one tensor (N, *) or a sequence of them.
        weights: w_j, one number a feature (a tensor has a gradient too); None is 1 / dim(x_j), dim being the number of
            values of one sample.

    Returns:
        0-d tensor, float32 (float64 for float64 features), 0 for an empty batch.
        Equivalent to ``sum(w * x.abs().flatten(1).sum(1).mean() for w, x in zip(weights, features))``.
        Source: Li, Feng, Zhou, section 4.

    >>> l1_penalty(torch.tensor([[1.0, -3.0], [0.0, 0.0]]))
    tensor(1.)
    """
    name = "l1_penalty"
    if isinstance(features, Tensor):
        features = [features]
    if not isinstance(features, Sequence) or not len(features):
        raise TypeError(f"{name}: features must be a tensor or a sequence of at least one, got {features!r}")
    for x in features:
        if check.tensor(name, "features", x).dim() < 1:
            raise ValueError(f"{name}: features has a 0-d tensor, it takes (N, *)")
    if weights is None:
        weights = [1 / max(math.prod(x.shape[1:]), 1) for x in features]
    elif not isinstance(weights, Tensor | Sequence):
        raise TypeError(f"{name}: weights must be a sequence of numbers or a tensor, got {type(weights).__name__}")
    if len(weights) != len(features):
        raise ValueError(f"{name}: weights has {len(weights)} values, it takes {len(features)}, one a feature")
    norms = [_ops.l1_norm(x, 0.0)[0] / max(x.shape[0], 1) for x in features]
    return sum(w * norm for w, norm in zip(weights, norms, strict=True))
