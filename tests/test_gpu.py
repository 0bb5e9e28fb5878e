"""Everything on a GPU: `make test-gpu`, which is pytest tests/test_gpu.py --device cuda.

Tensors are made where torch.device(...) says, so the tests of properties are those of the other files, run once more
on the device: equality with reference.py for all dtypes, strides, densities and odd sizes, gradients against
differences, opcheck, torch.compile. Only a GPU has what follows them: streams, capture, no waiting, other devices,
compute-sanitizer. `--device cpu` runs all but these where there is no GPU, to try the tests themselves.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsc_ops import LISTAConv, functional, reference

DEVICE = os.environ.get("DSC_OPS_TEST_DEVICE")
if DEVICE is None:
    pytest.skip("the tests on a GPU are run by make test-gpu (pytest --device cuda)", allow_module_level=True)

# ruff: noqa: E402, F401
from test_functional import (
    test_convolutions_match_reference,
    test_density_counts,
    test_elementwise_functions_take_any_shape,
    test_elementwise_results_keep_channels_last,
    test_empty_batches,
    test_expanded_gradients_are_understood,
    test_gradcheck,
    test_gradient_at_the_kink_is_zero,
    test_hard_threshold,
    test_l1_norm_of_many_small_values_is_exact,
    test_l1_penalty_matches_reference,
    test_lista_in_low_precision,
    test_lista_matches_reference,
    test_nan_and_infinity_pass_through,
    test_only_the_gradients_asked_for,
    test_random_convolutions_match_reference,
    test_results_do_not_depend_on_strides,
    test_second_derivatives,
    test_shrink_matches_reference,
    test_soft_threshold_at_every_density,
    test_soft_threshold_matches_reference,
    test_unsupported_second_derivatives_are_refused_by_name,
)
from test_layers import (
    test_decode_is_the_adjoint_of_analysis,
    test_dtypes,
    test_gradients_reach_every_parameter_and_the_input,
    test_torch_compile,
    test_training_lowers_the_loss,
    test_untrained_convolutional_layer_is_ista,
    test_untrained_dense_layer_is_ista,
)
from test_layers import test_empty_batches as test_empty_batches_of_layers
from test_operators import (
    test_a_backward_pass_that_kept_no_tape_runs_the_iterations_again,
    test_compile_fullgraph,
    test_compile_with_dynamic_sizes,
    test_opcheck,
    test_opcheck_of_empty_and_0d_tensors,
)
from test_packed import (
    test_any_choice_of_gradients,
    test_every_kind_of_iteration,
    test_every_plan_at_every_density,
    test_float32_is_as_exact_as_eager,
    test_half_precision_is_as_exact_as_eager,
    test_nan_and_infinity_spread_as_in_the_reference,
    test_nan_in_a_gradient_stays_where_it_belongs,
    test_negative_thresholds,
)
from test_penalty import (
    test_a_training_step_with_the_penalty_adds_its_gradient,
    test_value_and_gradient_are_those_of_eager,
)

only_on_a_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")


@pytest.fixture
def capability() -> None:
    """In place of the CPU's instruction set levels: a GPU has none."""


@pytest.fixture(autouse=True)
def on_the_device():
    """Every new tensor on the device; float32 that is float32, and convolutions that give the same bits again."""
    settings = {
        (torch.backends.cudnn, "allow_tf32"): False,
        (torch.backends.cudnn, "deterministic"): True,
        (torch.backends.cuda.matmul, "allow_tf32"): False,
    }
    before = {(where, name): getattr(where, name) for where, name in settings}
    for (where, name), value in settings.items():
        setattr(where, name, value)
    with torch.device(DEVICE):
        yield
    for (where, name), value in before.items():
        setattr(where, name, value)


def training_step(layer: LISTAConv, y: Tensor) -> Tensor:
    """Adds the gradients of a loss, which it returns."""
    codes = layer(y)
    loss = (layer.decode(codes) - y).square().sum() + functional.l1_penalty(codes)
    loss.backward()
    return loss.detach()


