"""dsc_ops.layers.csc: each layer is its published definition, as reference.py of that room has it in plain PyTorch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from numerics import assert_as_exact_as_eager
from torch import Tensor, nn
from torch.library import opcheck

from dsc_ops import ConvSoftThreshold, _composed, functional
from dsc_ops.layers import csc
from dsc_ops.layers.csc import MLCSC, CSCConv, MSDCSCBlock, ResCSCBlock, _dilated, convolutional, reference

FLOAT64 = dict(dtype=torch.float64)


def shaken(layer: nn.Module) -> nn.Module:
    """Parameters and statistics away from where they start, where zeros and ones would hide mistakes."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() <= 1 else 0.1))
        for name, statistics in layer.named_buffers():
            if "running" in name:
                statistics.uniform_(*((0.5, 2) if "var" in name else (-1, 0.3)))
    return layer


def assert_same(layer: nn.Module, plain: Callable[[Tensor], Tensor], y: Tensor, tolerance: float = 1e-8) -> None:
    """Results and the gradients of the input and of all parameters."""
    y = y.requires_grad_()
    ours, theirs = layer(y), plain(y)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    grad, leaves = torch.randn_like(theirs), [y, *(p for p in layer.parameters() if p.requires_grad)]
    names = ["y", *(name for name, p in layer.named_parameters() if p.requires_grad)]
    pairs = zip(
        names, *(torch.autograd.grad(r, leaves, grad, materialize_grads=True) for r in (ours, theirs)), strict=True
    )
    for name, got, expected in pairs:
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(
            got / scale, expected / scale, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert sum(g.abs().sum() > 0 for g in torch.autograd.grad(layer(y), leaves, grad, materialize_grads=True)) > 1


# --- CSCConv ----------------------------------------------------------------------------------------------------------

GEOMETRIES = [dict(kernel_size=3), dict(kernel_size=5, stride=2), dict(kernel_size=(4, 3), stride=(3, 1), padding=1)]


@pytest.mark.parametrize("solver", ["ista", "fista"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_csc_conv_is_its_definition(geometry, solver):
    layer = CSCConv(2, 6, iterations=5, solver=solver, learn_threshold=True, **geometry, **FLOAT64).eval()
    step = 0.9 / layer.lipschitz

    def plain(y: Tensor) -> Tensor:
        lam = layer.lam.view(1, -1, 1, 1)
        return reference.csc_conv(
            y, layer.dictionary, lam, step, 5, layer.stride, layer.padding, fista=solver == "fista"
        )

    assert_same(layer, plain, torch.randn(2, 2, 11, 12, **FLOAT64))


@pytest.mark.parametrize("one_sided", [False, True])
def test_objective_of_csc_conv_is_fistas_at_any_number_of_steps(one_sided):
    layer = CSCConv(2, 8, 3, **FLOAT64, one_sided=one_sided).eval()
    y, step = torch.randn(3, 2, 9, 8, **FLOAT64), 0.9 / layer.lipschitz
    options = dict(step=step, padding=1, one_sided=one_sided)
    for layer.iterations in range(1, 17):
        objective = layer.objective(y, layer(y))
        fista, ista = (
            functional.ista(y, layer.dictionary, layer.lam, iterations=layer.iterations, fast=fast, **options)
            for fast in (True, False)
        )
        torch.testing.assert_close(objective, layer.objective(y, fista))
        assert layer.iterations < 4 or (objective < layer.objective(y, ista)).all()
    assert layer.solver == "fista"


def test_csc_conv_reaches_the_objective_of_sporco():
    """sporco's convolution is circular: codes whose atoms leave the picture get an infinite weight."""
    pytest.importorskip("sporco", reason="it needs pip install dsc_ops[test]", exc_type=ImportError)
    import numpy as np
    from sporco.admm.cbpdn import ConvBPDN

    layer = CSCConv(1, 4, 3, 400, padding=0, lam=0.3, one_sided=False, **FLOAT64).eval()
    y = torch.randn(1, 1, 10, 11, **FLOAT64)
    weight = np.full((10, 11, 1, 1, 4), 1e9)
    weight[:8, :9] = 1
    options = {"MaxMainIter": 500, "RelStopTol": 0.0, "L1Weight": weight, "rho": 5.0, "AutoRho": {"Enabled": False}}
    atoms = layer.dictionary.detach()[:, 0].permute(1, 2, 0).numpy()
    solver = ConvBPDN(atoms, y[0, 0].numpy(), 0.3, ConvBPDN.Options(options), dimK=0)
    solver.solve()
    codes = torch.from_numpy(solver.getcoef()[:, :, 0, 0].transpose(2, 0, 1).copy())
    assert codes[:, 8:].abs().max() == 0 == codes[:, :, 9:].abs().max()
    theirs, ours = (layer.objective(y, x).item() for x in (codes[None, :, :8, :9], layer(y)))
    assert theirs == pytest.approx(ours, rel=1e-4) and theirs >= ours * (1 - 1e-9)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_lipschitz_is_the_largest_eigenvalue_for_stride_and_padding(geometry, monkeypatch):
    monkeypatch.setattr(convolutional, "EXTENTS", 4)
    layer = CSCConv(2, 6, **geometry, **FLOAT64)
    size = layer.eigenvector.shape[2:]
    units = torch.eye(2 * size.numel(), **FLOAT64).view(-1, 2, *size)

    def exact() -> float:
        analysis = functional.analysis(units, layer.dictionary.detach(), stride=layer.stride, padding=layer.padding)
        rows = analysis.flatten(1)
        return torch.linalg.eigvalsh(rows @ rows.T)[-1].item()

    assert layer.lipschitz.item() == pytest.approx(exact(), rel=1e-4)
    layer.dictionary = torch.rand_like(layer.dictionary)
    layer(torch.zeros(1, 2, 8, 8, **FLOAT64))
    assert layer.lipschitz.item() == pytest.approx(exact(), rel=1e-4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        layer(torch.randn(4, 2, 8, 8, **FLOAT64)).square().sum().backward()
        optimizer.step()
    layer(torch.zeros(1, 2, 8, 8, **FLOAT64))
    assert layer.lipschitz.item() == pytest.approx(exact(), rel=0.02)


def test_power_iteration_runs_in_training_alone_and_only_for_a_changed_dictionary(monkeypatch):
    calls = []
    follow, find = CSCConv._follow, CSCConv.find_step
    monkeypatch.setattr(CSCConv, "_follow", lambda self, *a: (calls.append("follow"), follow(self, *a)))
    monkeypatch.setattr(CSCConv, "find_step", lambda self: (calls.append("find"), find(self)))
    layer, y = CSCConv(1, 4, 3), torch.randn(1, 1, 6, 6)
    assert calls == ["find"]
    layer(y), layer.eval()(y)
    change = layer.parametrizations.dictionary.original
    with torch.no_grad():
        change.add_(0.1 * torch.rand_like(change))
    layer(y)
    assert calls == ["find"]
    layer.train()(y), layer(y)
    assert calls == ["find", "follow"]
    layer.dictionary = torch.randn_like(change)
    layer.eval()(y), layer(y)
    assert calls == ["find", "follow", "find"]


def test_atoms_keep_unit_norm_and_lam_is_set_at_any_time():
    layer, y = CSCConv(1, 4, 3, lam=torch.full((4,), 0.2)), torch.randn(2, 1, 8, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(y).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer.dictionary.flatten(1).norm(dim=1), torch.ones(4))
    dense = functional.density(layer(y))
    layer.lam = 0.8
    assert functional.density(layer(y)) < dense and (layer.lam == 0.8).all()
    layer.lam = torch.tensor([0.1, 100.0, 0.1, 100.0])
    assert layer(y).sum((0, 2, 3))[1::2].abs().max() == 0 < layer(y).sum((0, 2, 3))[::2].abs().min()
    codes = layer(y)
    torch.testing.assert_close(layer.residual(y, codes).square(), (y - layer.decode(codes)).square().sum((1, 2, 3)))
    assert "lam" not in dict(layer.named_parameters())
    assert "lam" in dict(CSCConv(1, 4, 3, learn_threshold=True).named_parameters())


def test_csc_conv_from_a_dictionary():
    dictionary = 3 * torch.randn(4, 1, 3, 3, **FLOAT64)
    layer = CSCConv.from_dictionary(dictionary, 3)
    torch.testing.assert_close(layer.dictionary, dictionary / dictionary.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
    expected = functional.lipschitz(layer.dictionary, layer.eigenvector.shape[2:], padding=1)
    torch.testing.assert_close(layer.lipschitz, expected.detach())


# --- ML-CSC -----------------------------------------------------------------------------------------------------------


def convolutions(**options) -> list[nn.Conv2d]:
    return [nn.Conv2d(a, b, 4, 2, 1, **options) for a, b in ((2, 5), (5, 4), (4, 6))]


@pytest.mark.parametrize("method", csc.multilayer.METHODS)
@pytest.mark.parametrize("unfoldings", [0, 1, 4])
def test_ml_csc_is_its_definition(method, unfoldings):
    if method == "layered-thresholding" and unfoldings:
        pytest.skip("it has no unfoldings")
    layer = shaken(MLCSC(convolutions(**FLOAT64), method, unfoldings))
    parts = list(layer.layers)

    def plain(y: Tensor) -> Tensor:
        analyses = [part.analysis for part in parts] if method == "ml-lista" else None
        weights = ([p.dictionary for p in parts], [-p.theta for p in parts], [p.scale for p in parts])
        return reference.ml_csc(y, *weights, [(2, 1)] * 3, method, unfoldings, analyses)[-1]

    assert_same(layer, plain, torch.randn(2, 2, 16, 8, **FLOAT64))


@pytest.mark.parametrize("method", csc.multilayer.METHODS)
def test_without_unfoldings_it_is_the_network_of_conv2d_and_relu(method):
    convs, y = convolutions(), torch.randn(2, 2, 17, 16)
    network = nn.Sequential(*itertools.chain.from_iterable((conv, nn.ReLU()) for conv in convs))
    torch.testing.assert_close(MLCSC(convs, method)(y), network(y))
    csc.convert(network)
    converted = [layer for layer in network if isinstance(layer, ConvSoftThreshold)]
    torch.testing.assert_close(MLCSC(converted, method)(y), network(y))
    if method != "layered-thresholding":
        unfolded = MLCSC(converted, method, 2)(y)
        torch.testing.assert_close(unfolded, MLCSC(convs, method, 2)(y))
        assert not torch.allclose(unfolded, network(y))


def test_ml_ista_lowers_the_objective_of_the_deepest_code():
    """For the steps that guarantee it: c_i at most 1 / L_i."""
    layer = MLCSC(convolutions(bias=False, **FLOAT64), "ml-ista", one_sided=False)
    y = torch.randn(2, 2, 16, 16, **FLOAT64)
    with torch.no_grad():
        for part, size in zip(layer.layers, (16, 8, 4), strict=True):
            part.scale.copy_(0.5 / functional.lipschitz(part.dictionary, size, stride=2, padding=1))
            part.theta.fill_(1e-4)
    residuals = []
    for layer.unfoldings in (0, 5, 50):
        x = layer(y)
        for part, size in zip(reversed(layer.layers), (4, 8, 16), strict=True):
            x = part.back(x, part.dictionary, (size, size))
        residuals.append((y - x).norm().item())
    assert residuals == sorted(residuals, reverse=True)


# --- Res-CSC ----------------------------------------------------------------------------------------------------------


def res_csc(block: ResCSCBlock, x: Tensor) -> Tensor:
    """Its definition, on norms of its own that have the block's parameters."""
    norms, scale = copy.deepcopy(block.norms), 0.0 if block.scale is None else block.scale
    for twin, norm in zip(norms, block.norms, strict=True):
        twin.weight, twin.bias = norm.weight, norm.bias
    fista, shortcut = block.solver == "fista", block.kind in ("res-csc", "resnet")
    return reference.res_csc(x, tuple(block.dictionaries), norms, scale, block.stride, shortcut, fista, block.one_sided)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("code_channels", "stride"), [(4, 1), (7, 2)])
@pytest.mark.parametrize("kind", csc.residual.KINDS)
def test_res_csc_is_its_definition(kind, code_channels, stride, training):
    block = shaken(ResCSCBlock(4, code_channels, stride, kind=kind, **FLOAT64)).train(training)
    assert_same(block, lambda x: res_csc(block, x), torch.randn(3, 4, 7, 6, **FLOAT64))


@pytest.mark.parametrize("one_sided", [True, False])
@pytest.mark.parametrize("solver", ["ista", "fista"])
@pytest.mark.parametrize(("kind", "iterations"), [("res-csc", 1), ("res-csc", 4), ("simplified", 3), ("resnet", 3)])
def test_res_csc_of_several_steps_and_of_both_signs(kind, iterations, solver, one_sided):
    options = dict(kind=kind, iterations=iterations, solver=solver, one_sided=one_sided)
    block, x = shaken(ResCSCBlock(4, 6, 2, **options, **FLOAT64)), torch.randn(3, 4, 7, 6, **FLOAT64)
    assert_same(block, lambda x: res_csc(block, x), x)
    assert (block(x).min() < 0) == (not one_sided) and len(block.norms) == 1 + iterations


SIZES = [(2, 16, 7, 6), (3, 48, 5, 9), (1, 32, 1, 2), (5, 16, 1, 1), (1, 64, 9, 8)]
# A large one in float64 alone: of many values one is so close to zero that ReLU's choice is a matter of rounding.
AS_ONE = [*itertools.product((torch.float32, torch.float64), SIZES), (torch.float64, (1, 16, 64, 57))]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["res-csc", "simplified"])
@pytest.mark.parametrize(("dtype", "shape"), AS_ONE, ids=str)
def test_res_csc_as_one_operator(shape, dtype, kind, training, capability):
    """Results, gradients and statistics, as exact as those of the plain writing in the same dtype."""
    block = shaken(ResCSCBlock(shape[1], shape[1], kind=kind, dtype=dtype)).train(training)
    x, grad = (torch.randn(shape, dtype=dtype) for _ in range(2))
    assert block._is_one_operator(x)
    names = ["codes", "x", *(name for name, _ in block.named_parameters()), *["statistics"] * 4]
    found = []
    for plain, wide in ((False, dtype), (True, dtype), (True, torch.float64)):
        twin = copy.deepcopy(block).to(wide)
        y, shortcut = x.to(wide).requires_grad_(), kind == "res-csc"
        parts = (tuple(twin.dictionaries), twin.norms, twin.scale, 1, shortcut)
        codes = reference.res_csc(y, *parts) if plain else twin(y)
        gradients = torch.autograd.grad(codes, [y, *twin.parameters()], grad.to(wide))
        found.append([codes.detach(), *gradients, *(b for b in twin.buffers() if b.dim())])
    # c has one gradient, of many products that cancel: the plain writing may be as exact as it likes.
    c, (ours, _, truth) = names.index("scale"), found
    torch.testing.assert_close(ours[c].double(), truth[c], rtol=1e-4, atol=1e-5 * grad.numel() ** 0.5)
    assert_as_exact_as_eager(*([t for i, t in enumerate(each) if i != c] for each in (*found, names)))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_of_res_csc_are_those_of_batch_norm(momentum):
    block = shaken(ResCSCBlock(16, 16))
    for norm in block.norms:
        norm.momentum, norm.eps = momentum, 0.1
    twin = copy.deepcopy(block)
    for _ in range(3):
        x = torch.randn(2, 16, 5, 4)
        block(x), reference.res_csc(x, tuple(twin.dictionaries), twin.norms, twin.scale)
    for name, value in block.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name])


def test_res_csc_is_composed_where_the_operator_does_not_serve():
    x = torch.randn(2, 16, 5, 4)
    blocks = [ResCSCBlock(16, 16, **kw) for kw in (dict(kind="resnet"), dict(iterations=2), dict(one_sided=False))]
    blocks += [ResCSCBlock(16, 16, 2), ResCSCBlock(16, 32), ResCSCBlock(16, 16).double(), ResCSCBlock(16, 16)]
    blocks[-1].norms[1] = nn.Identity()
    assert not any(block._is_one_operator(x) for block in blocks)
    block = shaken(ResCSCBlock(16, 16))
    assert block._is_one_operator(x) and not block._is_one_operator(x[:0]) and not block._is_one_operator(x.bfloat16())
    assert not block._is_one_operator(x[:1, :, :1, :1]) and block.eval()._is_one_operator(x[:1, :, :1, :1])
    with torch.autocast("cpu", torch.bfloat16):
        assert not block._is_one_operator(x)
    block.norms[1].train()
    assert not block._is_one_operator(x)
    torch.testing.assert_close(block(x), res_csc(block, x))


def test_res_csc_as_one_operator_in_any_layout_and_number_of_threads():
    block, results = shaken(ResCSCBlock(16, 16)), []
    x, threads = torch.randn(3, 16, 9, 8), torch.get_num_threads()
    views = [x, x.to(memory_format=torch.channels_last), torch.stack([x, x], -1)[..., 0]]
    try:
        for view, count in itertools.product(views, (1, 2, 3)):
            torch.set_num_threads(count)
            y = view.detach().requires_grad_()
            codes = block(y)
            results.append([codes, *torch.autograd.grad(codes.square().sum(), [y, *block.parameters()])])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_res_csc_against_differences(training):
    block = shaken(ResCSCBlock(16, 16, **FLOAT64)).train(training)
    names, parameters = zip(
        *((n, p.detach().clone().requires_grad_()) for n, p in block.named_parameters()), strict=True
    )

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(2, 16, 3, 4, **FLOAT64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)
    with pytest.raises(RuntimeError, match="second derivative of res_csc is not supported"):
        (grad,) = torch.autograd.grad(function(x, *parameters).square().sum(), x, create_graph=True)
        grad.sum().backward()


def test_torch_compile_of_res_csc():
    block, x = shaken(ResCSCBlock(16, 16)), torch.randn(2, 16, 6, 5)
    twin, results = copy.deepcopy(block), []
    for one, function in ((block, block), (twin, torch.compile(twin, fullgraph=True, backend="aot_eager"))):
        y = x.clone().requires_grad_()
        codes = function(y)
        results.append([codes, *torch.autograd.grad(codes.square().sum(), [y, *one.parameters()]), *one.buffers()])
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager)


