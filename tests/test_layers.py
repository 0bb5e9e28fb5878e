"""The layers: what an untrained one computes, shapes and names, and that they behave as PyTorch's own modules do."""

from __future__ import annotations

import copy
import pickle

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
    functional,
    reference,
)

FLOAT64 = dict(dtype=torch.float64)

# Name: (a new layer, the shape of an input). Each takes device and dtype.
EXAMPLES = {
    "SoftThreshold": (lambda **kw: SoftThreshold(4, **kw), (2, 4, 5)),
    "SoftThreshold-elu": (lambda **kw: SoftThreshold(4, 0.3, activation="elu", **kw), (2, 4, 5, 3)),
    "ConvSoftThreshold": (lambda **kw: ConvSoftThreshold(4, 6, (3, 2), 2, 1, groups=2, **kw), (2, 4, 7, 6)),
    "ConvSoftThreshold1d": (lambda **kw: ConvSoftThreshold1d(2, 3, 5, padding="same", **kw), (2, 2, 9)),
    "LISTAConv": (lambda **kw: LISTAConv(2, 6, 3, theta=0.02, **kw), (2, 2, 7, 6)),
    "LISTAConv-strided": (
        lambda **kw: LISTAConv(4, 6, (3, 5), 2, stride=2, groups=2, untied=False, **kw),
        (2, 4, 7, 6),
    ),
    "LISTAConv1d": (lambda **kw: LISTAConv1d(1, 5, 5, 2, dilation=2, one_sided=True, theta=0.02, **kw), (2, 1, 15)),
    "LISTALinear": (lambda **kw: LISTALinear(7, 9, theta=0.02, **kw), (3, 7)),
    "LISTALinear-tied": (lambda **kw: LISTALinear(7, 9, 2, untied=False, **kw), (2, 3, 7)),
}
example = pytest.mark.parametrize("name", EXAMPLES)


def make(name: str, **options) -> tuple[nn.Module, Tensor]:
    """A layer and an input for it, strong enough to pass the thresholds here and there."""
    build, shape = EXAMPLES[name]
    return build(**options), 2 * torch.randn(shape, **options)


