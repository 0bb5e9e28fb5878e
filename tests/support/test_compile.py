"""torch.compile, torch.export, activation checkpointing and torch.func on networks with these layers."""

from __future__ import annotations

import subprocess
import sys
import warnings

import network
import pytest
import torch
import torch._dynamo.testing
from network import Network, assert_same, gradients, images
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dsc_ops import ConvSoftThreshold, LISTAConv, LISTALinear, SoftThreshold, SparsityPenalty, functional, reference


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- torch.compile ----------------------------------------------------------------------------------------------------

SIZES = [(4, 6, 7), (2, 9, 8), (5, 8, 12), (3, 16, 5), (7, 5, 5), (4, 6, 7)]


@pytest.mark.supports("compile and transform", "`torch.compile(fullgraph=True)`: training, any batch and image size")
def test_training_compiles_once_for_all_sizes():
    """The penalty is a part of it: nothing in a step breaks the graph or makes another one."""
    model = Network()
    penalty = SparsityPenalty(model, network.PENALISED, 0.3)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(y):
        return model(y).square().mean() + penalty()

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for size in SIZES:
        y = images(*size)
        got = gradients(model, compiled(y))
        assert_same(got, gradients(model, loss(y)))
    assert counter.frame_count == 2  # the first sizes, and any


@pytest.mark.supports("compile and transform", "inference, and no recompilation when training and evaluation alternate")
def test_training_and_evaluation_have_one_graph_each():
    model = Network()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for _ in range(3):
        for size in SIZES[:3]:
            y = images(*size)
            compiled.train()
            torch.testing.assert_close(compiled(y), model(y))
            compiled.eval()
            with torch.no_grad():
                torch.testing.assert_close(compiled(y), model(y))
    assert counter.frame_count <= 4  # training or not, with gradients or without


@pytest.mark.supports("compile and transform", "Inductor, the default backend: training and inference")
def test_inductor():
    layer = LISTAConv(2, 4, 3, 2, theta=0.02)
    step = torch.compile(lambda y: layer(y).square().mean(), fullgraph=True, dynamic=True)
    codes = torch.compile(layer, fullgraph=True, dynamic=True)
    for size in ((2, 6, 7), (3, 8, 5)):
        y = images(*size)
        try:
            got = gradients(layer, step(y))
        except Exception as error:
            if "compiler" in str(error).lower() and "not found" in str(error).lower():
                pytest.skip(f"Inductor has no C++ compiler here: {error}")
            raise
        assert_same(got, gradients(layer, layer(y).square().mean()))
        with torch.no_grad():
            torch.testing.assert_close(codes(y), layer(y))


# --- torch.export -----------------------------------------------------------------------------------------------------

LOADED = """
import sys, torch, dsc_ops
program = torch.export.load(sys.argv[1]).module()
for y, expected in torch.load(sys.argv[2], weights_only=True):
    torch.testing.assert_close(program(y), expected)
print("equal")
"""