@pytest.mark.parametrize(("kind", "limit"), [("res-csc", "resnet"), ("simplified", "plain")])
def test_res_csc_with_c_zero_is_resnet(kind, limit):
    block, other = (ResCSCBlock(3, 3, kind=k) for k in (kind, limit))
    other.load_state_dict({key: value for key, value in block.state_dict().items() if key != "scale"})
    x = torch.randn(2, 3, 6, 6)
    assert not torch.allclose(block(x), other(x))
    nn.init.zeros_(block.scale)
    torch.testing.assert_close(block(x), other(x))


# --- MSD-CSC ----------------------------------------------------------------------------------------------------------


def norms_of(block: MSDCSCBlock) -> list[list[nn.BatchNorm2d]]:
    """The batch norms of each pass, on the block's own parameters."""
    norms = []
    for p in range(1 + block.unfoldings):
        norms.append([nn.BatchNorm2d(len(layer.bias), dtype=layer.bias.dtype) for layer in block.layers])
        for norm, layer in zip(norms[p], block.layers, strict=True):
            norm.train(block.training)
            norm.weight, norm.bias = layer.norm_weight, layer.norm_bias
            norm.running_mean.copy_(layer.running_mean[p])
            norm.running_var.copy_(layer.running_var[p])
    return norms


