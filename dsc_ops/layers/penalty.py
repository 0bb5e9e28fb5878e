"""The l1 penalty on features inside a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from dsc_ops import _checks as check

_ops = torch.ops.dsc_ops


class _Features:
    """What the penalised layers returned in the last forward pass: (index of the layer, output), in order of the calls.

    It travels with the hooks when a model is copied or pickled, but empty: the outputs belong to the original's graph.
    """

    def __init__(self) -> None:
        self.outputs: list[tuple[int, Tensor]] = []

    def __reduce__(self):
        return _Features, ()


def _recomputing() -> bool:
    """Whether a backward pass runs: activation checkpointing calls layers there again, which is no new forward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _Forget:
    """Hook before the model's forward pass: what an earlier pass left is not of the last one."""

    def __init__(self, features: _Features):
        self.features = features

    def __call__(self, module: nn.Module, inputs) -> None:
        if not _recomputing():
            self.features.outputs.clear()


class _Record:
    """Hook after a penalised layer's forward pass."""

    def __init__(self, features: _Features, index: int, name: str):
        self.features, self.index, self.name = features, index, name

    def __call__(self, module: nn.Module, inputs, output) -> None:
        if not isinstance(output, Tensor) or output.dim() < 1:
            raise TypeError(
                f"SparsityPenalty: layer {self.name!r} returned {type(output).__name__}, it takes a tensor (N, *)"
            )
        if not _recomputing():
            self.features.outputs.append((self.index, output))


class SparsityPenalty:
    """gamma * sum_j w_j ||x_j||_1, mean over the batch, over the outputs x_j of named layers of a model.

    Args:
        model: the model that is called in training.
        layers: names of submodules, as in ``model.named_modules()`` (glob patterns allowed), or the modules themselves;
            one or a sequence.
        gamma: weight of the penalty in the loss.
        weights: w_j, one number for each layer found, in the order of ``layers``; None is 1 / dim(x_j), dim being the
            number of values of one sample.
        alpha: |x| > alpha counts as a non-zero in :meth:`density`.

    Calling it after a forward pass of the model returns the penalty, a 0-d tensor to be added to the loss, and forgets
    the features; a layer that is called several times in a pass counts with each of its outputs. Calling it again
    before the next forward pass raises ``RuntimeError``. The norm and the density come from one pass over each feature.
    Make it before the model is first called under ``torch.compile``; under activation checkpointing use
    ``use_reentrant=False``. Source: Li, Feng, Zhou, section 4.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> with SparsityPenalty(model, ["1"], gamma=1e-3) as penalty:
    ...     loss = model(torch.zeros(3, 4)).sum() + penalty()
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | nn.Module | Sequence[str | nn.Module],
        gamma: float,
        *,
        weights: Sequence[float] | None = None,
        alpha: float = 1e-6,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"SparsityPenalty: model must be an nn.Module, got {type(model).__name__}")
        self.gamma = check.number("SparsityPenalty", "gamma", gamma)
        self.alpha = check.number("SparsityPenalty", "alpha", alpha, least=0)
        found = _find(model, layers)
        self.names = list(found)
        if weights is not None:
            if not isinstance(weights, Sequence) or isinstance(weights, str):
                raise TypeError(
                    f"SparsityPenalty: weights must be a sequence of numbers or None, got {type(weights).__name__}"
                )
            weights = [check.number("SparsityPenalty", "weights", w) for w in weights]
            if len(weights) != len(found):
                raise ValueError(
                    f"SparsityPenalty: weights has {len(weights)} values, it takes {len(found)}, one a layer: "
                    f"{', '.join(found)}"
                )
        self.weights = weights
        self._features = _Features()
        self._counts: dict[str, tuple[list[Tensor], int]] = {}
        self._handles = [model.register_forward_pre_hook(_Forget(self._features))]
        for index, (name, module) in enumerate(found.items()):
            self._handles.append(module.register_forward_hook(_Record(self._features, index, name)))

    def __call__(self) -> Tensor:
        """The penalty of the last forward pass, a 0-d tensor; forgets the features."""
        return self.gamma * self._measure()

    def _measure(self) -> Tensor:
        """sum_j w_j ||x_j||_1 of the last forward pass; keeps the counts for density, forgets the features."""
        outputs = list(self._features.outputs)
        self._features.outputs.clear()
        if not outputs:
            raise RuntimeError(
                "SparsityPenalty: no forward pass of the model through its layers was made since the last call "
                f"(layers: {', '.join(self.names)})"
            )
        total: Tensor | None = None
        self._counts = {}
        for index, x in outputs:
            norm, count = _ops.l1_norm(x, self.alpha)
            weight = 1 / max(math.prod(x.shape[1:]), 1) if self.weights is None else self.weights[index]
            term = norm * (weight / max(x.shape[0], 1))
            total = term if total is None else total + term
            counts, size = self._counts.get(self.names[index], ([], 0))
            self._counts[self.names[index]] = ([*counts, count], size + x.numel())
        return total

    def density(self) -> dict[str, float]:
        """Fraction of |x| > alpha in each layer's output in the last forward pass, by the layer's name.

        After a forward pass whose penalty was not asked for (in evaluation, say) it reads that pass, and forgets its
        features.
        """
        if self._features.outputs:
            with torch.no_grad():
                self._measure()
        if not self._counts:
            raise RuntimeError("SparsityPenalty: no forward pass of the model was made, so there is no density")
        return {name: sum(int(c) for c in counts) / max(size, 1) for name, (counts, size) in self._counts.items()}

    def remove(self) -> None:
        """Take the hooks off the model and forget the features."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._features.outputs.clear()

    def __enter__(self) -> SparsityPenalty:
        return self

    def __exit__(self, *exception) -> None:
        self.remove()


def _find(model: nn.Module, layers: str | nn.Module | Sequence[str | nn.Module]) -> dict[str, nn.Module]:
    """The modules that `layers` names, by name, in its order, each once."""
    if isinstance(layers, str | nn.Module):
        layers = [layers]
    if not isinstance(layers, Sequence) or not layers:
        raise TypeError(f"SparsityPenalty: layers must be names or modules, at least one, got {layers!r}")
    modules = {name: module for name, module in model.named_modules() if name}
    found: dict[str, nn.Module] = {}
    for layer in layers:
        if isinstance(layer, str):
            matches = {name: module for name, module in modules.items() if fnmatchcase(name, layer)}
        elif isinstance(layer, nn.Module):
            matches = {name: module for name, module in modules.items() if module is layer}
        else:
            raise TypeError(f"SparsityPenalty: layers has a {type(layer).__name__}, it takes names or modules")
        if not matches:
            raise ValueError(
                f"SparsityPenalty: layers has {layer!r}, which is no submodule; there are: {', '.join(modules)}"
            )
        found |= {name: module for name, module in matches.items() if name not in found}
    return found
