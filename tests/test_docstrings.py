"""Examples in docstrings run and print what they say; names and arguments are those that were promised."""

from __future__ import annotations

import doctest
import inspect

import pytest
import torch

import dsc_ops
from dsc_ops import functional, layers, reference
from dsc_ops.layers import atoms, csc, lista, penalty, threshold
from dsc_ops.layers.csc import conversion, convolutional, dilated, multilayer, residual, robust

MODULES = (
    functional, atoms, lista, penalty, threshold, conversion, convolutional, dilated, multilayer, residual, robust
)  # fmt: skip

FUNCTIONS = [
    "soft_threshold(u, theta, *, one_sided=False)",
    "shrink(u, theta, *, activation='relu', one_sided=False)",
    "hard_threshold(u, alpha=1e-06)",
    "density(x, alpha=1e-06)",
    "analysis(y, weight, *, stride=1, padding=0, dilation=1, groups=1)",
    "synthesis(x, weight, signal_size, *, stride=1, padding=0, dilation=1, groups=1)",
    "conv_soft_threshold(y, weight, theta, bias=None, *, stride=1, padding=0, dilation=1, groups=1, one_sided=False)",
    "lista_step(x, y, dictionary, analysis, theta, *, stride=1, padding=0, dilation=1, groups=1, one_sided=False)",
    "lista(y, dictionary, analysis, theta, *, iterations=None, x0=None, momentum=None, stride=1, padding=0, "
    "dilation=1, groups=1, one_sided=False)",
    "ista(y, dictionary, lam, *, iterations, step=None, x0=None, fast=False, stride=1, padding=0, dilation=1, "
    "groups=1, one_sided=False)",
    "lipschitz(dictionary, signal_size, *, stride=1, padding=0, dilation=1, groups=1)",
    "lasso_objective(x, y, dictionary, lam, *, stride=1, padding=0, dilation=1, groups=1)",
    "l1_penalty(features, weights=None)",
]
CONV_SOFT_THRESHOLD = (
    "(in_channels, code_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True, *, theta=0.1, "
    "one_sided=False)"
)
LISTA_CONV = (
    "(in_channels, code_channels, kernel_size, iterations=3, *, stride=1, padding=None, dilation=1, groups=1, "
    "theta=0.1, untied=True, one_sided=False)"
)
LAYERS = [
    "SoftThreshold(code_channels, theta=0.1, *, one_sided=False, activation='relu')",
    f"ConvSoftThreshold{CONV_SOFT_THRESHOLD}",
    f"ConvSoftThreshold1d{CONV_SOFT_THRESHOLD}",
    f"LISTAConv{LISTA_CONV}",
    f"LISTAConv1d{LISTA_CONV}",
    "LISTALinear(in_features, code_features, iterations=3, *, theta=0.1, untied=True, one_sided=False)",
    "SparsityPenalty(model, layers, gamma, *, weights=None, alpha=1e-06)",
]
CSC = [
    "CSCConv(in_channels, code_channels, kernel_size, iterations=2, *, stride=1, padding=None, lam=0.1, "
    "solver='fista', one_sided=True, learn_threshold=False)",
    "MLCSC(layers, method='ml-ista', unfoldings=0, *, one_sided=True, learn_threshold=True)",
    "ResCSCBlock(in_channels, code_channels, stride=1, *, kind='res-csc', scale=-0.1, iterations=1, solver='ista', "
    "one_sided=True, learn_threshold=True)",
    "MSDCSCBlock(width, dilations, unfoldings=0, solver='ista', *, in_channels=None, one_sided=True, "
    "learn_threshold=True, eps=1e-05, momentum=0.1)",
    "convert(model, pattern='*')",
    "fit_lambda(model, clean_loader, corruption, levels, lambdas)",
    "adapted_lambda(model, loader, relation)",
]
METHODS = [
    (layers.LISTAConv, "forward(self, y)"),
    (layers.LISTAConv, "decode(self, codes, signal_size=None)"),
    (layers.LISTAConv1d, "decode(self, codes, signal_size=None)"),
    (layers.LISTALinear, "decode(self, codes)"),
    (layers.ConvSoftThreshold, "from_conv(conv, theta=0.0, *, one_sided=False)"),
    (csc.CSCConv, "decode(self, codes, signal_size=None)"),
    (csc.CSCConv, "residual(self, y, codes)"),
    (csc.CSCConv, "objective(self, y, codes)"),
    (csc.MLCSC, "codes(self, y)"),
    (layers.SparsityPenalty, "density(self)"),
    (layers.SparsityPenalty, "remove(self)"),
]