def gradients(layer: LISTAConv, y: Tensor) -> list[Tensor]:
    """The loss and the gradients of a training step."""
    layer.zero_grad(set_to_none=True)
    loss = training_step(layer, y)
    return [loss, *(parameter.grad.clone() for parameter in layer.parameters())]


def new_layer() -> LISTAConv:
    return LISTAConv(2, 19, 5, iterations=3, theta=0.02)


SIZE = (3, 2, 21, 18)


# --- on any device ----------------------------------------------------------------------------------------------------


def test_tensors_are_made_on_the_device():
    layer = new_layer()
    codes = layer(torch.randn(SIZE))
    assert {tensor.device.type for tensor in (codes, *layer.parameters())} == {DEVICE}


def test_the_device_computes_what_the_cpu_does():
    layer, y = new_layer().double(), torch.randn(SIZE, dtype=torch.float64)
    here, there = gradients(layer, y), gradients(new_layer_like(layer), y.cpu())
    for ours, theirs in zip(here, there, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-9, atol=1e-9)


def new_layer_like(layer: LISTAConv) -> LISTAConv:
    """A copy on the CPU."""
    with torch.device("cpu"):
        copy = new_layer().double()
    copy.load_state_dict({name: value.cpu() for name, value in layer.state_dict().items()})
    return copy


def test_the_same_bits_again():
    layer, y = new_layer(), torch.randn(SIZE)
    u, theta = torch.randn(5, 33, 41, 37, requires_grad=True), torch.rand(33, requires_grad=True)
    for run in (
        lambda: gradients(layer, y),
        lambda: torch.autograd.grad(functional.soft_threshold(u, theta).square().sum(), (u, theta)),
        lambda: torch.autograd.grad(functional.shrink(u, theta, activation="gelu").sum(), (u, theta)),
        lambda: [functional.l1_penalty(u), functional.density(u)],
    ):
        first = run()
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    layer, y = new_layer(), torch.randn(SIZE)
    with torch.autocast(DEVICE, dtype=dtype):
        codes = layer(y)
    assert codes.dtype == dtype
    full = layer(y)
    assert (codes.float() - full).norm() <= 0.05 * full.norm()
    codes.float().square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.abs().sum() > 0


# --- on a GPU alone ---------------------------------------------------------------------------------------------------


@only_on_a_gpu
def test_a_training_step_is_captured_in_a_graph_and_replayed():
    layer, y = new_layer(), torch.randn(SIZE)
    others = [torch.randn(SIZE) for _ in range(3)]
    expected = [gradients(layer, other) for other in others]

    side = torch.cuda.Stream()  # libraries find their workspaces before the capture, on a side stream
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            gradients(layer, y)
    torch.cuda.current_stream().wait_stream(side)

    layer.zero_grad(set_to_none=True)  # so that the gradients belong to the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = training_step(layer, y)
    for other, truth in zip(others, expected, strict=True):
        y.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        for ours, theirs in zip([loss, *(p.grad for p in layer.parameters())], truth, strict=True):
            torch.testing.assert_close(ours, theirs)


