"""Every error message: it names the function, the argument, what it got and what it takes. And operators that are
called past the functions, with arguments that do not fit together, raise and do not crash."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsc_ops import (
    ConvSoftThreshold,
    ConvSoftThreshold1d,
    LISTAConv,
    LISTAConv1d,
    LISTALinear,
    SoftThreshold,
    SparsityPenalty,
    UnitNormAtoms,
    _checks,
    functional,
)
from dsc_ops.layers import atoms as atoms_layer
from dsc_ops.layers import lista as lista_layers
from dsc_ops.layers import penalty as penalty_layer
from dsc_ops.layers import threshold as threshold_layers

# --- calls that are right, of which each case below changes one argument ----------------------------------------------

U, Y, X = torch.zeros(2, 3, 8), torch.zeros(2, 1, 8), torch.zeros(2, 3, 6)
W = torch.ones(3, 1, 3)
Y2, X2, W2 = torch.zeros(2, 4, 8, 9), torch.zeros(2, 6, 6, 7), torch.ones(6, 2, 3, 3)
SQUARE, STATISTICS, ONE = torch.ones(6, 6, 3, 3), torch.ones(5, 6).unbind(), torch.ones(())

RIGHT: dict[str, dict[str, Any]] = {
    "soft_threshold": dict(u=U, theta=torch.ones(3)),
    "shrink": dict(u=U, theta=0.1, activation="elu"),
    "hard_threshold": dict(u=U, alpha=0.1),
    "density": dict(x=U, alpha=0.1),
    "analysis": dict(y=Y, weight=W),
    "synthesis": dict(x=X, weight=W, signal_size=8),
    "conv_soft_threshold": dict(y=Y, weight=W, theta=torch.ones(3), bias=torch.ones(3)),
    "lista_step": dict(x=X, y=Y, dictionary=W, analysis=W, theta=torch.ones(3)),
    "lista": dict(y=Y, dictionary=W, analysis=W, theta=torch.ones(3), iterations=2, x0=X),
    "ista": dict(y=Y, dictionary=W, lam=0.1, iterations=2, x0=X),
    "lipschitz": dict(dictionary=W, signal_size=8),
    "lasso_objective": dict(x=X, y=Y, dictionary=W, lam=torch.ones(3)),
    "l1_penalty": dict(features=U),
}
GEOMETRY = ("stride", "padding", "dilation", "groups")
CONVOLUTIONAL = [name for name in RIGHT if "groups" in inspect.signature(getattr(functional, name)).parameters]
SIZED_BY_A_SIGNAL = [name for name in CONVOLUTIONAL if "y" in RIGHT[name]]

Case = tuple[Callable[[], object], type[Exception], str]


def call(name: str, **changes) -> Callable[[], object]:
    return lambda: getattr(functional, name)(**(RIGHT[name] | changes))


def wrong(name: str, kind: type[Exception], message: str, **changes) -> Case:
    return call(name, **changes), kind, f"{name}: {message}"


def tensors(name: str) -> dict[str, Tensor]:
    return {argument: value for argument, value in RIGHT[name].items() if isinstance(value, Tensor)}


def weight_name(name: str) -> str:
    return "dictionary" if "dictionary" in RIGHT[name] else "weight"


def tensor_cases() -> list[Case]:
    """Each tensor argument of each function: no tensor, a dtype not taken, another dtype or device than the rest."""
    cases = []
    for name in RIGHT:
        for argument, value in tensors(name).items():
            takes = "it takes float32, float64, bfloat16 or float16"
            for dtype in (torch.int64, torch.complex64, torch.bool):
                message = f"{argument} has dtype {dtype}, {takes}"
                cases.append(wrong(name, TypeError, message, **{argument: value.to(dtype)}))
            # A threshold may be a number, features a sequence.
            got = f"{argument} must be a {'number' if argument in ('theta', 'lam') else 'torch.Tensor'}, got list"
            if argument != "features":
                cases.append(wrong(name, TypeError, got, **{argument: [1.0]}))
            if name in CONVOLUTIONAL and argument != weight_name(name):
                if argument in ("theta", "lam"):
                    cases.append(wrong(name, ValueError, f"{argument} is on meta, ", **{argument: value.to("meta")}))
                    continue
                model = weight_name(name)
                message = f"{argument} has dtype torch.float64, {model} has torch.float32"
                cases.append(wrong(name, TypeError, message, **{argument: value.double()}))
                message = f"{argument} is on meta, {model} on cpu"
                cases.append(wrong(name, ValueError, message, **{argument: value.to("meta")}))
    cases.append(
        wrong("soft_threshold", ValueError, "theta is on meta, the codes on cpu", theta=torch.ones(3).to("meta"))
    )
    one_each = torch.ones(2, 3)
    cases.append(wrong("lista", ValueError, "theta is on meta, y on cpu", theta=one_each.to("meta")))
    cases.append(wrong("lista", TypeError, "theta has dtype torch.int64", theta=one_each.long()))
    cases.append(wrong("l1_penalty", TypeError, "features must be a torch.Tensor, got float", features=[U, 1.0]))
    return cases


def geometry_cases() -> list[Case]:
    """Each argument of the geometry, of each function that has it."""
    cases = []
    for name in CONVOLUTIONAL:
        for argument, least in (("stride", 1), ("padding", 0), ("dilation", 1)):

            def bad(kind, message, value, name=name, argument=argument):
                return wrong(name, kind, message, **{argument: value})

            cases += [
                bad(ValueError, f"{argument} is {least - 1}, it takes an integer of at least {least}", least - 1),
                bad(ValueError, f"{argument} is -3, it takes an integer of at least {least}", (-3,)),
                bad(ValueError, f"{argument} has 2 values, it takes one or 1", (1, 1)),
                bad(ValueError, f"{argument} has 0 values, it takes one or 1", ()),
                bad(TypeError, f"{argument} must be an integer, got float", (1.0,)),
                bad(TypeError, f"{argument} must be an integer, got bool", True),
                bad(TypeError, f"{argument} must be an integer or 1 of them, got 1.5", 1.5),
                bad(TypeError, f"{argument} must be an integer or 1 of them, got None", None),
            ]
            if argument != "padding":
                cases.append(bad(TypeError, f"{argument} must be an integer or 1 of them, got 'same'", "same"))
        weight = weight_name(name)
        cases += [
            wrong(name, ValueError, "groups is 0, it takes an integer of at least 1", groups=0),
            wrong(name, TypeError, "groups must be an integer, got float", groups=1.0),
            wrong(name, ValueError, f"groups is 2, it has to divide the 3 atoms of {weight}", groups=2),
            wrong(
                name,
                ValueError,
                "padding is 'valid', it takes \"same\", an integer or one for each axis",
                padding="valid",
            ),
            wrong(name, ValueError, 'padding="same" takes stride 1, got stride (2,)', padding="same", stride=2),
            wrong(
                name,
                ValueError,
                f'padding="same" takes odd kernels, {weight} has kernel (4,)',
                padding="same",
                **{weight: torch.ones(3, 1, 4)},
            ),
            wrong(
                name,
                ValueError,
                f"{weight} has shape (3, 3), it takes (M, C/groups, k) or (M, C/groups, kh, kw)",
                **{weight: torch.ones(3, 3)},
            ),
            wrong(
                name,
                ValueError,
                f"{weight} has shape (3, 0, 3), it takes sizes of at least 1",
                **{weight: torch.ones(3, 0, 3)},
            ),
        ]
    return cases


def shape_cases() -> list[Case]:
    cases = []
    for name in SIZED_BY_A_SIGNAL:
        weight = weight_name(name)
        fit = "does not fit into y of size"
        cases += [
            wrong(name, ValueError, "y has shape (2, 8), it takes (N, C, length)", y=torch.zeros(2, 8)),
            wrong(name, ValueError, "y has shape (2, 1, 8, 8), it takes (N, C, length)", y=torch.zeros(2, 1, 8, 8)),
            wrong(
                name, ValueError, "y has shape (), it takes (N, C, height, width)", y=torch.tensor(1.0), **{weight: W2}
            ),
            wrong(name, ValueError, f"{weight} has 1 signal channels, y has 4", y=torch.zeros(2, 4, 8)),
            wrong(
                name,
                ValueError,
                f"{weight} has 3 signal channels in 3 groups, y has 1",
                groups=3,
            ),
            wrong(
                name,
                ValueError,
                f"kernel (3,) with dilation (1,) {fit} (2,) with padding (0,)",
                y=torch.zeros(2, 1, 2),
            ),
            wrong(
                name, ValueError, f"kernel (3,) with dilation (6,) {fit} (8,) with padding (2,)", dilation=6, padding=2
            ),
            wrong(name, ValueError, f"kernel (3,) with dilation (1,) {fit} (0,)", y=torch.zeros(2, 1, 0), padding=5),
        ]
    for name in ("synthesis", "lipschitz"):
        for value, kind, message in (
            (0, ValueError, "is 0, it takes an integer of at least 1"),
            ((8, 8), ValueError, "has 2 values, it takes one or 1"),
            ("8", TypeError, "must be an integer or 1 of them, got '8'"),
            (8.0, TypeError, "must be an integer or 1 of them, got 8.0"),
        ):
            cases.append(wrong(name, kind, f"signal_size {message}", signal_size=value))
        message = "kernel (3,) with dilation (1,) does not fit into a signal of size (2,) with padding (0,)"
        cases.append(wrong(name, ValueError, message, signal_size=2))
    for name, argument in (
        ("synthesis", "x"), ("lista_step", "x"), ("lasso_objective", "x"), ("lista", "x0"), ("ista", "x0")
    ):  # fmt: skip
        for shape in ((2, 3, 5), (2, 4, 6), (2, 3), ()):
            # Synthesis takes any batch.
            message = (
                f"{argument} has shape {shape}, it takes ({shape[0] if name == 'synthesis' and shape else 2}, 3, 6)"
            )
            if name == "synthesis" and not shape:
                message = "x has shape (), it takes (0, 3, 6)"
            cases.append(wrong(name, ValueError, message, **{argument: torch.zeros(shape)}))
        if name != "synthesis":
            message = f"{argument} has shape (1, 3, 6), it takes (2, 3, 6)"
            cases.append(wrong(name, ValueError, message, **{argument: torch.zeros(1, 3, 6)}))
    # ... also for a step that was given, where no Lipschitz constant has to be found first.
    cases += [
        wrong("ista", ValueError, "dictionary has 1 signal channels, y has 2", y=torch.zeros(2, 2, 8), step=0.1),
        wrong("ista", ValueError, "x0 has shape (2, 3, 5), it takes (2, 3, 6)", x0=X[..., :5], step=0.1),
        wrong("ista", ValueError, "stride is 0, it takes an integer of at least 1", stride=0, step=0.1),
        # In two dimensions.
        wrong("analysis", ValueError, "stride has 1 values, it takes one or 2", y=Y2, weight=W2, groups=2, stride=(1,)),
        wrong(
            "analysis",
            ValueError,
            "kernel (3, 3) with dilation (1, 5) does not fit into y of size (8, 9) with padding (0, 0)",
            y=Y2,
            weight=W2,
            groups=2,
            dilation=(1, 5),
        ),
    ]
    return cases


def threshold_cases() -> list[Case]:
    cases = []
    for name in ("soft_threshold", "shrink", "conv_soft_threshold", "lista_step", "lista", "lasso_objective", "ista"):
        argument = "theta" if "theta" in RIGHT[name] else "lam"
        for shape in ((2,), (1, 3), (3, 1)) if name != "lista" else ((2,), (2, 3, 1)):
            message = f"{argument} has shape {shape}, it takes a number, a 0-d tensor or shape (3,)"
            cases.append(wrong(name, ValueError, message, **{argument: torch.ones(shape)}))
        for value, kind in (("0.1", "str"), (None, "NoneType"), (1j, "complex"), (True, "bool")):
            cases.append(wrong(name, TypeError, f"{argument} must be a number, got {kind}", **{argument: value}))
    takes = "it takes a number or a 0-d tensor"
    for name in ("soft_threshold", "shrink"):
        cases.append(wrong(name, ValueError, f"theta has shape (4,), {takes}", u=torch.zeros(4), theta=torch.ones(4)))
    for shape in ((2, 4), (2, 0)):
        message = f"theta has shape {shape}, it takes (2, 1) or (2, 3)"
        cases.append(wrong("lista", ValueError, message, theta=torch.ones(shape)))
    cases += [
        wrong("ista", ValueError, f"step has shape (1,), {takes}", step=torch.ones(1)),
        wrong("ista", TypeError, "step must be a number, got str", step="1/L"),
        wrong("ista", ValueError, "step is 0.0, it takes a number above 0", step=0),
        wrong("ista", ValueError, "step is -1.0, it takes a number above 0", step=-1.0),
        wrong("ista", ValueError, "step is nan, it takes a number above 0", step=float("nan")),
        wrong("conv_soft_threshold", ValueError, "bias has shape (2,), it takes (3,)", bias=torch.ones(2)),
        wrong("conv_soft_threshold", ValueError, "bias has shape (), it takes (3,)", bias=torch.tensor(1.0)),
    ]
    for name in ("hard_threshold", "density"):
        cases.append(wrong(name, ValueError, "alpha is -1, it takes a number of at least 0", alpha=-1))
        cases.append(wrong(name, TypeError, "alpha must be a number, got Tensor", alpha=torch.tensor(0.1)))
    names = "relu, leaky_relu, elu, silu, mish, gelu"
    for activation in ("tanh", None):
        message = f"activation is {activation!r}, it takes one of {names}"
        cases.append(wrong("shrink", ValueError, message, activation=activation))
    return cases


def iteration_cases() -> list[Case]:
    def lista(kind: type[Exception], message: str, **changes) -> Case:
        return wrong("lista", kind, message, **changes)

    cases = [
        lista(ValueError, "iterations is needed when neither analysis nor theta has one entry", iterations=None),
        lista(
            ValueError,
            "the number of iterations is not clear: analysis says 4, iterations says 2",
            analysis=torch.ones(4, 3, 1, 3),
        ),
        lista(
            ValueError,
            "the number of iterations is not clear: analysis says 4, theta says 3",
            analysis=torch.ones(4, 3, 1, 3),
            theta=torch.ones(3, 1),
            iterations=None,
        ),
        lista(
            ValueError, "the number of iterations is not clear: theta says 3, iterations says 2", theta=torch.ones(3, 3)
        ),
        lista(
            ValueError,
            "the number of iterations is 0, it takes at least 1",
            analysis=torch.ones(0, 3, 1, 3),
            iterations=None,
        ),
        lista(ValueError, "momentum is 'nesterov', it takes None, \"fista\" or 2 numbers", momentum="nesterov"),
        lista(TypeError, 'momentum is a float, it takes None, "fista" or 2 numbers', momentum=0.9),
        lista(TypeError, 'momentum is a Tensor, it takes None, "fista" or 2 numbers', momentum=torch.ones(2)),
        lista(ValueError, "momentum has 3 numbers, it takes 2, one an iteration", momentum=[0, 0.1, 0.2]),
        lista(TypeError, "momentum must be a number, got NoneType", momentum=[0, None]),
        lista(
            ValueError,
            "analysis has shape (3, 1, 4), it takes (3, 1, 3) or one such weight per iteration",
            analysis=torch.ones(3, 1, 4),
        ),
        lista(ValueError, "analysis has shape (2, 3, 1, 4), it takes (3, 1, 3)", analysis=torch.ones(2, 3, 1, 4)),
        wrong(
            "lista_step",
            ValueError,
            "analysis has shape (1, 3, 1, 3), it takes (3, 1, 3)",
            analysis=torch.ones(1, 3, 1, 3),
        ),
    ]
    for name in ("lista", "ista"):
        cases += [
            wrong(name, ValueError, "iterations is 0, it takes an integer of at least 1", iterations=0),
            wrong(name, TypeError, "iterations must be an integer, got float", iterations=2.0),
            wrong(name, TypeError, "iterations must be an integer, got bool", iterations=True),
        ]
    return cases


def l1_penalty_cases() -> list[Case]:
    def l1(kind: type[Exception], message: str, *arguments) -> Case:
        return lambda: functional.l1_penalty(*arguments), kind, f"l1_penalty: {message}"

    return [
        l1(TypeError, "features must be a tensor or a sequence of at least one, got []", []),
        l1(TypeError, "features must be a tensor or a sequence of at least one, got 3", 3),
        l1(ValueError, "features has a 0-d tensor, it takes (N, *)", [U, torch.tensor(1.0)]),
        l1(TypeError, "weights must be a sequence of numbers or a tensor, got float", U, 0.5),
        l1(ValueError, "weights has 1 values, it takes 2, one a feature", [U, U], [0.5]),
    ]


def layer_cases() -> list[Case]:
    def layer(kind: type[Exception], message: str, make: Callable[..., object], *arguments, **options) -> Case:
        return lambda: make(*arguments, **options), kind, message

    cases = []
    for make, tail in ((ConvSoftThreshold, ()), (ConvSoftThreshold1d, ()), (LISTAConv, (2,)), (LISTAConv1d, (2,))):
        name = make.__name__
        odd = "LISTAConv" in name
        cases += [
            layer(ValueError, f"{name}: in_channels is 0, it takes an integer of at least 1", make, 0, 4, 3, *tail),
            layer(TypeError, f"{name}: code_channels must be an integer, got float", make, 4, 4.0, 3, *tail),
            layer(ValueError, f"{name}: kernel_size is 0, it takes an integer of at least 1", make, 4, 4, 0, *tail),
            layer(ValueError, f"{name}: kernel_size has 3 values, it takes one or ", make, 4, 4, (3, 3, 3), *tail),
            layer(ValueError, f"{name}: groups is 3, it has to divide in_channels = 4", make, 4, 6, 3, *tail, groups=3),
            layer(
                ValueError, f"{name}: groups is 3, it has to divide code_channels = 4", make, 6, 4, 3, *tail, groups=3
            ),
            layer(
                ValueError, f"{name}: groups is 0, it takes an integer of at least 1", make, 4, 4, 3, *tail, groups=0
            ),
            layer(
                ValueError, f"{name}: stride is 0, it takes an integer of at least 1", make, 4, 4, 3, *tail, stride=0
            ),
            layer(ValueError, f"{name}: padding is 'reflect', it takes", make, 4, 4, 3, *tail, padding="reflect"),
            layer(
                ValueError,
                f'{name}: padding="same" takes odd kernels, {"dictionary" if odd else "weight"} has kernel (4',
                make,
                4,
                4,
                4,
                *tail,
                padding="same",
            ),
            layer(TypeError, f"{name}: theta must be a number, got list", make, 4, 4, 3, *tail, theta=[0.1]),
        ]
    d = torch.ones
    cases += [
        layer(ValueError, 'LISTAConv: padding="same" takes odd kernels', LISTAConv, 1, 4, 4),
        layer(ValueError, "LISTAConv: iterations is 0, it takes an integer of at least 1", LISTAConv, 1, 4, 3, 0),
        layer(
            ValueError,
            "LISTAConv.from_dictionary: dictionary has shape (3, 1, 3), it takes 4 dimensions, (M, C/groups, *kernel)",
            LISTAConv.from_dictionary,
            d(3, 1, 3),
        ),
        layer(
            ValueError, "LISTAConv1d.from_dictionary: dictionary has shape (3, 3)", LISTAConv1d.from_dictionary, d(3, 3)
        ),
        layer(TypeError, "LISTAConv1d.from_dictionary: dictionary must be a torch", LISTAConv1d.from_dictionary, [1.0]),
        layer(
            TypeError, "LISTAConv.decode: codes must be a torch.Tensor, got NoneType", LISTAConv(1, 4, 3).decode, None
        ),
        layer(
            ValueError,
            "LISTAConv.decode: codes has shape (4, 5, 5), it takes (N, 4, *code_size) with 2 spatial dimensions",
            LISTAConv(1, 4, 3).decode,
            d(4, 5, 5),
        ),
        layer(ValueError, "LISTALinear: in_features is 0, it takes", LISTALinear, 0, 4),
        layer(ValueError, "LISTALinear: code_features is 0, it takes", LISTALinear, 4, 0),
        layer(ValueError, "LISTALinear: iterations is 0, it takes", LISTALinear, 4, 4, 0),
        layer(TypeError, "LISTALinear: theta must be a number, got str", LISTALinear, 4, 4, theta="0"),
        layer(
            ValueError,
            "LISTALinear.from_dictionary: dictionary has shape (4, 3, 1), it takes (code_features, in_features)",
            LISTALinear.from_dictionary,
            d(4, 3, 1),
        ),
        layer(ValueError, "LISTALinear: y has shape (2, 5), it takes (*, 3)", LISTALinear(3, 4), d(2, 5)),
        layer(ValueError, "LISTALinear: y has shape (), it takes (*, 3)", LISTALinear(3, 4), d(())),
        layer(TypeError, "LISTALinear: y must be a torch.Tensor, got list", LISTALinear(3, 4), [1.0]),
        layer(
            ValueError, "LISTALinear.decode: codes has shape (2, 3), it takes (*, 4)", LISTALinear(3, 4).decode, d(2, 3)
        ),
        layer(ValueError, "UnitNormAtoms: weight has shape (3,), it takes (M, ...)", UnitNormAtoms(), d(3)),
        layer(
            ValueError, "UnitNormAtoms: weight has shape (2, 3), it takes (K, M", UnitNormAtoms(stacked=True), d(2, 3)
        ),
        layer(TypeError, "UnitNormAtoms: weight must be a torch.Tensor, got list", UnitNormAtoms(), [1.0]),
        layer(ValueError, "SoftThreshold: code_channels is 0, it takes", SoftThreshold, 0),
        layer(TypeError, "SoftThreshold: theta must be a number, got Tensor", SoftThreshold, 3, d(3)),
        layer(
            ValueError,
            "SoftThreshold: activation is 'tanh', it takes one of relu, leaky_relu, elu, silu, mish, gelu",
            SoftThreshold,
            3,
            activation="tanh",
        ),
        layer(
            TypeError,
            "ConvSoftThreshold.from_conv: conv must be an nn.Conv2d, got",
            ConvSoftThreshold.from_conv,
            nn.Conv1d(1, 1, 1),
        ),
        layer(
            TypeError,
            "ConvSoftThreshold1d.from_conv: conv must be an nn.Conv1d, got",
            ConvSoftThreshold1d.from_conv,
            nn.Linear(1, 1),
        ),
        layer(
            ValueError,
            "ConvSoftThreshold.from_conv: conv has padding_mode 'reflect', it takes \"zeros\"",
            ConvSoftThreshold.from_conv,
            nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"),
        ),
    ]
    return cases


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def penalty_cases() -> list[Case]:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def penalty(kind: type[Exception], message: str, *arguments, model=model, **options) -> Case:
        return lambda: SparsityPenalty(model, *arguments, **options), kind, f"SparsityPenalty: {message}"

    def returns_a_pair():
        pair = nn.Sequential(Pair())
        with SparsityPenalty(pair, "0", 1.0):
            pair(torch.zeros(1, 1))

    return [
        penalty(TypeError, "model must be an nn.Module, got list", "0", 1.0, model=[model]),
        penalty(TypeError, "gamma must be a number, got str", "1", "1e-3"),
        penalty(ValueError, "alpha is -1, it takes a number of at least 0", "1", 1.0, alpha=-1),
        penalty(ValueError, "layers has 'relu', which is no submodule; there are: 0, 1, 2", "relu", 1.0),
        penalty(ValueError, "layers has '9*', which is no submodule; there are: 0, 1, 2", ["1", "9*"], 1.0),
        penalty(ValueError, "layers has Tanh(), which is no submodule; there are: 0, 1, 2", nn.Tanh(), 1.0),
        penalty(TypeError, "layers must be names or modules, at least one, got []", [], 1.0),
        penalty(TypeError, "layers must be names or modules, at least one, got 1", 1, 1.0),
        penalty(TypeError, "layers has a int, it takes names or modules", [1], 1.0),
        penalty(ValueError, "weights has 1 values, it takes 2, one a layer: 1, 0", ["1", "0"], 1.0, weights=[1.0]),
        penalty(TypeError, "weights must be a number, got str", "1", 1.0, weights=["1"]),
        penalty(TypeError, "weights must be a sequence of numbers or None, got float", "1", 1.0, weights=0.5),
        (
            lambda: SparsityPenalty(model, ["1", "0"], 1.0)(),
            RuntimeError,
            "SparsityPenalty: no forward pass of the model through its layers was made since the last call "
            "(layers: 1, 0)",
        ),
        (
            lambda: SparsityPenalty(model, "1", 1.0).density(),
            RuntimeError,
            "SparsityPenalty: no forward pass of the model was made, so there is no density",
        ),
        (returns_a_pair, TypeError, "SparsityPenalty: layer '0' returned tuple, it takes a tensor (N, *)"),
    ]


CASES = [
    *tensor_cases(),
    *geometry_cases(),
    *shape_cases(),
    *threshold_cases(),
    *iteration_cases(),
    *l1_penalty_cases(),
    *layer_cases(),
    *penalty_cases(),
]


def raised(function: Callable[[], object], kind: type[Exception]) -> Exception:
    with pytest.raises(kind) as caught:
        function()
    return caught.value


@pytest.mark.supports(
    "faults", "wrong arguments: a TypeError or ValueError with the argument, what it got, what it takes"
)
@pytest.mark.parametrize(("function", "kind", "message"), CASES, ids=[message for _, _, message in CASES])
def test_message(function, kind, message):
    error = raised(function, kind)
    assert type(error) is kind and str(error).startswith(message)


@pytest.mark.parametrize("name", RIGHT)
def test_calls_that_the_cases_start_from_are_right(name):
    call(name)()


# --- no message without a case ----------------------------------------------------------------------------------------


def raise_statements(module: ModuleType) -> set[tuple[str, int]]:
    """(file, line) of each `raise` of an exception with a message."""
    file = inspect.getsourcefile(module)
    nodes = ast.walk(ast.parse(Path(file).read_text()))
    return {(file, node.lineno) for node in nodes if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)}


def test_every_message_of_the_package_has_a_case():
    reached = set()
    for function, kind, _ in CASES:
        trace = raised(function, kind).__traceback__
        while trace.tb_next:
            trace = trace.tb_next
        reached.add((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
    modules = (_checks, functional, atoms_layer, lista_layers, penalty_layer, threshold_layers)
    statements = set().union(*[raise_statements(module) for module in modules])
    assert statements and statements <= reached, sorted(statements - reached)


# --- the operators on their own ---------------------------------------------------------------------------------------

# In a process of its own, which a crash would end. Each call is right but for one argument: it raises RuntimeError, or
# what it returns has the shapes that its fake kernel tells, which is for changes that make another right call.
DIRECT_CALLS = """
import torch
import dsc_ops