@pytest.mark.supports(
    "compile and transform", "`torch.export`, saved, loaded in a fresh process, any batch and image size"
)
def test_an_exported_network_runs_in_another_process(tmp_path):
    model, size = Network().eval(), torch.export.Dim
    shapes = ({0: size("batch"), 2: size("height", min=3), 3: size("width", min=3)},)
    program = torch.export.export(model, (images(),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "network.pt2")
    pairs = [(y, model(y).detach()) for y in (images(1, 9, 5), images(6, 4, 16))]
    torch.save(pairs, tmp_path / "pairs.pt")
    command = [sys.executable, "-c", LOADED, tmp_path / "network.pt2", tmp_path / "pairs.pt"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.stdout.strip() == "equal", run.stderr[-3000:]


# --- activation checkpointing -----------------------------------------------------------------------------------------


@pytest.mark.supports("compile and transform", "`torch.utils.checkpoint`, reentrant and not")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(use_reentrant):
    model, y = Network(), images().requires_grad_()
    model(y).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()} | dict(y=y.grad.clone())
    model.zero_grad()
    y.grad = None
    checkpoint(model, y, use_reentrant=use_reentrant).square().sum().backward()
    assert_same({name: p.grad for name, p in model.named_parameters()} | dict(y=y.grad), expected)


# --- torch.func -------------------------------------------------------------------------------------------------------

DOUBLE = dict(dtype=torch.float64)


def problem() -> dict:
    """Signals with an axis to map over, weights and thresholds."""
    weight = torch.randn(4, 3, 3, 3, **DOUBLE) / 5
    return dict(
        y=torch.randn(5, 2, 3, 8, 7, **DOUBLE),
        x=torch.randn(5, 2, 4, 8, 7, **DOUBLE),
        w=weight,
        t=torch.rand(4, **DOUBLE) / 9,
        ws=torch.randn(5, 4, 3, 3, 3, **DOUBLE) / 5,
    )


# Name: (what is computed of a module of functions, the mapped arguments).
MAPPED = {
    "soft_threshold": (lambda m, p, y: m.soft_threshold(y, 0.1), "y"),
    "soft_threshold of vectors": (lambda m, p, y: m.soft_threshold(y[0, 0, 0], 0.1), "y"),
    "soft_threshold of numbers": (lambda m, p, y: m.soft_threshold(y[0, 0, 0, 0], 0.1), "y"),
    "soft_threshold, a theta each": (lambda m, p, w: m.soft_threshold(p["x"][0], w[:, 0, 0, 0].abs()), "ws"),
    "shrink": (lambda m, p, y: m.shrink(y, 0.1, activation="mish"), "y"),
    "analysis": (lambda m, p, y: m.analysis(y, p["w"]), "y"),
    "synthesis": (lambda m, p, x: m.synthesis(x, p["w"], (8, 7), padding=1), "x"),
    "conv_soft_threshold": (lambda m, p, y: m.conv_soft_threshold(y, p["w"], p["t"], p["t"], stride=2), "y"),
    "lista": (lambda m, p, y: m.lista(y, p["w"], p["w"] / 2, p["t"], iterations=3, padding=1), "y"),
    "lista from a start": (
        lambda m, p, y, x: m.lista(y, p["w"], p["w"], p["t"], iterations=2, padding=1, x0=x),
        "y x",
    ),
    "lista, one signal": (
        lambda m, p, x: m.lista(p["y"][0], p["w"], p["w"], p["t"], iterations=2, padding=1, x0=x),
        "x",
    ),
    "lista, a dictionary each": (
        lambda m, p, y, w: m.lista(y, w, w / 2, p["t"], iterations=2, padding=1),
        "y ws",
    ),
    "ista": (lambda m, p, y: m.ista(y, p["w"], 0.1, iterations=3, step=0.1, fast=True), "y"),
    "lasso_objective": (lambda m, p, y, x: m.lasso_objective(x, y, p["w"], 0.1, padding=1), "y x"),
    "l1_penalty": (lambda m, p, x: m.l1_penalty(x), "x"),
    "density": (lambda m, p, x: m.density(x, 0.5), "x"),
    "empty batches": (lambda m, p, y: m.conv_soft_threshold(y[:0], p["w"], p["t"]), "y"),
}


@pytest.mark.supports(
    "compile and transform", "`torch.func.vmap` over the batch (one call) or over weights (a call each)"
)
@pytest.mark.parametrize(("function", "names"), MAPPED.values(), ids=MAPPED.keys())
def test_vmap(function, names):
    given = problem()
    arguments = [given[name] for name in names.split()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch warns of operators without a batching rule
        ours = vmap(lambda *a: function(functional, given, *a))(*arguments)
    one_by_one = [function(reference, given, *a) for a in zip(*arguments, strict=True)]
    torch.testing.assert_close(ours, torch.stack(one_by_one))
    elsewhere = vmap(lambda *a: function(functional, given, *a), in_dims=-1)(*[a.movedim(0, -1) for a in arguments])
    torch.testing.assert_close(elsewhere, ours)


class Calls(TorchDispatchMode):
    """Counts the operators of this library that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "dsc_ops":
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_vmap_over_the_batch_is_one_call():
    given, layer = problem(), LISTAConv(3, 4, 3, theta=0.02, **DOUBLE)
    with Calls() as calls:
        codes = vmap(layer)(given["y"])
    assert calls.names == ["lista"]
    torch.testing.assert_close(codes, layer(given["y"].flatten(0, 1)).unflatten(0, (5, 2)))


def per_sample(module, given):
    def loss(w, t, y):
        codes = module.lista(y[None], w, w / 2, t, iterations=3, padding=1, x0=given["x"][:1, 0])
        return codes.square().sum() + module.l1_penalty(module.conv_soft_threshold(y[None], w, t, t))

    return vmap(grad(loss, argnums=(0, 1, 2)), (None, None, 0))(given["w"], given["t"], given["y"][:, 0])


def jacobians(module, given):
    y = given["y"][0, :1, :, :3, :3]
    return (
        jacrev(lambda y: module.lista(y, given["w"], given["w"], given["t"], iterations=2, padding=1))(y),
        jacrev(lambda y: module.shrink(y, 0.1, activation="silu"))(y[0, 0]),
        jacrev(lambda w: module.conv_soft_threshold(y, w, 0.01))(given["w"]),
    )


def second_order(module, given):
    """... of what has it."""

    def slope(y):
        return grad(lambda y: module.analysis(y, given["w"]).square().sum())(y)

    return grad(lambda y: module.l1_penalty(slope(y)))(given["y"][0])


@pytest.mark.supports(
    "compile and transform", "`torch.func.grad`, `vjp`, `jacrev`, per-sample gradients by `vmap(grad)`"
)
@pytest.mark.parametrize("transformed", [per_sample, jacobians, second_order])
def test_gradients_of_torch_func(transformed):
    given = problem()
    torch.testing.assert_close(transformed(functional, given), transformed(reference, given))


def test_gradients_through_vmap():
    """Those of parameters that the mapped function closes over."""
    given = problem()
    layer = LISTAConv(3, 4, 3, theta=0.02, **DOUBLE)
    expected = gradients(layer, layer(given["y"].flatten(0, 1)).square().sum())
    assert_same(gradients(layer, vmap(layer)(given["y"]).square().sum()), expected)
    compiled = torch.compile(vmap(layer), backend="aot_eager", fullgraph=True)
    assert_same(gradients(layer, compiled(given["y"]).square().sum()), expected)


LAYERS = {
    "SoftThreshold": (lambda: SoftThreshold(2, 0.1), "soft_threshold"),
    "SoftThreshold-elu": (lambda: SoftThreshold(2, 0.1, activation="elu"), "shrink"),
    "ConvSoftThreshold": (lambda: ConvSoftThreshold(2, 3, 3), "conv_soft_threshold"),
    "LISTAConv": (lambda: LISTAConv(2, 3, 3), "lista"),
    "LISTALinear": (lambda: LISTALinear(7, 4), "lista"),
}


@pytest.mark.supports("compile and transform", "forward mode (`jvp`, `forward_ad`) is refused by name")
@pytest.mark.parametrize(("make", "operator"), LAYERS.values(), ids=LAYERS.keys())
def test_forward_mode_is_refused_and_not_dropped(make, operator):
    layer, y = make(), images()
    message = f"the forward-mode derivative of {operator} is not supported"
    for frozen in (False, True):  # a tangent is lost most easily where nothing else needs a gradient
        layer.requires_grad_(not frozen)
        with pytest.raises(RuntimeError, match=message):
            jvp(layer, (y,), (torch.ones_like(y),))
        with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
            layer(torch.autograd.forward_ad.make_dual(y, torch.ones_like(y)))
    with torch.autograd.forward_ad.dual_level():
        layer(y)  # no tangent, nothing to refuse


def test_forward_over_reverse_is_refused_too():
    y = torch.randn(4, **DOUBLE)
    with pytest.raises(RuntimeError, match="forward-mode derivative of soft_threshold is not supported"):
        hessian(lambda y: functional.soft_threshold(y, 0.1).square().sum())(y)
    with pytest.raises(RuntimeError, match="forward-mode derivative of analysis is not supported"):
        jvp(lambda y: functional.analysis(y, torch.ones(1, 1, 2, **DOUBLE)), (y[None, None],), (y[None, None],))
    with pytest.raises(RuntimeError, match="second derivative of soft_threshold is not supported"):
        grad(lambda y: grad(lambda y: functional.soft_threshold(y, 0.1).square().sum())(y).sum())(y)


@pytest.mark.parametrize("make", [lambda: ConvSoftThreshold(2, 3, 3), lambda: LISTAConv(2, 3, 3, theta=0.01)])
def test_without_gradients_nothing_else_changes(make):
    """Calls then go past the rule for autograd, on which forward mode, torch.func and torch.compile depend."""
    layer, y = make(), images()
    expected = layer(y).detach()
    slopes = gradients(layer, layer(y).sum())
    with torch.no_grad():
        assert torch.equal(layer(y), expected)
        assert not layer(y).requires_grad
        torch.testing.assert_close(vmap(layer)(y[:, None])[:, 0], expected)
        torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(y), expected)
        torch.testing.assert_close(torch.fx.experimental.proxy_tensor.make_fx(layer)(y)(y), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(y).dtype == torch.bfloat16
        got = grad(lambda p: functional_call(layer, p, (y,)).sum())(dict(layer.named_parameters()))
        assert_same(got, slopes)
        with pytest.raises(RuntimeError, match="forward-mode derivative of .* is not supported"):
            jvp(layer, (y,), (torch.ones_like(y),))
        with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode derivative of"):
            layer(torch.autograd.forward_ad.make_dual(y, torch.ones_like(y)))
    with torch.inference_mode():
        assert torch.equal(layer(y), expected)


@pytest.mark.supports("compile and transform", "`torch.func.functional_call`, parametrized weights included")
def test_functional_call():
    model, y = Network(), images()
    nn.utils.parametrizations.weight_norm(model.codes, "dictionary")
    parameters = {name: (p + 0.1).detach().requires_grad_() for name, p in model.named_parameters()}
    got = functional_call(model, parameters, (y,))
    slopes = dict(zip(parameters, torch.autograd.grad(got.sum(), list(parameters.values())), strict=True))
    model.load_state_dict(parameters)
    torch.testing.assert_close(got, model(y))
    assert_same(slopes, gradients(model, model(y).sum()))


def test_a_torch_without_its_private_names_still_has_gradients():
    """What torch.func needs of them is gone then, and nothing else."""
    code = """
import torch
import torch._functorch.utils as private
name = "enable_single_level_autograd_function"
kept = private.__dict__.pop(name)
import dsc_ops
setattr(private, name, kept)
layer, y = dsc_ops.LISTAConv(1, 3, 3, 2), torch.randn(2, 1, 6, 6, requires_grad=True)
layer(y).sum().backward()
assert y.grad.any() and all(p.grad is not None for p in layer.parameters())
u = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
assert torch.autograd.gradcheck(lambda u: dsc_ops.functional.soft_threshold(u, 0.1), (u,))
print("trained")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "trained\n", result.stderr