def written(name: str, function, without: tuple[str, ...] = ()) -> str:
    """A signature with its kinds and defaults, without annotations."""
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for n, p in signature.parameters.items() if n not in without]
    return name + str(signature.replace(parameters=parameters, return_annotation=signature.empty))


def name_of(signature: str) -> str:
    return signature.partition("(")[0]


def public_functions(module) -> set[str]:
    return {
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }


# --- examples ---------------------------------------------------------------------------------------------------------


def examples() -> dict[str, doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=False)
    found = {}
    for module in MODULES:
        for test in finder.find(module, extraglobs=dict(torch=torch)):
            found[test.name] = test
    return found


EXAMPLES = examples()


@pytest.mark.parametrize("name", [name for name, test in EXAMPLES.items() if test.examples])
def test_example(name):
    said = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.DocTestRunner(optionflags=flags).run(EXAMPLES[name], out=said.append, clear_globs=False)
    assert result.attempted and not result.failed, "".join(said)


# These are results, or stand in the example of what they belong to.
WITHOUT_EXAMPLES = {"Conversion", "LambdaRelation", "adapted_lambda"}


@pytest.mark.parametrize("name", functional.__all__ + layers.__all__ + sorted(set(csc.__all__) - WITHOUT_EXAMPLES))
def test_each_public_name_has_an_example(name):
    value = next(getattr(room, name) for room in (functional, layers, csc) if hasattr(room, name))
    test = EXAMPLES[f"{value.__module__}.{name}"]
    assert any(name in example.source for example in test.examples), f"{name} has no example that calls it"


# --- names and arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [functional, reference])
@pytest.mark.parametrize("signature", FUNCTIONS, ids=name_of)
def test_signatures_of_functions(signature, module):
    name = name_of(signature)
    assert written(name, getattr(module, name)) == signature


@pytest.mark.parametrize("signature", LAYERS, ids=name_of)
def test_signatures_of_layers(signature):
    """device and dtype besides, as PyTorch's layers have them."""
    name = name_of(signature)
    layer = getattr(dsc_ops, name)
    assert written(name, layer, without=("device", "dtype")) == signature
    if issubclass(layer, torch.nn.Module):
        extra = [inspect.signature(layer).parameters[n] for n in ("device", "dtype")]
        assert all(p.kind is p.KEYWORD_ONLY and p.default is None for p in extra)


@pytest.mark.parametrize("signature", CSC, ids=name_of)
def test_signatures_of_the_csc_family(signature):
    name = name_of(signature)
    assert written(name, getattr(csc, name), without=("device", "dtype")) == signature


@pytest.mark.parametrize(("layer", "signature"), METHODS, ids=lambda value: getattr(value, "__name__", value))
def test_signatures_of_methods(layer, signature):
    name = name_of(signature)
    assert written(name, getattr(layer, name)) == signature


def test_public_names_are_the_promised_ones():
    names = [name_of(signature) for signature in FUNCTIONS]
    assert sorted(names) == functional.__all__
    assert public_functions(functional) == set(names)
    assert public_functions(reference) >= set(names)
    names = {name_of(signature) for signature in LAYERS}
    assert set(layers.__all__) >= names
    assert set(dsc_ops.__all__) >= names | {"functional", "layers", "reference"}
    for name in dsc_ops.__all__:
        assert hasattr(dsc_ops, name)


def test_functions_are_annotated():
    """py.typed is a promise."""
    for name in functional.__all__:
        signature = inspect.signature(getattr(functional, name))
        assert signature.return_annotation is not signature.empty, name
        assert all(p.annotation is not p.empty for p in signature.parameters.values()), name