ops, randn = torch.ops.dsc_ops, torch.randn
y, w, x = randn(2, 2, 6), randn(3, 2, 3), randn(2, 3, 6)
y2, w2, x2 = randn(2, 4, 6, 5), randn(6, 2, 3, 3), randn(2, 6, 6, 5)
g, g2 = ([1], [1], [1], 1), ([1, 1], [1, 1], [1, 1], 2)
theta, analysis, one_each = randn(3), randn(2, 3, 2, 3), randn(2, 3)
block = randn(2, 16, 3, 5), *randn(2, 16, 16, 3, 3).unbind(), theta.sum(), *randn(4, 16).unbind()
rest = (True, 1e-5, 1e-5, True)
tape = ops.lista(y, w, analysis, one_each, x, [0.0, 0.5], *g, False, True)[1]
CALLS = [
    ("soft_threshold", x, theta, theta, x, False),
    ("soft_threshold", x2, theta.sum(), None, None, True),
    ("soft_threshold_backward", x, x, theta, False),
    ("shrink", x, theta, "elu", False),
    ("shrink_backward", x, x, theta, "elu", False),
    ("l1_norm", x, 1e-6),
    ("l1_norm_backward", theta.sum(), x),
    ("use_large_pages", y),
    ("dilated_convolution_", x2, y2, randn(6, 4, 3, 3), 2, False, None),
    ("dilated_convolution_", y2, x2, randn(6, 4, 3, 3), 1, True, randn(2, 4, 6, 5)),
    ("dilated_correlation", y2, x2, 2),
    ("norm_relu_", x2, theta.sum(), *randn(5, 6).unbind(), True, 1e-5),
    ("unfold_norm_relu_", x2, x2, y2, theta.sum(), *randn(5, 6).unbind(), True, 1e-5, x2, True),
    ("norm_relu_backward_", x2, x2, *randn(5, 6).unbind(), True, theta.sum(), 4, y2, randn(2, 6, 6, 5), True),
    ("res_csc", *block, *randn(4, 16).exp().unbind(), *rest),
    ("res_csc_backward", block[0], *ops.res_csc(*block, *randn(4, 16).exp().unbind(), *rest)[1:], *block, *rest),
    ("analysis", y, w, *g),
    ("analysis", y2, w2, *g2),
    ("synthesis", x, w, [6], *g),
    ("synthesis", x2, w2, [6, 5], *g2),
    ("correlation", y, x, [3], *g),
    ("correlation", y2, x2, [3, 3], *g2),
    ("conv_soft_threshold", y, w, theta, theta, *g, False),
    ("conv_soft_threshold_backward", x, x, y, w, theta, *g, False, [True] * 4),
    ("lista", y, w, analysis, one_each, x, [0.0, 0.5], *g, False, True),
    ("lista", y, w, analysis, one_each, None, [], *g, False, False),
    ("lista_backward", x, tape, y, w, analysis, one_each, x, [0.0, 0.5], *g, False, [True] * 5),
]
HUGE = (2**31, 2**40, 2**62, 2**63 - 1, -(2**63))