# --- shapes and names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "signal", "codes", "state"),
    [
        (SoftThreshold(3), (2, 3), (2, 3), dict(theta=(3,))),
        (SoftThreshold(3), (2, 3, 4, 5, 6), (2, 3, 4, 5, 6), dict(theta=(3,))),
        (
            ConvSoftThreshold(4, 6, 3, groups=2),
            (1, 4, 8, 9),
            (1, 6, 6, 7),
            dict(weight=(6, 2, 3, 3), bias=(6,), theta=(6,)),
        ),
        (
            ConvSoftThreshold(1, 2, (1, 3), bias=False),
            (1, 1, 4, 5),
            (1, 2, 4, 3),
            dict(weight=(2, 1, 1, 3), theta=(2,)),
        ),
        (ConvSoftThreshold1d(1, 2, 3, 2, 1, 2), (1, 1, 9), (1, 2, 4), dict(weight=(2, 1, 3), bias=(2,), theta=(2,))),
        (
            LISTAConv(3, 8, 5),
            (2, 3, 7, 9),
            (2, 8, 7, 9),
            dict(dictionary=(8, 3, 5, 5), analysis=(3, 8, 3, 5, 5), theta=(3, 8)),
        ),
        (
            LISTAConv(4, 8, (3, 1), 4, untied=False, groups=2),
            (2, 4, 7, 9),
            (2, 8, 7, 9),
            dict(dictionary=(8, 2, 3, 1), analysis=(8, 2, 3, 1), theta=(8,)),
        ),
        (
            LISTAConv1d(1, 6, 9, 5, stride=2),
            (2, 1, 32),
            (2, 6, 16),
            dict(dictionary=(6, 1, 9), analysis=(5, 6, 1, 9), theta=(5, 6)),
        ),
        (LISTALinear(5, 8), (4, 5), (4, 8), dict(dictionary=(8, 5), analysis=(3, 8, 5), theta=(3, 8))),
        (LISTALinear(5, 8, 2, untied=False), (4, 5), (4, 8), dict(dictionary=(8, 5), analysis=(8, 5), theta=(8,))),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_shapes_of_codes_and_state(layer, signal, codes, state):
    assert layer(torch.randn(signal)).shape == codes
    assert {key: tuple(value.shape) for key, value in layer.state_dict().items()} == state
    assert {key for key, _ in layer.named_parameters()} == set(state)


@pytest.mark.parametrize(
    ("options", "padding"),
    [
        (dict(kernel_size=5), (2, 2)),
        (dict(kernel_size=(3, 7)), (1, 3)),
        (dict(kernel_size=(3, 5), dilation=(2, 3)), (2, 6)),
        (dict(kernel_size=5, stride=2), (2, 2)),
        (dict(kernel_size=4, stride=2), (1, 1)),
        (dict(kernel_size=(4, 3), stride=(1, 2)), (1, 1)),
        (dict(kernel_size=3, stride=2, dilation=3), (3, 3)),
        (dict(kernel_size=3, padding=0), (0, 0)),
        (dict(kernel_size=3, padding=(0, 2), stride=2), (0, 2)),
        (dict(kernel_size=3, padding="same", dilation=2), (2, 2)),
    ],
    ids=str,
)
def test_default_padding(options, padding):
    """ "same" with stride 1, half of the kernel's extent when strided, else what is given."""
    layer = LISTAConv(1, 2, **options)
    assert layer.padding == padding
    if layer.stride == (1, 1) and options.get("padding") != 0:
        assert layer(torch.zeros(1, 1, 9, 8)).shape[2:] == (9, 8)


def test_initial_threshold():
    for name in EXAMPLES:
        layer, _ = make(name)
        assert (layer.theta == layer.theta.flatten()[0]).all()
    assert (LISTAConv(1, 2, 3, theta=0.7).theta == 0.7).all()
    assert (LISTALinear(1, 2, theta=0.7).theta == 0.7).all()
    assert (ConvSoftThreshold(1, 2, 3, theta=0.7).theta == 0.7).all()
    assert (SoftThreshold(2, 0.7).theta == 0.7).all()


# --- thresholds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_soft_threshold_layer(activation, one_sided):
    layer = SoftThreshold(4, activation=activation, one_sided=one_sided)
    layer.theta.data = torch.rand(4)
    u = torch.randn(3, 4, 5)
    expected = reference.shrink(u, layer.theta, activation=activation, one_sided=one_sided)
    torch.testing.assert_close(layer(u), expected)


CONVOLUTIONS = [
    dict(kernel_size=3),
    dict(kernel_size=(3, 2), stride=(2, 1), padding=(0, 1)),
    dict(kernel_size=3, padding="same", dilation=2),
    dict(kernel_size=3, padding="valid"),
    dict(kernel_size=3, groups=2, bias=False),
    dict(kernel_size=1, groups=4, stride=3),
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_from_conv_computes_the_convolution(options):
    y = torch.randn(2, 4, 9, 8)
    conv = nn.Conv2d(4, 8, **options)
    plain, rectified = ConvSoftThreshold.from_conv(conv), ConvSoftThreshold.from_conv(conv, one_sided=True)
    torch.testing.assert_close(plain(y), conv(y))
    torch.testing.assert_close(rectified(y), torch.relu(conv(y)))
    assert (rectified.bias is None) == (conv.bias is None)


def test_from_conv_in_one_dimension_and_with_a_threshold():
    y, conv = torch.randn(2, 2, 12), nn.Conv1d(2, 6, 4, stride=2, padding=3, groups=2)
    layer = ConvSoftThreshold1d.from_conv(conv, 0.4)
    u = conv(y)
    torch.testing.assert_close(layer(y), torch.sign(u) * torch.relu(u.abs() - 0.4))


def test_from_conv_copies():
    conv = nn.Conv2d(1, 2, 3, dtype=torch.float64).eval()
    layer = ConvSoftThreshold.from_conv(conv)
    assert layer.weight.dtype == layer.theta.dtype == torch.float64 and not layer.training
    before = layer.weight.detach().clone()
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    assert torch.equal(layer.weight, before) and layer.bias.abs().sum() > 0
    assert all(p.requires_grad and p.is_leaf for p in layer.parameters())


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_from_conv_refuses_other_padding_than_zeros(mode):
    with pytest.raises(ValueError, match=f"padding_mode '{mode}'"):
        ConvSoftThreshold.from_conv(nn.Conv2d(1, 1, 3, padding=1, padding_mode=mode))


@pytest.mark.parametrize("groups", [1, 2])
def test_conv_soft_threshold_starts_as_the_convolution_of_pytorch(groups):
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 6, 3, groups=groups)
    torch.manual_seed(1)
    layer = ConvSoftThreshold(4, 6, 3, groups=groups)
    assert torch.equal(layer.weight, conv.weight) and torch.equal(layer.bias, conv.bias)


# --- LISTA: an untrained layer is ISTA --------------------------------------------------------------------------------

GEOMETRIES = [
    dict(kernel_size=3),
    dict(kernel_size=(3, 5), dilation=(2, 1)),
    dict(kernel_size=4, stride=2),
    dict(kernel_size=3, groups=2, padding=0),
    dict(kernel_size=(1, 3), stride=(1, 2), groups=2, padding=(2, 1)),
]


def lista_step_size(layer: nn.Module) -> float:
    """The ratio of analysis and dictionary, which is one number in an untrained layer."""
    ratio = layer.analysis.detach() / layer.dictionary.detach()
    torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-10, atol=0)
    return ratio.flatten()[0].item()


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_untrained_convolutional_layer_is_ista(geometry, one_sided, untied):
    theta, y = 0.05, torch.randn(2, 2, 9, 10, **FLOAT64)
    first = LISTAConv(2, 6, iterations=1, theta=theta, one_sided=one_sided, **geometry, **FLOAT64)
    kernels = {k: v for k, v in geometry.items() if k != "kernel_size"}
    options = {k: getattr(first, k) for k in ("stride", "padding", "dilation", "groups")}
    before = None
    for k in range(1, 6):
        layer = LISTAConv.from_dictionary(
            first.dictionary, k, theta=theta, untied=untied, one_sided=one_sided, **kernels
        )
        step = lista_step_size(layer)
        lam = theta / step
        codes = layer(y).detach()
        for solver in (functional.ista, reference.ista):
            expected = solver(y, first.dictionary, lam, iterations=k, step=step, one_sided=one_sided, **options)
            torch.testing.assert_close(codes, expected.detach(), rtol=1e-10, atol=1e-12)
        assert not one_sided or (codes >= 0).all()
        objective = functional.lasso_objective(codes, y, layer.dictionary.detach(), lam, **options)
        assert before is None or (objective <= before * (1 + 1e-12)).all()
        before = objective
    zero = functional.lasso_objective(torch.zeros_like(codes), y, layer.dictionary.detach(), lam, **options)
    assert (before < zero).all() and 0 < functional.density(codes) < 1


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("one_sided", [False, True])
def test_untrained_dense_layer_is_ista(one_sided, untied):
    """Against ISTA written with matrices."""
    theta, y = 0.05, torch.randn(4, 7, **FLOAT64)
    first = LISTALinear(7, 12, 1, **FLOAT64)
    D = first.dictionary.detach()
    step = 1 / torch.linalg.eigvalsh(D @ D.T)[-1].item()
    x, before = torch.zeros(4, 12, **FLOAT64), y.square().sum(1) / 2
    for k in range(1, 6):
        layer = LISTALinear.from_dictionary(D, k, theta=theta, untied=untied, one_sided=one_sided)
        assert lista_step_size(layer) == pytest.approx(step, rel=1e-10)
        u = x + step * (y - x @ D) @ D.T
        x = torch.relu(u - theta) - (0 if one_sided else torch.relu(-u - theta))
        torch.testing.assert_close(layer(y).detach(), x, rtol=1e-10, atol=1e-12)
        objective = (y - x @ D).square().sum(1) / 2 + theta / step * x.abs().sum(1)
        assert (objective < before).all()
        before = objective


