"""Memory: nothing leaks, the peak is what is promised; inputs of any strides; changes of what backward has saved."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import network
import pytest
import torch
from network import Network, gradients, images
from torch import Tensor, nn

from dsc_ops import ConvSoftThreshold, LISTAConv, LISTALinear, SoftThreshold, SparsityPenalty, functional

# --- leaks and peaks --------------------------------------------------------------------------------------------------

# Resident memory in KiB, and the number of tensors, before and after 1000 steps of training, each with the penalty, an
# evaluation and a refused call, in two halves: allocators take some memory once, now or later; a leak takes it in both.
STEPS = """
import gc, sys, torch
sys.path.insert(0, sys.argv[1])
import network
from dsc_ops import SparsityPenalty, functional
torch.set_num_threads(1)
torch.manual_seed(0)
model = network.Network()
penalty = SparsityPenalty(model, network.PENALISED, 0.1)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
y = network.images()

def resident():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))

def step():
    optimizer.zero_grad()
    (model(y).square().mean() + penalty()).backward()
    optimizer.step()
    with torch.no_grad():
        model(y)
        penalty.density()
    try:
        functional.analysis(y, model.first.weight.double())
    except TypeError:
        pass

for count in (200, 50, 500, 500):
    for _ in range(count):
        step()
    gc.collect()
    print(resident(), sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
"""


def grown() -> tuple[int, int]:
    """KiB of resident memory, and tensors, that 500 of 1000 steps add at least."""
    command = [sys.executable, "-c", STEPS, str(Path(network.__file__).parent)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    first, second, third = (list(map(int, line.split())) for line in run.stdout.splitlines()[1:])
    memory, tensors = (min(b - a, c - b) for a, b, c in zip(first, second, third, strict=True))
    return memory, tensors


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from Linux's /proc")
@pytest.mark.supports("memory", "no leak over 1000 steps of training, evaluation and refused calls, measured")
def test_nothing_is_kept_over_1000_steps():
    memory, tensors = grown()
    assert tensors == 0
    assert memory < 512  # the codes of one layer alone would be 2000


PEAK = """
import sys, torch
from dsc_ops import functional
torch.set_num_threads(1)
y, weight = torch.randn(1, 1, 256, 256), torch.randn(64, 1, 5, 5) / 25
theta = torch.full((64,), 0.45)
def call(iterations):
    return functional.lista(y, weight, weight, theta, iterations=iterations, padding=2)
def peak():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
call(1)[0, 0, 0, 0].item()
first = peak()
codes = call(int(sys.argv[1]))
print((peak() - first) * 1024 / (4 * codes.numel()), (codes != 0).float().mean().item())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from Linux's /proc")
@pytest.mark.supports("memory", "inference takes no more memory for more iterations")
def test_peak_of_inference_does_not_grow_with_the_iterations():
    """Peak, above that of one iteration, in dense codes: eager PyTorch has three or four at a time."""
    run = subprocess.run([sys.executable, "-c", PEAK, "12"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    extra, density = map(float, run.stdout.split())
    assert 0.001 < density < 0.2 and extra < 1.0


def saved_bytes(call) -> int:
    """What autograd keeps for the backward pass, inputs left out."""
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        if not tensor.is_leaf or tensor.dtype == torch.uint8:
            sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(sizes)


@pytest.mark.supports(
    "memory", "training keeps the tape beside the inputs, and `conv_soft_threshold` its result, nothing else"
)
def test_what_is_saved_for_backward():
    y, weight = torch.randn(1, 1, 40, 40), torch.randn(64, 1, 5, 5, requires_grad=True)
    codes = 64 * 40 * 40
    one = saved_bytes(lambda: functional.conv_soft_threshold(y, weight, 0.1, padding=2))
    assert one == 4 * codes
    tape = torch.ops.dsc_ops.lista(
        y, weight, weight[None], torch.ones(5, 64), None, [], [1, 1], [2, 2], [1, 1], 1, False, True
    )[1]
    saved = saved_bytes(lambda: functional.lista(y, weight, weight.detach(), torch.ones(5, 64), padding=2))
    assert saved == tape.untyped_storage().nbytes()
    assert saved <= 5 * (4 * codes + 40 * 40 * (16 + 8 + 4)) + 64  # most of it is not touched: test_packed.py


def test_gradients_do_not_keep_the_graph():
    """No cycle holds the codes: they go when the last name goes, without the garbage collector."""
    layer, y = LISTAConv(2, 4, 3), images()
    gc.disable()
    try:
        codes = layer(y)
        reference = weakref.ref(codes)
        codes.square().sum().backward()
        del codes
        assert reference() is None
    finally:
        gc.enable()


# --- inputs in any memory ---------------------------------------------------------------------------------------------


def strange(y: Tensor) -> dict[str, Tensor]:
    """Tensors of y's shape that are no memory of their own: views, one value many times, windows that overlap."""
    n, c, h, w = y.shape
    row = torch.randn(n * c * h + w)
    return {
        "a slice": torch.randn(n + 2, c + 1, h + 3, 2 * w)[1:-1, 1:, 3:, ::2],
        "a transpose": torch.randn(w, h, c, n).permute(3, 2, 1, 0),
        "one number": torch.randn(()).expand(n, c, h, w),
        "one image": torch.randn(1, c, h, w).expand(n, c, h, w),
        "one column": torch.randn(n, c, h, 1).expand(n, c, h, w),
        "windows": row.as_strided((n, c, h, w), (c * h, h, 1, 1)),
        "a part of a parameter": nn.Parameter(torch.randn(n, 2 * c, h, w))[:, c:],
        "not aligned": torch.randn(y.numel() + 1)[1:].view(y.shape),
        "conjugate and negative bits": torch._neg_view(torch.randn(y.shape)),
        "an inference tensor": torch.inference_mode()(lambda: torch.randn(y.shape))(),
    }


LAYERS = {
    "SoftThreshold": lambda: SoftThreshold(2, 0.1),
    "SoftThreshold-mish": lambda: SoftThreshold(2, 0.1, activation="mish"),
    "ConvSoftThreshold": lambda: ConvSoftThreshold(2, 3, 3),
    "LISTAConv": lambda: LISTAConv(2, 3, 3, 2, theta=0.02),
    "LISTALinear": lambda: LISTALinear(7, 4, 2, theta=0.02),
}
over_layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())


@pytest.mark.supports(
    "memory", "views, expanded, overlapping, misaligned and negated inputs: results and gradients of a copy"
)
@over_layers
@pytest.mark.parametrize("kind", strange(torch.zeros(2, 2, 6, 7)))
def test_inputs_in_any_memory(kind, make):
    layer, y = make(), strange(torch.zeros(2, 2, 6, 7))[kind]
    plain = torch.empty(y.shape).copy_(y.detach()).requires_grad_()
    expected = layer(plain)
    slopes = torch.autograd.grad(expected.square().sum(), [plain, *layer.parameters()])
    if y.is_inference():
        with torch.no_grad():
            torch.testing.assert_close(layer(y), expected)
        return
    base = y if y.grad_fn is None else None
    if base is not None:
        y = y.detach().requires_grad_()
    before = y.detach().clone()
    got = layer(y)
    torch.testing.assert_close(got, expected)
    own = torch.autograd.grad(got.square().sum(), [y, *layer.parameters()])
    torch.testing.assert_close(own, slopes)
    assert torch.equal(y, before)  # inputs are left alone


@pytest.mark.parametrize("make", [LAYERS["ConvSoftThreshold"], LAYERS["LISTAConv"]])
def test_results_have_memory_of_their_own(make):
    layer, y = make(), images()
    codes = layer(y).detach()
    others = [y, *layer.parameters(), layer(y)]
    assert codes.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in others}
    identity = functional.soft_threshold(y, 0.0)
    assert torch.equal(identity, y) and identity.data_ptr() != y.data_ptr()


# --- which gradients --------------------------------------------------------------------------------------------------


@pytest.mark.supports("memory", "any subset of parameters and input may require a gradient")
@over_layers
def test_frozen_parameters(make):
    layer, y = make(), images()
    every = dict(layer.named_parameters()) | dict(y=y.requires_grad_())
    layer(y).square().sum().backward()
    expected = {name: t.grad.clone() for name, t in every.items()}
    for wanted in [{name} for name in every] + [every.keys() - {name} for name in every] + [set()]:
        for name, tensor in every.items():
            tensor.requires_grad_(name in wanted)
            tensor.grad = None
        value = layer(y).square().sum()
        assert value.requires_grad == bool(wanted)
        if wanted:
            value.backward()
        for name, tensor in every.items():
            assert (tensor.grad is None) == (name not in wanted)
            if name in wanted:
                torch.testing.assert_close(tensor.grad, expected[name])


# --- what backward relies on ------------------------------------------------------------------------------------------

# Layer: what its backward pass reads (and "result", "input").
READ = {
    "SoftThreshold": ("result", "theta"),
    "SoftThreshold-mish": ("input", "theta"),
    "ConvSoftThreshold": ("input", "result", "weight", "theta"),
    "LISTAConv": ("input", "dictionary", "analysis", "theta"),
}


@pytest.mark.supports("memory", "a saved tensor that is modified in place is detected")
@pytest.mark.parametrize(("name", "what"), [(name, what) for name, parts in READ.items() for what in parts])
def test_modified_in_place(name, what):
    layer, y = LAYERS[name](), images().requires_grad_() * 1
    codes = layer(y)
    with torch.no_grad():
        dict(input=y, result=codes).get(what, getattr(layer, what, None)).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        codes.sum().backward()


@pytest.mark.parametrize("make", [LAYERS["LISTAConv"], LAYERS["LISTALinear"]])
def test_what_is_not_read_may_be_modified(make):
    """lista reads its tape and not its codes: an activation after it may work in place."""
    layer, y = make(), images()
    expected = gradients(layer, torch.relu(layer(y)).square().sum())
    network.assert_same(gradients(layer, torch.relu_(layer(y)).square().sum()), expected)


def test_a_graph_is_used_again_when_it_is_kept():
    layer, y = LISTAConv(2, 3, 3), images()
    value = layer(y).square().sum()
    first = torch.autograd.grad(value, list(layer.parameters()), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(value, list(layer.parameters())), first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(value, list(layer.parameters()))


@pytest.mark.supports("memory", "anomaly mode names the operator whose gradient is NaN")
@pytest.mark.parametrize(
    ("make", "operator"),
    [
        (LAYERS["ConvSoftThreshold"], "conv_soft_threshold"),
        (LAYERS["LISTAConv"], "lista"),
        (LAYERS["SoftThreshold"], "soft"),
    ],
)
def test_anomaly_mode(make, operator):
    model, y = nn.Sequential(make()), images().requires_grad_()
    with torch.autograd.detect_anomaly(check_nan=True), pytest.warns(UserWarning, match="Traceback of forward call"):
        codes = model(y)
        with pytest.raises(RuntimeError, match=f"dsc_ops_{operator}\\w*' returned nan"):
            codes.backward(torch.where(codes != 0, torch.nan, 0.0))
    with torch.autograd.detect_anomaly(check_nan=True):
        model(y).sum().backward()


@pytest.mark.supports("memory", "the penalty's features are given up after the step, and hooks can be taken off")
def test_a_penalty_holds_no_memory_after_the_step():
    model = Network()
    with SparsityPenalty(model, network.PENALISED, 0.1) as penalty:
        (model(images()).sum() + penalty()).backward()
        assert not penalty._features.outputs
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