def changes(value):
    if isinstance(value, torch.Tensor):
        yield from (value.double(), value.half(), value.long(), value.bool(), value.cfloat())
        yield from (value.unsqueeze(0), value.flatten(), value.sum(), value.new_empty(0))
        for axis in range(value.dim()):
            yield from (value.select(axis, 0), torch.cat([value, value], axis))
            yield from (value.narrow(axis, 0, 0), value.narrow(axis, 0, value.shape[axis] - 1))
    elif isinstance(value, list):
        yield from ([], value + value)
        if value and type(value[0]) is int:
            for n in (0, -1, 7, *HUGE):
                yield from ([n] * len(value), [n] + value[1:])
    elif type(value) is int:
        yield from (0, -1, 5, *HUGE)
    elif type(value) is str:
        yield from ("", "tanh")
    elif value is None:
        yield from (randn(5), randn(()), randn(2, 3, 7))


def shapes(results):
    return [t.shape for t in (results if isinstance(results, tuple) else (results,)) if t is not None]


refused = fine = 0
for name, *arguments in CALLS:
    op = getattr(ops, name)
    op(*arguments)
    for position, value in enumerate(arguments):
        for changed in changes(value):
            call = [*arguments[:position], changed, *arguments[position + 1 :]]
            print(name, position, getattr(changed, "shape", changed), getattr(changed, "dtype", ""), flush=True)
            try:
                got = shapes(op(*call))
            except RuntimeError:
                refused += 1
                continue
            told = shapes(op(*[a.to("meta") if isinstance(a, torch.Tensor) else a for a in call]))
            assert got == told, (got, told)
            fine += 1