def msd_csc(block: MSDCSCBlock, y: Tensor, norms) -> Tensor:
    names = ("dictionary", "scale", "bias")
    parameters = [[getattr(layer, name) for layer in block.layers] for name in names]
    fista = block.solver == "fista"
    return reference.msd_csc(y, *parameters, norms, block.dilations, block.unfoldings, fista, block.one_sided)


@pytest.mark.parametrize("one_sided", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("solver", ["ista", "fista"])
@pytest.mark.parametrize("unfoldings", [0, 1, 3])
def test_msd_csc_is_its_definition(unfoldings, solver, training, one_sided):
    """Also with slopes of batch norm below zero and at zero, and a dilation beyond the picture."""
    options = dict(in_channels=4, one_sided=one_sided, **FLOAT64)
    block = shaken(MSDCSCBlock(3, [1, 2, 1, 9], unfoldings, solver, **options)).train(training)
    with torch.no_grad():
        block.layers[1].norm_weight[:3] *= -1
        block.layers[2].norm_weight[1] = 0
    norms = norms_of(block)
    assert_same(block, lambda y: msd_csc(block, y, norms), torch.randn(3, 4, 7, 8, **FLOAT64), tolerance=1e-7)


@pytest.mark.parametrize("one_sided", [True, False])
def test_running_statistics_are_those_of_batch_norm_in_each_pass(one_sided):
    block = shaken(MSDCSCBlock(3, [1, 2], 2, one_sided=one_sided, **FLOAT64))
    norms, y = norms_of(block), torch.randn(3, 3, 6, 5, **FLOAT64)
    for _ in range(2):
        block(y), msd_csc(block, y, norms)
    for p, i in itertools.product(range(3), range(2)):
        torch.testing.assert_close(block.layers[i].running_mean[p], norms[p][i].running_mean)
        torch.testing.assert_close(block.layers[i].running_var[p], norms[p][i].running_var)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("keep_tape", [True, False])
def test_opcheck_of_msd_csc(training, keep_tape):
    block, passes = shaken(MSDCSCBlock(3, [1, 2], 1, "fista", in_channels=2)).train(training), 2
    filters = [layer.dictionary.detach() for layer in block.layers]
    codes = [torch.randn(sum(layer.bias.numel() for layer in block.layers)) for _ in range(3)]
    statistics = [torch.rand(passes, len(codes[0])) + 0.5 for _ in range(2)]
    y, rest = torch.randn(2, 2, 5, 6), (block.dilations, 1, True, training, 1e-5)
    arguments = (y, filters, torch.rand(2), *codes, *statistics, *rest)
    result, tape, *statistics = torch.ops.dsc_ops.msd_csc(*arguments, keep_tape)
    found = opcheck(torch.ops.dsc_ops.msd_csc.default, (*arguments, keep_tape))
    assert set(found.values()) == {"SUCCESS"}
    if keep_tape:
        backward = (torch.randn_like(result), tape, *arguments[:6], *statistics, *rest)
        assert set(opcheck(torch.ops.dsc_ops.msd_csc_backward.default, backward).values()) == {"SUCCESS"}


@pytest.mark.parametrize("learned", [True, False])
def test_thresholds_are_learned_or_fixed(learned):
    """All of a layer's thresholds and nothing else; a fixed one is in the state all the same."""
    layers = {
        CSCConv(2, 4, 3, lam=torch.full((4,), 0.1), learn_threshold=learned): ["lam"],
        MLCSC([nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 3)], learn_threshold=learned): ["layers.0.theta", "layers.1.theta"],
        ResCSCBlock(2, 4, learn_threshold=learned): ["norms.0.bias", "norms.1.bias"],
        MSDCSCBlock(3, [1], learn_threshold=learned): ["layers.0.bias", "layers.0.norm_bias"],
    }
    for layer, thresholds in layers.items():
        for name in thresholds:
            value = layer.state_dict(keep_vars=True)[name]
            assert value.shape == (len(value),) and len(value) > 1 and value.requires_grad == learned
        rest = [p for name, p in layer.named_parameters() if name not in thresholds]
        assert rest and all(p.requires_grad for p in rest)


