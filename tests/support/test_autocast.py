"""Autocast, gradient scaling, and dtypes that do not fit together: as nn.Conv2d has it."""

from __future__ import annotations

import itertools

import network
import pytest
import torch
from network import Network, images
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dsc_ops import ConvSoftThreshold, LISTAConv, LISTALinear, SparsityPenalty, functional

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)


def outcome(layer: nn.Module, y: torch.Tensor) -> torch.dtype | str:
    """The dtype of what a layer returns, or that it raises."""
    try:
        return layer(y).dtype
    except (TypeError, RuntimeError):
        return "raises"


@pytest.mark.supports(
    "precision", "autocast on CPU: in and out the dtypes of `nn.Conv2d`, whatever inputs and parameters have"
)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", DTYPES[:4])
def test_dtypes_go_in_and_out_as_with_a_convolution(parameters, autocast):
    """Inputs of every dtype on parameters of every dtype: the same are refused, the others give the same dtype."""
    conv = nn.Conv2d(2, 3, 3, dtype=parameters)
    for layer in (ConvSoftThreshold(2, 3, 3, dtype=parameters), LISTAConv(2, 3, 3, dtype=parameters)):
        for dtype in DTYPES:
            y = images().to(dtype)
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                assert outcome(layer, y) == outcome(conv, y), f"input {dtype}"


@pytest.mark.supports(
    "precision", "parameters and inputs of two dtypes are refused as by `nn.Conv2d`, both dtypes named"
)
@pytest.mark.parametrize("name", ["weight", "bias", "theta"])
def test_one_parameter_of_another_dtype(name):
    """... is refused, but for a threshold: it follows the codes, as a number would."""
    layer, conv = ConvSoftThreshold(2, 3, 3), nn.Conv2d(2, 3, 3)
    for module in (layer, conv):
        if hasattr(module, name):
            setattr(module, name, nn.Parameter(getattr(module, name).detach().double()))
    assert outcome(layer, images()) == (torch.float32 if name == "theta" else outcome(conv, images()))
    if name == "weight":
        with pytest.raises(TypeError, match=r"y has dtype torch\.float32, weight has torch\.float64"):
            layer(images())


def test_every_layer_names_the_two_dtypes():
    for layer, y in (
        (LISTAConv(2, 3, 3), images()),
        (LISTALinear(7, 3), images()),
        (ConvSoftThreshold(2, 3, 3), images()),
    ):
        with pytest.raises(TypeError, match=r"y has dtype torch\.float64, \w+ has torch\.float32"):
            layer(y.double())


@pytest.mark.supports("precision", "training under autocast: float32 gradients near those without it, penalty included")
@pytest.mark.parametrize("cache", [True, False])
def test_training_under_autocast(cache):
    model, y = Network(), images()
    penalty = SparsityPenalty(model, network.PENALISED, 0.3)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled, cache_enabled=cache):
            out = model(y)
            loss = out.float().square().mean() + penalty()
        assert out.dtype == (torch.bfloat16 if enabled else torch.float32) and loss.dtype == torch.float32
        results.append(network.gradients(model, loss))
    for name, exact in results[0].items():
        got = results[1][name]
        assert got.dtype == torch.float32
        assert (got - exact).norm() <= 0.1 * exact.norm() + 1e-3, name


def test_a_region_without_autocast_inside_one_with_it():
    layer, y = LISTAConv(2, 3, 3), images()
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(y)
        with torch.autocast("cpu", enabled=False):
            full = layer(y)
    assert low.dtype == torch.bfloat16 and full.dtype == torch.float32
    assert torch.equal(full, layer(y))


@pytest.mark.supports(
    "precision", "autocast on CUDA: the same rules, followed on tensors without values (no GPU needed)"
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_rules_of_cuda(dtype):
    """The casts come before any kernel, so a tensor that only claims to be on a GPU shows them."""
    with FakeTensorMode():
        y, weight = torch.empty(2, 3, 8, 8, device="cuda"), torch.empty(4, 3, 3, 3, device="cuda")
        theta = torch.empty(4, device="cuda")
        calls = {
            "analysis": lambda: functional.analysis(y, weight),
            "synthesis": lambda: functional.synthesis(torch.empty(2, 4, 6, 6, device="cuda"), weight, 8),
            "conv_soft_threshold": lambda: functional.conv_soft_threshold(y, weight, theta, theta),
            "lista": lambda: functional.lista(y, weight, weight, theta, iterations=2),
            "mixed": lambda: functional.lista(y.to(dtype), weight, weight, theta, iterations=2),
            "conv2d": lambda: nn.functional.conv2d(y, weight),
        }
        before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        try:
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", dtype)
            assert {name: call().dtype for name, call in calls.items()} == dict.fromkeys(calls, dtype)
            assert functional.soft_threshold(y, 0.1).dtype == torch.float32  # keeps what it is given
            assert functional.l1_penalty(y.to(dtype)).dtype == torch.float32
            assert functional.analysis(y.double(), weight.double()).dtype == torch.float64
        finally:
            torch.set_autocast_enabled("cuda", before[0])
            torch.set_autocast_dtype("cuda", before[1])
        assert functional.analysis(y, weight).dtype == torch.float32


@pytest.mark.supports(
    "precision", "`torch.amp.GradScaler`: the gradients of unscaled training; a step with an overflow is left out"
)
def test_gradient_scaling():
    model, y = Network(), images()
    penalty = SparsityPenalty(model, network.PENALISED, 0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)

    def loss(y):
        with torch.autocast("cpu", torch.float16):
            return model(y).float().square().mean() + penalty()

    expected = network.gradients(model, loss(y))
    scaler.scale(loss(y)).backward()
    scaler.unscale_(optimizer)
    for name, parameter in model.named_parameters():
        # Small gradients that float16 would lose are kept by the scale; the large ones agree.
        assert (parameter.grad - expected[name]).norm() <= 0.05 * expected[name].norm() + 1e-4, name
    before = [p.detach().clone() for p in model.parameters()]
    scaler.step(optimizer)
    scaler.update()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    optimizer.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    y[0, 0, 0, 0] = 1e30  # infinite in float16
    scaler.scale(loss(y)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**11
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_half_models_train_without_autocast():
    for dtype, make in itertools.product((torch.bfloat16, torch.float16), (lambda: LISTAConv(2, 3, 3, theta=0.01),)):
        layer = make().to(dtype)
        layer(images().to(dtype)).sum().backward()
        assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in layer.parameters())