assert refused > 800 and fine > 100, (refused, fine)
print("done")
"""


@pytest.mark.supports(
    "fuzzing", "operators called past the functions, with arguments that do not fit, raise and do not crash"
)
def test_operators_called_past_the_functions_do_not_crash():
    command = [sys.executable, "-X", "faulthandler", "-c", DIRECT_CALLS]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    last = run.stdout.strip().splitlines()[-1:]
    assert run.returncode == 0 and last == ["done"], f"{last}\n{run.stderr[-2000:]}"


@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [
        ("analysis", (Y, W.double(), [1], [0], [1], 1), "weight .*dtype"),
        ("analysis", (Y.long(), W.long(), [1], [0], [1], 1), "takes float32, float64, bfloat16 or float16"),
        ("analysis", (Y, W2, [1, 1], [0, 0], [1, 1], 1), "signal and weight"),
        ("analysis", (Y, W, [1, 1], [0], [1], 1), "stride"),
        ("analysis", (Y, W, [1], [0], [1], 3), "channels, atoms and groups"),
        ("analysis", (Y, W, [1], [0], [9], 1), "kernel"),
        ("synthesis", (X[..., 1:], W, [8], [1], [0], [1], 1), "the code"),
        ("soft_threshold", (U, torch.ones(4), None, None, False), "theta"),
        ("soft_threshold", (U, torch.ones(3), torch.ones(4), None, False), "bias"),
        ("shrink", (U, torch.ones(3), "tanh", False), "activation .*tanh"),
        ("dilated_convolution_", (X2, Y, W, 1, False, None), r"x must be \(N, C, H, W\)"),
        ("dilated_convolution_", (X2, X2, SQUARE, 0, False, None), "dilation"),
        ("dilated_convolution_", (X2, X2, SQUARE[1:], 1, False, None), "weight"),
        ("dilated_convolution_", (X2.mT, X2.mT, SQUARE, 1, False, None), "out .*planes"),
        ("dilated_correlation", (X2, X2[1:], 1), "z has the wrong shape"),
        ("res_csc", (X2, SQUARE, SQUARE, ONE, *torch.ones(8, 2).unbind(), True, 0.1, 0.1, True), "a multiple of 16"),
        ("norm_relu_", (X2, ONE, *torch.ones(5, 2).unbind(), True, 0.1), "for each channel"),
        ("norm_relu_backward_", (X2[1:], X2, *STATISTICS, True, ONE, 0, None, None, False), "grad"),
        ("norm_relu_backward_", (X2, X2, *STATISTICS, True, ONE, 99, None, None, False), "fewer channels"),
    ],
)
def test_operators_called_past_the_functions_say_why_not(name, arguments, named):
    with pytest.raises(RuntimeError, match=f"dsc_ops: .*{named}"):
        getattr(torch.ops.dsc_ops, name)(*arguments)
