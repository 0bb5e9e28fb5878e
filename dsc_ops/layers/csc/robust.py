"""Robust inference with CSC layers: lam follows the noise, which the residual tells (SDNet, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module

import numpy as np
import torch
from torch import Tensor, nn

from dsc_ops import _checks as check
from dsc_ops.layers.csc.convolutional import CSCConv


@dataclass(frozen=True)
class LambdaRelation:
    """lam = slope * residual + intercept within [least, most], and what it was fitted to, one entry for each level."""

    slope: float
    intercept: float
    least: float
    most: float
    levels: tuple[float, ...]
    residuals: tuple[float, ...]
    best: tuple[float, ...]
    accuracies: tuple[tuple[float, ...], ...]

    def __call__(self, residual: float) -> float:
        """The lam for data of this mean residual."""
        return min(max(self.slope * residual + self.intercept, self.least), self.most)


def fit_lambda(
    model: nn.Module,
    clean_loader: Iterable,
    corruption: Callable[[Tensor, float], Tensor],
    levels: Sequence[float],
    lambdas: Sequence[float],
) -> LambdaRelation:
    """The linear relation of the best lam to the mean residual ||y - S_D x||_2, from corrupted training data alone.

    Args:
        model: a classifier, (N, C, H, W) to logits, with at least one :class:`CSCConv`.
        clean_loader: batches (images, labels) of training data, the same in each pass.
        corruption: (images, level) to corrupted images; seeded by the caller.
        levels: strengths of the corruption, at least two.
        lambdas: values of lam to try.

    Returns:
        A :class:`LambdaRelation`; called with a residual it gives a lam between the least and the largest of
        ``lambdas``. Residuals are those of the model's first CSCConv with the lam that it has; the accuracy at each
        level is that with each of ``lambdas`` in all CSCConv layers, and the first best counts.

    The model runs in evaluation mode, without gradients, and is left with its mode and lam. A progress bar is shown
    where tqdm is installed. Raises ``ValueError`` for a model without CSCConv, fewer than two levels, no lambdas, an
    empty loader, or residuals that are equal at all levels. Source: Dai et al. (NeurIPS 2022), Algorithm 1.

    >>> model = nn.Sequential(CSCConv(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    >>> loader = [(torch.rand(8, 1, 6, 6), torch.arange(8) % 2)]
    >>> relation = fit_lambda(model, loader, lambda y, level: y + level * torch.randn_like(y), [0.1, 1], [0.1, 0.5])
    >>> with adapted_lambda(model, loader, relation) as lam:
    ...     logits = model(loader[0][0])
    >>> 0.1 <= lam <= 0.5
    True
    """
    layers = _csc_layers("fit_lambda", model)
    levels = [check.number("fit_lambda", "levels", level) for level in levels]
    lambdas = [check.number("fit_lambda", "lambdas", lam) for lam in lambdas]
    if len(levels) < 2 or not lambdas:
        raise ValueError(f"fit_lambda: levels has {len(levels)}, lambdas {len(lambdas)}; it takes at least 2 and 1")
    residuals, accuracies = [], []
    with _progress(len(levels) * (1 + len(lambdas))) as advance, _evaluating(model), torch.no_grad():
        for level in levels:
            residuals.append(_mean_residual("fit_lambda", model, layers[0], clean_loader, corruption, level))
            advance()
            row = []
            for lam in lambdas:
                with _with_lam(layers, lam):
                    row.append(_accuracy(model, clean_loader, corruption, level))
                advance()
            accuracies.append(tuple(row))
    if np.ptp(residuals) == 0:
        raise ValueError(f"fit_lambda: the residual is {residuals[0]} at all levels: {levels}")
    best = [lambdas[int(np.argmax(row))] for row in accuracies]
    slope, intercept = np.polyfit(residuals, best, 1)
    return LambdaRelation(
        float(slope),
        float(intercept),
        min(lambdas),
        max(lambdas),
        tuple(levels),
        tuple(residuals),
        tuple(best),
        tuple(accuracies),
    )


@contextmanager
def adapted_lambda(model: nn.Module, loader: Iterable, relation: Callable[[float], float]) -> Iterator[float]:
    """Within it, all CSCConv layers of a model have the lam that the relation gives for the residual of a test set.

    Args:
        model: as in :func:`fit_lambda`.
        loader: batches of images, or (images, ...); labels are not read.
        relation: a :class:`LambdaRelation`, or any function of the mean residual.

    Gives lam, and puts the values back that the layers had. Example: :func:`fit_lambda`.
    """
    layers = _csc_layers("adapted_lambda", model)
    with _evaluating(model), torch.no_grad():
        residual = _mean_residual("adapted_lambda", model, layers[0], loader)
    lam = float(relation(residual))
    with _with_lam(layers, lam):
        yield lam


def _csc_layers(name: str, model: nn.Module) -> list[CSCConv]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be an nn.Module, got {type(model).__name__}")
    layers = [module for module in model.modules() if isinstance(module, CSCConv)]
    if not layers:
        raise ValueError(f"{name}: model has no CSCConv, whose lam could be set")
    return layers


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _with_lam(layers: list[CSCConv], lam: float) -> Iterator[None]:
    before = [layer.lam.detach().clone() for layer in layers]
    for layer in layers:
        layer.lam = lam
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.lam = value


def _mean_residual(name: str, model: nn.Module, layer: CSCConv, loader: Iterable, corruption=None, level=None) -> float:
    """Over all samples, of the layer as it stands in the model."""
    total, count = 0.0, 0

    def add(module: CSCConv, inputs: tuple[Tensor], codes: Tensor) -> None:
        nonlocal total, count
        total, count = total + float(module.residual(inputs[0], codes).sum()), count + len(codes)

    handle = layer.register_forward_hook(add)
    try:
        for batch in loader:
            images = _to_model(model, batch if isinstance(batch, Tensor) else batch[0])
            model(images if corruption is None else corruption(images, level))
    finally:
        handle.remove()
    if not count:
        raise ValueError(f"{name}: loader has no images that reach the first CSCConv")
    return total / count


def _accuracy(model: nn.Module, loader: Iterable, corruption, level: float) -> float:
    right = count = 0
    for images, labels in loader:
        guesses = model(corruption(_to_model(model, images), level)).argmax(1)
        right, count = right + int((guesses == labels.to(guesses.device)).sum()), count + len(labels)
    return right / count


def _to_model(model: nn.Module, images: Tensor) -> Tensor:
    return images.to(next(model.parameters()).device)


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[], object]]:
    """A progress bar where tqdm is there; gives what moves it on."""
    try:
        bar = import_module("tqdm").tqdm(total=steps, desc="fit_lambda", delay=1, leave=False)
    except ImportError:
        yield lambda: None
        return
    with bar:
        yield bar.update