@only_on_a_gpu
def test_a_training_step_never_waits_for_the_gpu():
    layer, y = new_layer(), torch.randn(SIZE)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    training_step(layer, y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            y.sum().item()  # what the mode is there to find
        optimizer.zero_grad(set_to_none=True)
        training_step(layer, y)
        optimizer.step()
        with torch.no_grad():
            functional.shrink(layer(y), 0.1, activation="mish")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@only_on_a_gpu
@pytest.mark.parametrize("name", ["soft_threshold", "shrink", "l1_penalty", "layer"])
def test_kernels_run_on_the_current_stream(name):
    """The input comes late on a side stream, which the default stream does not wait for."""
    layer = new_layer()
    functions = {
        "soft_threshold": lambda t: functional.soft_threshold(t, 0.3),
        "shrink": lambda t: functional.shrink(t, 0.3, activation="elu"),
        "l1_penalty": functional.l1_penalty,
        "layer": layer,
    }

    def run(t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.detach().requires_grad_()
        result = functions[name](t)
        return result.detach(), torch.autograd.grad(result.square().sum(), t)[0]

    values = torch.randn(SIZE)
    expected = run(values)  # also loads what has to be loaded
    late = torch.full(SIZE, 7.0)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # cycles, about a tenth of a second
        late.copy_(values)
        found = run(late)
    side.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@only_on_a_gpu
def test_two_streams_at_a_time():
    layers, inputs = [new_layer(), new_layer()], [torch.randn(SIZE), torch.randn(SIZE)]
    expected = [gradients(layer, y) for layer, y in zip(layers, inputs, strict=True)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[index] = gradients(layers[index], inputs[index])
    torch.cuda.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


@only_on_a_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    layer, y = new_layer(), torch.randn(SIZE)
    expected = gradients(layer, y)
    other = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
    current = torch.cuda.current_device()
    found = gradients(layer.to(other), y.to(other))
    u = torch.randn(3, 5, 7, 9, device=other)
    pairs = [(m.soft_threshold(u, 0.3), m.shrink(u, 0.3), m.l1_penalty(u)) for m in (functional, reference)]
    assert torch.cuda.current_device() == current
    for ours, theirs in (*zip(found, expected, strict=True), *zip(*pairs, strict=True)):
        assert ours.device == other
        torch.testing.assert_close(ours, theirs.to(other))


@only_on_a_gpu
def test_more_elements_than_32_bits_can_count():
    size = 2**31 + 77
    if torch.cuda.mem_get_info()[0] < 7 * size:
        pytest.skip("needs 14 GiB of free memory")
    u = torch.zeros(size, dtype=torch.bfloat16)
    u[-3:] = torch.tensor([2.0, -0.25, -3.0])
    u[2**31 - 1 : 2**31 + 1] = 5.0
    x = functional.soft_threshold(u, 0.5)
    assert x[-3:].tolist() == [1.5, 0.0, -2.5]
    assert x[2**31 - 2 : 2**31 + 2].tolist() == [0.0, 4.5, 4.5, 0.0]
    _, count = torch.ops.dsc_ops.l1_norm(u, 0.1)
    assert count.item() == 5


SANITIZED = """
import torch
from dsc_ops import LISTAConv, functional
torch.manual_seed(0)
for shape in ((2, 5, 7, 9), (3, 33, 41, 37), (1, 1, 1, 1), (601,)):
    for layout in (torch.contiguous_format, torch.channels_last):
        u = torch.randn(shape, device="cuda")
        u = (u.contiguous(memory_format=layout) if u.dim() == 4 else u).requires_grad_()
        theta = torch.rand(shape[1] if len(shape) > 1 else (), device="cuda", requires_grad=True)
        x = functional.soft_threshold(u, theta) + functional.shrink(u, theta, activation="gelu")
        torch.autograd.grad(x.square().sum() + functional.l1_penalty(x), (u, theta))
LAYER
torch.cuda.synchronize()
"""
LAYER = """
for size, kernel, atoms in (((2, 1, 19, 23), 7, 64), ((1, 3, 33, 40), 3, 65)):
    layer = LISTAConv(size[1], atoms, kernel, iterations=3, theta=0.02, device="cuda")
    layer(torch.randn(size, device="cuda")).square().sum().backward()
"""


@only_on_a_gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool):
    """Without torch's cache of memory, so that every tensor ends where its allocation does.

    The layer runs under memcheck alone until it has no kernel of a library in it, whose races are not ours.
    """
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"))
    )
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    script = SANITIZED.replace("LAYER", LAYER if tool == "memcheck" else "")
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", script]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    assert "ERROR SUMMARY: 0 errors" in run.stdout + run.stderr or "0 hazards" in run.stdout + run.stderr