def test_without_unfoldings_msd_csc_is_the_dense_network():
    """Where batch norm leaves codes as they are: y, then what each layer adds to all before."""
    block = MSDCSCBlock(2, [1, 2, 3], eps=0.0, **FLOAT64).eval()
    y = torch.rand(2, 2, 8, 8, **FLOAT64)
    x = y
    for layer, s in zip(block.layers, block.dilations, strict=True):
        x = torch.cat([x, torch.relu(nn.functional.conv2d(x, layer.dictionary, padding=s, dilation=s))], 1)
    torch.testing.assert_close(block(y), x)


def test_the_tape_is_smaller_than_the_codes_that_are_concatenated():
    block = MSDCSCBlock(12, [1] * 12, in_channels=16)
    atoms = [layer.dictionary for layer in block.layers]
    flat = torch.zeros(sum(len(layer.bias) for layer in block.layers))
    parts = _dilated.Block(atoms, torch.ones(12), flat, flat, flat, [1] * 12, 0, False, True, 1e-5, width=12, first=16)
    sizes = _dilated.Tape.sizes(parts, torch.Size([1, 16, 1, 1]), kept=True)
    assert sizes == [160]  # the codes have 1128 channels in all


def test_no_feature_map_is_concatenated():
    """As the profiler sees it: what is concatenated is smaller than the smallest map, the signal."""
    block, y = MSDCSCBlock(3, [1, 2, 1], 2), torch.randn(2, 3, 16, 16)
    norms, found = norms_of(block), []
    for function in (block, lambda y: msd_csc(block, y, norms)):
        with torch.profiler.profile(profile_memory=True) as profile:
            function(y).sum().backward()
        sizes = [event.cpu_memory_usage for event in profile.events() if event.name == "aten::cat"]
        found.append(sum(size >= y.nbytes for size in sizes))
    ours, published = found
    assert ours == 0 and published == 3 + 2 * 2 * 3  # each layer in each pass; D^T D x and D^T x in an unfolding


