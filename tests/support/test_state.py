"""State dicts, files (also of earlier versions), copies, dtypes, memory formats, parametrizations: as any nn.Module."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import state_files
import torch
from network import Network, assert_same, gradients, images
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from dsc_ops import ConvSoftThreshold, LISTAConv, LISTAConv1d, LISTALinear, UnitNormAtoms


def saved_and_loaded(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.supports("state", "state files of earlier versions load strictly and give the codes they gave")
@pytest.mark.parametrize("path", sorted(state_files.STATES.glob("*.pt")), ids=lambda path: path.stem)
def test_files_of_earlier_versions(path):
    saved = torch.load(path, weights_only=True)
    assert saved
    for name, entry in saved.items():
        layer = state_files.LAYERS[name]()
        layer.load_state_dict(entry["state"], strict=True)
        torch.testing.assert_close(layer(entry["y"]), entry["codes"], msg=lambda text, name=name: f"{name}: {text}")


def test_there_is_a_file_of_an_earlier_version():
    assert list(state_files.STATES.glob("*.pt"))


@pytest.mark.supports(
    "state", "`torch.save`, `torch.load(weights_only=True)`, strict round trip of a network; its optimizer goes on"
)
def test_training_goes_on_from_a_file():
    """Interrupted and continued is uninterrupted."""
    y = images()

    def made():
        torch.manual_seed(3)
        model = Network()
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    def train(model, optimizer):
        for _ in range(2):
            optimizer.zero_grad()
            model(y).square().sum().backward()
            optimizer.step()

    model, optimizer = made()
    train(model, optimizer)
    state = saved_and_loaded(dict(model=model.state_dict(), optimizer=optimizer.state_dict()), weights_only=True)
    train(model, optimizer)
    other, its_optimizer = made()
    other.load_state_dict(state["model"], strict=True)
    its_optimizer.load_state_dict(state["optimizer"])
    train(other, its_optimizer)
    assert_same(other.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_assigned_and_mapped_states(tmp_path):
    """load_state_dict(assign=True) on the meta device, from a file that is mapped into memory."""
    model = Network()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    with torch.device("meta"):
        other = Network()
    other.load_state_dict(torch.load(tmp_path / "state.pt", mmap=True, weights_only=True), assign=True)
    y = images()
    assert torch.equal(other(y), model(y))


@pytest.mark.supports("state", "states of wrapped models (`module.`, `_orig_mod.`) load once their prefix is taken off")
def test_states_of_wrapped_models():
    model, other = Network(), Network()
    consume = nn.modules.utils.consume_prefix_in_state_dict_if_present
    for wrapped, prefix in ((nn.DataParallel(model), "module."), (torch.compile(model), "_orig_mod.")):
        state = wrapped.state_dict()
        assert all(key.startswith(prefix) for key in state)
        consume(state, prefix)
        other.load_state_dict(state, strict=True)
        y = images()
        assert torch.equal(other(y), model(y))


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.supports("state", "`deepcopy`, `pickle`, whole models in files")
@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: saved_and_loaded(model, weights_only=False),
        lambda model: torch.optim.swa_utils.AveragedModel(model).module,
    ],
    ids=["deepcopy", "pickle", "file", "averaged"],
)
def test_copies_of_networks(copied):
    model, y = Network(), images()
    model(y).sum().backward()
    twin = copied(model)
    assert torch.equal(twin(y), model(y))
    with torch.no_grad():
        twin.codes.theta.add_(1)
    assert not torch.equal(twin(y), model(y))


# --- dtypes and memory formats ----------------------------------------------------------------------------------------


@pytest.mark.supports("state", "`.to()`, `.half()`, `.bfloat16()`, `.double()` on networks")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_every_dtype(dtype):
    model, y = Network(), images()
    expected = model(y)
    converted = {torch.float16: model.half, torch.bfloat16: model.bfloat16, torch.float64: model.double}[dtype]()
    got = converted(y.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, rtol=0.1, atol=0.05)
    assert all(g.dtype == dtype and g.isfinite().all() for g in gradients(model, got.sum()).values())
    back = model.to(torch.float32)
    torch.testing.assert_close(back(y), expected, rtol=0.1, atol=0.05)


@pytest.mark.supports("state", "`model.to(memory_format=torch.channels_last)`; gradients have the parameters' strides")
def test_channels_last_models():
    model, y = Network(), images()
    expected, slopes = model(y), gradients(model, model(y).square().sum())
    model = model.to(memory_format=torch.channels_last)
    got = model(y.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(got, expected)
    got.square().sum().backward()
    assert_same({name: p.grad for name, p in model.named_parameters()}, slopes)
    for name, parameter in model.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), name
    each = model.codes.analysis.unbind()  # one weight an iteration
    weights = [model.first.weight, model.codes.dictionary, *each]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    state = saved_and_loaded(model.state_dict(), weights_only=True)
    Network().load_state_dict(state, strict=True)
    assert torch.equal(model.to(memory_format=torch.contiguous_format)(y), Network.forward(model, y))


@pytest.mark.parametrize("make", [lambda: LISTAConv(2, 3, 3), lambda: LISTAConv1d(2, 3, 3), lambda: LISTALinear(2, 3)])
def test_what_is_done_to_all_parameters_keeps_their_shapes(make):
    layer = make()
    shapes = {name: p.shape for name, p in layer.named_parameters()}
    for change in (nn.Module.double, nn.Module.share_memory, lambda m: m.to_empty(device="meta")):
        change(layer)
        assert {name: p.shape for name, p in layer.named_parameters()} == shapes
        assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in layer.parameters())


# --- parametrizations -------------------------------------------------------------------------------------------------

WEIGHTS = {
    "LISTAConv.dictionary": (lambda: LISTAConv(2, 4, 3, 2, theta=0.02), "dictionary", False),
    "LISTAConv.analysis": (lambda: LISTAConv(2, 4, 3, 2, theta=0.02), "analysis", True),
    "LISTAConv-tied.analysis": (lambda: LISTAConv(2, 4, 3, 2, theta=0.02, untied=False), "analysis", False),
    "LISTAConv1d.analysis": (lambda: LISTAConv1d(2, 4, 3, 2, theta=0.02), "analysis", True),
    "LISTALinear.dictionary": (lambda: LISTALinear(7, 4, theta=0.02), "dictionary", False),
    "LISTALinear.analysis": (lambda: LISTALinear(7, 4, theta=0.02), "analysis", True),
    "ConvSoftThreshold.weight": (lambda: ConvSoftThreshold(2, 4, 3, theta=0.02), "weight", False),
}
over_weights = pytest.mark.parametrize(("make", "name", "stacked"), WEIGHTS.values(), ids=WEIGHTS.keys())


def signal_for(layer: nn.Module) -> torch.Tensor:
    return torch.randn(2, 2, 7) if "1d" in type(layer).__name__ else images()


@pytest.mark.supports("state", "`weight_norm`, `spectral_norm` and other parametrizations of every weight")
@over_weights
@pytest.mark.parametrize("parametrization", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrizations_of_pytorch(parametrization, make, name, stacked):
    layer = make()
    y, before = signal_for(layer), layer(signal_for(layer))
    parametrization(layer, name)
    codes = layer(y)
    assert codes.shape == before.shape
    slopes = gradients(layer, codes.square().sum())
    assert all(g.isfinite().all() for g in slopes.values())
    assert any(key.startswith(f"parametrizations.{name}") and g.abs().sum() > 0 for key, g in slopes.items())
    other = make()
    parametrization(other, name)
    other.load_state_dict(layer.state_dict(), strict=True)
    other.eval(), layer.eval()
    assert torch.equal(other(y), layer(y))
    parametrize.remove_parametrizations(layer, name)
    assert torch.equal(other(y), layer(y)) and set(layer.state_dict()) == set(make().state_dict())


def norms(weight: torch.Tensor, stacked: bool) -> torch.Tensor:
    return weight.detach().flatten(2 if stacked else 1).norm(dim=-1)


@pytest.mark.supports("state", "`UnitNormAtoms`, a parametrization that keeps atoms at unit norm through training")
@over_weights
def test_unit_norm_atoms_stay_so_in_training(make, name, stacked):
    layer = make()
    y = signal_for(layer)
    parametrize.register_parametrization(layer, name, UnitNormAtoms(stacked=stacked))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    first = getattr(layer, name).detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        layer(y).square().sum().backward()
        optimizer.step()
    weight = getattr(layer, name)
    torch.testing.assert_close(norms(weight, stacked), torch.ones(weight.shape[: 2 if stacked else 1]))
    assert not torch.allclose(weight, first)
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(twin(y), layer(y))
    other = make()
    parametrize.register_parametrization(other, name, UnitNormAtoms(stacked=stacked))
    other.load_state_dict(saved_and_loaded(layer.state_dict(), weights_only=True), strict=True)
    assert torch.equal(other(y), layer(y))
    parametrize.remove_parametrizations(layer, name)
    torch.testing.assert_close(layer(y), other(y))


def test_unit_norm_atoms_are_assigned_by_way_of_the_inverse():
    layer, atoms = LISTAConv(1, 4, 3), torch.randn(4, 1, 3, 3)
    parametrize.register_parametrization(layer, "dictionary", UnitNormAtoms())
    unit = atoms / atoms.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    for assigned in (unit, 7 * atoms):
        layer.dictionary = assigned
        torch.testing.assert_close(layer.dictionary.detach(), unit)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_gradient_of_unit_norm_atoms(scale):
    weight = (scale * torch.randn(3, 2, 4, dtype=torch.float64)).requires_grad_()
    for stacked in (False, True):
        assert torch.autograd.gradcheck(UnitNormAtoms(stacked=stacked), (weight,), eps=1e-6 * scale, atol=1e-5 / scale)
    small = (scale * torch.randn(3, 2, 4)).requires_grad_()  # float32, in which the squares are 0 or infinite
    torch.testing.assert_close(norms(UnitNormAtoms()(small), False), torch.ones(3))
    assert torch.autograd.grad(UnitNormAtoms()(small).square().sum(), small)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_an_atom_of_zeros_has_a_gradient_without_nan(dtype):
    weight = torch.randn(3, 2, 4, dtype=dtype)
    weight[1] = 0
    weight.requires_grad_()
    atoms = UnitNormAtoms()(weight)
    incoming = torch.randn_like(atoms)
    (slope,) = torch.autograd.grad(atoms, weight, incoming)
    assert atoms.dtype == dtype and (atoms[1] == 0).all() and slope.isfinite().all()
    assert torch.equal(slope[1], incoming[1])  # so that a step of an optimizer takes it away from zero
    torch.testing.assert_close((slope[0] * weight[0]).sum().float(), torch.zeros(()), atol=0.05, rtol=0)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight

    def right_inverse(self, weight):
        return weight / 2


@pytest.mark.parametrize("parametrization", [None, UnitNormAtoms(), Doubled()])
def test_a_parametrized_layer_can_be_reset(parametrization):
    layer = LISTAConv(2, 4, 3, 2)
    if parametrization is not None:
        parametrize.register_parametrization(layer, "dictionary", parametrization)
        parametrize.register_parametrization(layer, "analysis", Doubled())
    before = layer.dictionary.detach().clone()
    with torch.no_grad():
        layer.theta.fill_(9)
    layer.reset_parameters()
    assert not torch.allclose(layer.dictionary, before) and (layer.theta == 0.1).all()
    torch.testing.assert_close(norms(layer.dictionary, False), torch.ones(4))
    torch.testing.assert_close(layer.analysis, (layer.dictionary / layer.lipschitz()).expand(2, -1, -1, -1, -1))


# --- states that do not fit -------------------------------------------------------------------------------------------


def damaged(state: dict) -> dict[str, tuple[dict, str]]:
    """Name: (a state that does not fit, what the message names)."""
    return {
        "another number of iterations": (state | dict(theta=torch.ones(3, 4)), "theta"),
        "another kernel": (state | dict(analysis=state["analysis"][..., :2]), "analysis"),
        "transposed": (state | dict(theta=state["theta"].T), "theta"),
        "no tensor": (state | dict(theta=[0.1]), "theta"),
    }


@pytest.mark.supports(
    "faults", "a state with a tensor that does not fit is refused whole: the layer keeps all its values"
)
@pytest.mark.parametrize("defect", damaged(LISTAConv(1, 4, 3, 2).state_dict()))
def test_states_that_do_not_fit_leave_the_layer_as_it_was(defect):
    layer = LISTAConv(1, 4, 3, 2)
    before, parameters = copy.deepcopy(layer.state_dict()), list(layer.parameters())
    state, named = damaged(LISTAConv(1, 4, 3, 2).state_dict())[defect]
    for assign in (False, True):
        with pytest.raises(RuntimeError, match=re.escape(named)):
            layer.load_state_dict(state, strict=True, assign=assign)
    assert all(a is b for a, b in zip(parameters, layer.parameters(), strict=True))
    assert_same(layer.state_dict(), before, rtol=0, atol=0)


def test_missing_and_unknown_keys_are_named():
    layer = LISTAConv(1, 4, 3, 2)
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "lambda"'):
        layer.load_state_dict(state | {"lambda": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "theta"'):
        layer.load_state_dict({name: value for name, value in state.items() if name != "theta"})


def test_a_state_that_is_loaded_in_part_on_purpose():
    """strict=False takes what is there, as with every module."""
    layer, other = LISTAConv(1, 4, 3, 2), LISTAConv(1, 4, 3, 2)
    layer.load_state_dict(dict(dictionary=other.dictionary), strict=False)
    assert torch.equal(layer.dictionary, other.dictionary) and not torch.equal(layer.analysis, other.analysis)
