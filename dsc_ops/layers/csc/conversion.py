"""Convolutions of existing models as sparse coding layers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils import parametrize

from dsc_ops.layers.threshold import ConvSoftThreshold, ConvSoftThreshold1d

LAYERS = {nn.Conv1d: ConvSoftThreshold1d, nn.Conv2d: ConvSoftThreshold}


@dataclass
class Conversion:
    """What :func:`convert` did: names of the layers that it made, and of the convolutions it left, with the reason."""

    converted: list[str]
    left: dict[str, str]


def convert(model: nn.Module, pattern: str = "*") -> Conversion:
    """Turns convolution + ReLU pairs of a model, in place, into one-sided ConvSoftThreshold with identical outputs.

    Args:
        model: any module. A pair is an nn.Conv2d or nn.Conv1d and the nn.ReLU that follows it in an nn.Sequential.
        pattern: glob pattern for the names of the convolutions, as in ``model.named_modules()``.

    Returns:
        A :class:`Conversion`. Of the convolutions whose name matches, ``converted`` names those that became a layer and
        ``left`` the others, with the reason: elsewhere than in an nn.Sequential nobody can tell what follows.

    The layer has the convolution's name, weight, bias, training mode and ``requires_grad``, and theta = 0; the ReLU
    becomes nn.Identity, so that names stay. ``MLCSC`` takes such layers. Raises ``TypeError`` for something that is no
    module. Equivalent to ``relu(conv(y)) = T+(conv(y))`` with theta = 0.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> convert(model)
    Conversion(converted=['0'], left={'2': 'no nn.ReLU follows it in an nn.Sequential'})
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be an nn.Module, got {type(model).__name__}")
    result = Conversion([], {})
    # nn.Module's own lists leave out what they have named before.
    uses = Counter(id(held) for m in model.modules() for held in (*m._modules.values(), *m._parameters.values()))
    for path, parent in list(model.named_modules()):
        children = list(parent._modules.items())
        for number, (name, conv) in enumerate(children):
            full = f"{path}.{name}" if path else name
            if not isinstance(conv, tuple(LAYERS)) or not fnmatchcase(full, pattern):
                continue
            after = children[number + 1][0] if number + 1 < len(children) else ""
            reason = _obstacle(parent, conv, after, uses)
            if reason:
                result.left[full] = reason
                continue
            layer = LAYERS[type(conv)].from_conv(conv, one_sided=True)
            layer.weight.requires_grad_(conv.weight.requires_grad)
            if conv.bias is not None:
                layer.bias.requires_grad_(conv.bias.requires_grad)
            parent._modules[name], parent._modules[after] = layer, nn.Identity()
            result.converted.append(full)
    return result


def _obstacle(parent: nn.Module, conv: nn.Module, after: str, uses: Counter) -> str:
    """Why a convolution stays; empty when it does not."""
    if type(parent) is not nn.Sequential or type(parent._modules.get(after)) is not nn.ReLU:
        return "no nn.ReLU follows it in an nn.Sequential"
    if parametrize.is_parametrized(conv) or conv._forward_hooks or conv._forward_pre_hooks:
        return "it has parametrizations or hooks"
    if type(conv) not in LAYERS:
        return f"it is a {type(conv).__name__}, which may compute something else"
    if conv.padding_mode != "zeros":
        return f"its padding_mode is {conv.padding_mode!r}"
    if isinstance(conv.padding, str) and conv.padding == "same" and any(k % 2 == 0 for k in conv.kernel_size):
        return 'padding="same" with an even kernel pads one side more than the other'
    if uses[id(conv)] > 1 or uses[id(conv.weight)] > 1:
        return "it, or its weight, is used in several places"
    return ""