def test_chunks_of_samples_give_what_the_batch_gives(monkeypatch):
    """Of the convolutions as CUDA has them."""
    x, z, weight = (torch.randn(shape, **FLOAT64) for shape in ((5, 4, 6, 6), (5, 2, 6, 6), (2, 4, 3, 3)))
    results = []
    for size in (2**20, 1, 9 * 2 * 36 * 2):
        monkeypatch.setattr(_composed, "SHIFTED", size)
        features, images = torch.zeros_like(z), x.clone()
        _composed.dilated_convolution_(features, x, weight, 2, False, None)
        _composed.dilated_convolution_(images, z, weight, 2, True, images)
        results.append([features, images, _composed.dilated_correlation(x, z, 2)])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


# --- as modules -------------------------------------------------------------------------------------------------------

MODULES = {
    "CSCConv": lambda **kw: CSCConv(2, 5, 3, 3, lam=0.02, **kw),
    "CSCConv-learned": lambda **kw: CSCConv(2, 5, 4, 2, stride=2, solver="ista", learn_threshold=True, **kw),
    "MLCSC-ml-fista": lambda **kw: MLCSC([nn.Conv2d(2, 4, 3, 2, 1, **kw), nn.Conv2d(4, 5, 3, **kw)], "ml-fista", 2),
    "MLCSC-ml-lista": lambda **kw: MLCSC([nn.Conv2d(2, 4, 3, **kw)], "ml-lista", 1, one_sided=False),
    "MLCSC-layered-ista": lambda **kw: MLCSC([nn.Conv2d(2, 4, 3, **kw)], "layered-ista", 2),
    "ResCSCBlock": lambda **kw: ResCSCBlock(2, 4, 2, **kw),
    "ResCSCBlock-steps": lambda **kw: ResCSCBlock(2, 4, iterations=3, solver="fista", one_sided=False, **kw),
    "MSDCSCBlock": lambda **kw: MSDCSCBlock(3, [1, 2], 2, "fista", in_channels=2, **kw),
    "MSDCSCBlock-signs": lambda **kw: MSDCSCBlock(3, [1, 2], 3, "fista", in_channels=2, one_sided=False, **kw),
}
module = pytest.mark.parametrize("name", MODULES)