def test_one_dimensional_layer_is_the_two_dimensional_one_on_one_row():
    options = dict(iterations=3, theta=0.02, padding=4, **FLOAT64)
    layer = LISTAConv1d(2, 5, 7, dilation=2, stride=3, **options)
    wide = LISTAConv(2, 5, (1, 7), dilation=(1, 2), stride=(1, 3), **(options | dict(padding=(0, 4))))
    wide.load_state_dict(
        {key: value.unsqueeze(-2) if key != "theta" else value for key, value in layer.state_dict().items()}
    )
    y = torch.randn(2, 2, 25, **FLOAT64)
    torch.testing.assert_close(layer(y), wide(y.unsqueeze(-2)).squeeze(-2))


@pytest.mark.parametrize("geometry", [*GEOMETRIES, dict(kernel_size=(1, 1)), dict(kernel_size=7, stride=3)], ids=str)
def test_step_of_a_new_layer_holds_for_signals_of_any_size(geometry):
    """The Lipschitz constant grows with the signal to a limit; the layer's comes close to it. (ISTA's objective falls
    for steps of up to 2 / L.)"""
    layer = LISTAConv(2, 6, **geometry, **FLOAT64)
    step, dictionary = lista_step_size(layer), layer.dictionary.detach()
    options = {k: getattr(layer, k) for k in ("stride", "padding", "dilation", "groups")}
    extent = [d * (k - 1) + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    ratios = []
    for factor in (1, 2, 3.5, 8, 12):
        size = [round(factor * e) for e in extent]
        ratios.append(step * functional.lipschitz(dictionary, size, **options).item())
    assert max(ratios) <= 1.03 and max(ratios) >= 0.97
    if layer.kernel_size != (1, 1):
        assert ratios[0] < ratios[2]  # a small signal would have given a step that is too long for others


@pytest.mark.parametrize("name", [name for name in EXAMPLES if "LISTA" in name])
def test_atoms_of_a_new_layer_have_unit_norm(name):
    layer, _ = make(name, **FLOAT64)
    norms = layer.dictionary.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    before = layer.dictionary.detach().clone()
    layer.reset_parameters()
    norms = layer.dictionary.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    assert not torch.equal(layer.dictionary, before)
    assert lista_step_size(layer) == pytest.approx(1 / layer.lipschitz().item())


def test_from_dictionary():
    dictionary = 3 * torch.randn(6, 2, 3, 5, **FLOAT64)
    layer = LISTAConv.from_dictionary(dictionary, 4, groups=2, stride=2, theta=0.3, untied=False, one_sided=True)
    assert (layer.in_channels, layer.code_channels, layer.kernel_size) == (4, 6, (3, 5))
    assert (layer.iterations, layer.groups, layer.stride, layer.one_sided) == (4, 2, (2, 2), True)
    assert torch.equal(layer.dictionary, dictionary) and layer.dictionary.dtype == torch.float64
    assert (layer.theta == 0.3).all() and layer.theta.shape == (6,)
    # A copy, and what the iterations start from follows the dictionary.
    dictionary.zero_()
    assert layer.dictionary.abs().sum() > 0
    assert lista_step_size(layer) == pytest.approx(1 / layer.lipschitz().item())
    assert LISTAConv1d.from_dictionary(torch.randn(6, 2, 3)).in_channels == 2
    dense = LISTALinear.from_dictionary(torch.randn(6, 2), 5)
    assert (dense.in_features, dense.code_features, dense.iterations) == (2, 6, 5)
    assert LISTALinear.from_dictionary(torch.randn(6, 2), dtype=torch.float64).dictionary.dtype == torch.float64


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_decode_is_the_adjoint_of_analysis(geometry):
    layer = LISTAConv(2, 6, **geometry, **FLOAT64)
    with torch.no_grad():
        layer.analysis.normal_()  # which decode does not use
    y = torch.randn(2, 2, 9, 10, **FLOAT64)
    options = {k: getattr(layer, k) for k in ("stride", "padding", "dilation", "groups")}
    codes = functional.analysis(y, layer.dictionary, **options)
    x = torch.randn_like(codes)
    decoded = layer.decode(x, (9, 10))
    torch.testing.assert_close((codes * x).sum(), (y * decoded).sum())
    # Without a size: the largest signal that has such codes.
    size = layer.decode(x).shape[2:]
    largest = torch.zeros(1, 2, *size, **FLOAT64)
    assert layer(largest).shape[2:] == x.shape[2:]
    for axis in range(2):
        larger = [n + (i == axis) for i, n in enumerate(size)]
        assert layer(torch.zeros(1, 2, *larger, **FLOAT64)).shape[2:] != x.shape[2:]


@pytest.mark.parametrize(("size", "stride"), [((8, 12), 1), ((8, 12), 2), ((9, 12), 3)])
def test_decode_by_default_gives_the_size_that_was_encoded(size, stride):
    """... when stride divides it, with an odd kernel and default padding."""
    layer = LISTAConv(1, 4, 5, stride=stride)
    assert layer.decode(layer(torch.zeros(1, 1, *size))).shape[2:] == tuple(n // stride * stride for n in size)


def test_decode_of_the_dense_layer_is_the_adjoint_of_its_analysis():
    layer = LISTALinear(5, 8, **FLOAT64)
    y, x = torch.randn(3, 5, **FLOAT64), torch.randn(3, 8, **FLOAT64)
    torch.testing.assert_close((y @ layer.dictionary.T * x).sum(), (y * layer.decode(x)).sum())


def test_dense_layer_takes_any_leading_dimensions():
    layer = LISTALinear(5, 8, theta=0.02)
    y = torch.randn(2, 3, 4, 5)
    codes = layer(y)
    assert codes.shape == (2, 3, 4, 8) and codes.is_contiguous() and layer.decode(codes).shape == y.shape
    torch.testing.assert_close(codes, torch.stack([torch.stack([layer(v) for v in row]) for row in y]))
    torch.testing.assert_close(layer(y[0, 0, 0]), codes[0, 0, 0])
    torch.testing.assert_close(layer(y.transpose(0, 2)), codes.transpose(0, 2))


@example
def test_empty_batches(name):
    layer, y = make(name)
    codes = layer(y[:0])
    assert codes.shape == (0, *layer(y).shape[1:])
    codes.sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in layer.parameters())


def test_empty_batch_inside_the_leading_dimensions():
    layer = LISTALinear(5, 8)
    assert layer(torch.zeros(3, 0, 5)).shape == (3, 0, 8)


# --- as modules -------------------------------------------------------------------------------------------------------


@example
def test_gradients_reach_every_parameter_and_the_input(name):
    layer, y = make(name)
    layer(y.requires_grad_()).square().sum().backward()
    for key, parameter in [*layer.named_parameters(), ("y", y)]:
        grad = parameter.grad
        assert grad.isfinite().all(), key
        # Each iteration has its part.
        parts = grad if grad.dim() > 1 and key in ("analysis", "theta") and layer.untied else [grad]
        assert all(part.abs().sum() > 0 for part in parts), key


def test_training_lowers_the_loss():
    """As a part of nn.Sequential, where a convolution could stand."""
    model = nn.Sequential(
        ConvSoftThreshold(1, 4, 3, padding=1, theta=0.01),
        nn.MaxPool2d(2),
        LISTAConv(4, 6, 3, theta=0.01),
        SoftThreshold(6, 0.01),
        nn.Flatten(),
        LISTALinear(96, 10, theta=0.01),
        nn.Linear(10, 2),
    )
    y, target = torch.randn(8, 1, 8, 8), torch.randn(8, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(y), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.supports("state", "`deepcopy`, `pickle`, whole models in files")
@example
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_equal_and_independent(name, copied):
    layer, y = make(name)
    twin = copied(layer)
    codes = layer(y)
    assert torch.equal(twin(y), codes) and repr(twin) == repr(layer)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert torch.equal(layer(y), codes) and not torch.equal(twin(y), codes)


@example
def test_state_dict_makes_another_layer_equal(name):
    layer, y = make(name)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    other, _ = make(name)
    assert not torch.equal(other(y), layer(y))
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other(y), layer(y))


@pytest.mark.supports("state", "`.to()`, `.half()`, `.bfloat16()`, `.double()` on networks")
@example
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(name, dtype):
    """Made in a dtype or taken to one: forward, backward, and codes near those of float32."""
    layer, y = make(name)
    codes = layer(y)
    converted = layer.to(dtype)
    got = converted(y.to(dtype))
    assert got.dtype == dtype
    assert (got.float() - codes).norm() <= 20 * torch.finfo(dtype).eps * codes.norm() + 1e-5
    made, _ = make(name, dtype=dtype)
    made(y.to(dtype)).sum().backward()
    assert all(p.dtype == p.grad.dtype == dtype and p.isfinite().all() for p in made.parameters())


@pytest.mark.supports("state", "layers made on the meta device and filled later")
@example
def test_layers_are_made_on_the_meta_device_and_filled_later(name):
    layer, _ = make(name, device="meta")
    assert all(p.is_meta for p in layer.parameters())
    assert layer(torch.empty(EXAMPLES[name][1], device="meta")).is_meta
    layer = layer.to_empty(device="cpu")
    usual, y = make(name)
    layer.load_state_dict(usual.state_dict())
    assert torch.equal(layer(y), usual(y))
    for parameter in layer.parameters():
        nn.init.constant_(parameter, float("nan"))
    layer.reset_parameters()
    assert layer(y).isfinite().all() and torch.equal(layer.theta, usual.theta)


@pytest.mark.supports("compile and transform", "`torch.compile(fullgraph=True)` of every layer, forward and backward")
@example
def test_torch_compile(name):
    """One graph, forward and backward, with the results of the layer as it is."""
    layer, y = make(name)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (layer, compiled):
        leaves = [y.clone().requires_grad_(), *layer.parameters()]
        codes = function(leaves[0])
        results.append([codes, *torch.autograd.grad(codes.square().sum(), leaves)])
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager)


def test_torch_compile_with_changing_sizes():
    layer = LISTAConv(2, 4, 3, theta=0.02)
    compiled = torch.compile(
        lambda y: layer.decode(layer(y), y.shape[2:]), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for shape in ((2, 2, 6, 7), (3, 2, 9, 5), (4, 2, 8, 8)):
        y = torch.randn(shape)
        torch.testing.assert_close(compiled(y), layer.decode(layer(y), y.shape[2:]))


def test_representations_name_what_a_layer_was_made_with():
    assert repr(SoftThreshold(3, one_sided=True)) == "SoftThreshold(3, one_sided=True, activation='relu')"
    for name in EXAMPLES:
        layer, _ = make(name)
        text = repr(layer)
        assert text.startswith(type(layer).__name__ + "(")
        for attribute in (
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "iterations",
            "untied",
            "one_sided",
        ):
            if hasattr(layer, attribute):
                assert f"{attribute}={getattr(layer, attribute)}" in text
    assert "ConvSoftThreshold(4, 6, kernel_size=(3, 2), " in repr(make("ConvSoftThreshold")[0])
    assert "LISTALinear(7, 9, " in repr(make("LISTALinear")[0])