@module
def test_gradients_against_differences(name):
    layer = shaken(MODULES[name](**FLOAT64)).eval()
    names, parameters = zip(*((n, p.detach()) for n, p in layer.named_parameters()), strict=True)

    def function(y: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (y,))

    y = torch.randn(1, 2, 6, 5, **FLOAT64)
    inputs = [t.clone().requires_grad_() for t in (y, *parameters)]
    torch.autograd.gradcheck(function, inputs, fast_mode=True)


@module
def test_copies_and_states(name):
    layer, y = shaken(MODULES[name]()).eval(), torch.randn(2, 2, 8, 8)
    codes = layer(y)
    twin, other = copy.deepcopy(layer), MODULES[name]().eval()
    assert torch.equal(twin(y), codes) and not torch.equal(other(y), codes)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(y), codes)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert torch.equal(layer(y), codes)
    twin.reset_parameters()
    assert twin(y).isfinite().all()


@module
@pytest.mark.parametrize("training", [True, False])
def test_torch_compile(name, training):
    """One graph, forward and backward, with the results and the buffers of the layer as it is."""
    layer, y = shaken(MODULES[name]()).train(training), torch.randn(3, 2, 8, 8)
    if name.startswith("CSCConv"):
        layer.find_step()
    twin, results = copy.deepcopy(layer), []
    for one, function in ((layer, layer), (twin, torch.compile(twin, fullgraph=True, backend="aot_eager"))):
        leaves = [y.clone().requires_grad_(), *one.parameters()]
        codes = function(leaves[0])
        results.append([codes, *torch.autograd.grad(codes.square().sum(), leaves), *one.buffers()])
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-3, atol=1e-3)


@module
def test_autocast(name):
    layer, y = MODULES[name](), torch.randn(3, 2, 8, 8)
    expected = layer(y).detach()
    with torch.autocast("cpu", torch.bfloat16):
        codes = layer(y)
        codes.float().square().sum().backward()
    # The shortcut keeps the dtype of the input, as in ResNet.
    assert codes.dtype == (torch.float32 if name.startswith("ResCSCBlock") else torch.bfloat16)
    assert (codes - expected).norm() < 0.05 * expected.norm()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


@module
def test_meta_device_and_dtypes(name):
    layer = MODULES[name](device="meta")
    assert layer(torch.empty(2, 2, 8, 8, device="meta")).is_meta
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    y = torch.randn(2, 2, 8, 8)
    assert layer(y).isfinite().all()
    assert layer.bfloat16()(y.bfloat16()).dtype == torch.bfloat16
    assert layer(y[:0].bfloat16()).shape[0] == 0 and all(b.isfinite().all() for b in layer.buffers())


# --- convert ----------------------------------------------------------------------------------------------------------


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(4, 4, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(-self.conv(x))


def test_convert_takes_pairs_and_lists_what_it_leaves():
    relu, shared = nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)
    frozen = nn.Conv2d(2, 4, 3, 2, padding=1).requires_grad_(False)
    model = nn.Sequential(
        nn.Sequential(frozen, relu, nn.Conv2d(4, 4, 3, groups=2, bias=False), relu),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), relu, shared, relu, shared, relu),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU()),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.ReLU(),
        Other(), nn.Flatten(2), nn.Conv1d(4, 3, 2), nn.ReLU(),
    ).eval()  # fmt: skip
    y = torch.randn(2, 2, 12, 11)
    expected = model(y)
    result = csc.convert(model)
    assert result.converted == ["7", "0.0", "0.2"]
    assert {name: reason.split(",")[0] for name, reason in result.left.items()} == {
        "1.0": "no nn.ReLU follows it in an nn.Sequential",
        "1.3": "it",
        "1.5": "it",
        "2.0": "its padding_mode is 'reflect'",
        "3": "it has parametrizations or hooks",
        "5.conv": "no nn.ReLU follows it in an nn.Sequential",
    }
    torch.testing.assert_close(model(y), expected)
    layer = model[0][0]
    assert isinstance(layer, ConvSoftThreshold) and not layer.weight.requires_grad and not layer.training
    assert (layer.theta == 0).all() and isinstance(model[0][1], nn.Identity)


def test_convert_follows_the_pattern():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()))
    assert csc.convert(model, "2.*") == csc.Conversion(["2.0"], {})
    assert csc.convert(model, "nothing") == csc.Conversion([], {})


# --- robust inference -------------------------------------------------------------------------------------------------


class Threshold(nn.Module):
    """A classifier that is right where lam is near what the noise asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = CSCConv(1, 2, 3, lam=0.1)

    def forward(self, y: Tensor) -> Tensor:
        self.codes(y)
        right = (self.codes.lam - y.flatten(1).std(dim=1) / 10).abs() < 0.051
        return torch.stack([~right, right], 1).float()


def test_the_relation_is_the_line_through_the_best_lambdas_and_holds_within_them():
    model, loader = Threshold(), [(torch.randn(4, 1, 32, 32), torch.ones(4, dtype=torch.long))]
    levels, lambdas = [1.0, 3.0, 5.0], [0.1, 0.2, 0.3, 0.4, 0.5]
    relation = csc.fit_lambda(model, loader, lambda y, level: y * level, levels, lambdas)
    assert relation.best == (0.1, 0.3, 0.5) and model.training and model.codes.lam == 0.1
    assert relation.accuracies[1] == (0, 0, 1, 0, 0) and list(relation.residuals) == sorted(relation.residuals)
    for residual, best in zip(relation.residuals, relation.best, strict=True):
        assert relation(residual) == pytest.approx(best, abs=0.02)
    assert relation(1e9) == 0.5 and relation(-1e9) == 0.1
    with pytest.raises(KeyError), csc.adapted_lambda(model, [4 * loader[0][0]], relation) as lam:
        assert lam == pytest.approx(0.4, abs=0.03) and model.codes.lam == pytest.approx(lam)
        raise KeyError
    assert model.codes.lam == 0.1 and model.training


# --- messages ---------------------------------------------------------------------------------------------------------

Y = torch.zeros(1, 2, 8, 8)
LOADER = [(Y, torch.zeros(1, dtype=torch.long))]
MODEL = nn.Sequential(CSCConv(2, 3, 3), nn.Flatten())


def keep(y: Tensor, level: float) -> Tensor:
    return y


MESSAGES = [
    (lambda: CSCConv(2, 3, 3, solver="admm"), ValueError, "CSCConv: solver is 'admm', it takes one of ista, fista"),
    (lambda: CSCConv(2, 3, 3, lam="a"), TypeError, "CSCConv: lam must be a number, got str"),
    (
        lambda: CSCConv(2, 3, 3, lam=torch.ones(2)),
        ValueError,
        "CSCConv: lam has shape (2,), it takes a number or shape (3,)",
    ),
    (
        lambda: setattr(MODEL[0], "lam", torch.ones(3)),
        ValueError,
        "CSCConv: lam has shape (3,), it takes a number or shape ()",
    ),
    (
        lambda: CSCConv.from_dictionary(torch.ones(3, 2, 3)),
        ValueError,
        "CSCConv.from_dictionary: dictionary has shape (3, 2, 3), it takes (M, C, kh, kw)",
    ),
    (
        lambda: MLCSC([nn.Conv2d(1, 1, 1)], "ista"),
        ValueError,
        "MLCSC: method is 'ista', it takes one of layered-thresholding,",
    ),
    (
        lambda: MLCSC([nn.Conv2d(1, 1, 1)], "layered-thresholding", 1),
        ValueError,
        "MLCSC: unfoldings is 1, layered-thresholding takes 0",
    ),
    (lambda: MLCSC([]), TypeError, "MLCSC: layers must be a sequence of at least one convolution, got []"),
    (
        lambda: MLCSC([nn.Linear(1, 1)]),
        TypeError,
        "MLCSC: layers has a Linear, it takes nn.Conv2d or ConvSoftThreshold",
    ),
    (
        lambda: MLCSC([nn.Conv2d(1, 2, 1), nn.Conv2d(3, 1, 1)]),
        ValueError,
        "MLCSC: layers[0] has 2 code channels, layers[1] takes 3",
    ),
    (lambda: ResCSCBlock(2, 2, kind="dense"), ValueError, "ResCSCBlock: kind is 'dense', it takes one of res-csc,"),
    (lambda: ResCSCBlock(3, 2), ValueError, "ResCSCBlock: code_channels is 2, it takes at least in_channels = 3"),
    (
        lambda: ResCSCBlock(2, 2, solver="admm"),
        ValueError,
        "ResCSCBlock: solver is 'admm', it takes one of ista, fista",
    ),
    (
        lambda: ResCSCBlock(2, 2, iterations=0),
        ValueError,
        "ResCSCBlock: iterations is 0, it takes an integer of at least 1",
    ),
    (
        lambda: ResCSCBlock(2, 2, kind="plain", iterations=2),
        ValueError,
        "ResCSCBlock: iterations is 2, kind 'plain' takes 1",
    ),
    (lambda: ResCSCBlock(3, 3)(Y), ValueError, "ResCSCBlock: x has shape (1, 2, 8, 8), it takes (N, 3, H, W)"),
    (lambda: MSDCSCBlock(2, 3), TypeError, "MSDCSCBlock: dilations must be a sequence of at least one integer, got 3"),
    (
        lambda: MSDCSCBlock(2, [1], solver="admm"),
        ValueError,
        "MSDCSCBlock: solver is 'admm', it takes one of ista, fista",
    ),
    (lambda: MSDCSCBlock(3, [1])(Y), ValueError, "MSDCSCBlock: y has shape (1, 2, 8, 8), it takes (N, 3, H, W)"),
    (
        lambda: MSDCSCBlock(2, [1])(Y[..., :1, :1]),
        ValueError,
        "MSDCSCBlock: y has shape (1, 2, 1, 1), training takes more than one value",
    ),
    (lambda: csc.convert([]), TypeError, "convert: model must be an nn.Module, got list"),
    (
        lambda: csc.fit_lambda([], LOADER, keep, [1, 2], [1]),
        TypeError,
        "fit_lambda: model must be an nn.Module, got list",
    ),
    (lambda: csc.fit_lambda(nn.ReLU(), LOADER, keep, [1, 2], [1]), ValueError, "fit_lambda: model has no CSCConv"),
    (
        lambda: csc.fit_lambda(MODEL, LOADER, keep, [1], [1]),
        ValueError,
        "fit_lambda: levels has 1, lambdas 1; it takes at least 2 and 1",
    ),
    (lambda: csc.fit_lambda(MODEL, [], keep, [1, 2], [1]), ValueError, "fit_lambda: loader has no images"),
    (
        lambda: csc.fit_lambda(MODEL, LOADER, keep, [1, 2], [1]),
        ValueError,
        "fit_lambda: the residual is 0.0 at all levels",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), MESSAGES, ids=[message for *_, message in MESSAGES])
def test_message(call, kind, message):
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind and str(caught.value).startswith(message)
