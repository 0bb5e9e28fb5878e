"""SparsityPenalty: eager PyTorch's value and gradient, in every way a model is run, and no feature kept too long."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import weakref

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dsc_ops import SparsityPenalty, functional

GAMMA = 0.3


class Network(nn.Module):
    """Two blocks, on images (N, 2, 6, 6); layers to penalise are block1.act and block2.act, of 180 and 72 values."""

    def __init__(self, checkpointed: bool = False):
        super().__init__()
        self.block1 = nn.ModuleDict(dict(conv=nn.Conv2d(2, 5, 3, padding=1), act=nn.ReLU()))
        self.block2 = nn.ModuleDict(dict(conv=nn.Conv2d(5, 8, 3, 2, padding=1), act=nn.Tanh()))
        self.head = nn.Linear(72, 3)
        self.checkpointed = checkpointed

    def blocks(self, y: Tensor) -> Tensor:
        for block in (self.block1, self.block2):
            # A last operation after the layer, so that a checkpoint's recomputation gets as far as the layer.
            y = 2 * block["act"](block["conv"](y))
        return y

    def forward(self, y: Tensor) -> Tensor:
        y = checkpoint(self.blocks, y, use_reentrant=False) if self.checkpointed else self.blocks(y)
        return self.head(y.flatten(1))

    def features(self, y: Tensor) -> list[Tensor]:
        """The outputs of the two layers, computed past the modules and their hooks."""
        conv1, conv2 = self.block1["conv"], self.block2["conv"]
        first = torch.relu(nn.functional.conv2d(y, conv1.weight, conv1.bias, padding=1))
        return [first, torch.tanh(nn.functional.conv2d(2 * first, conv2.weight, conv2.bias, stride=2, padding=1))]


LAYERS = ["block1.act", "block2.act"]


def eager_penalty(features: list[Tensor], weights: list[float] | None = None) -> Tensor:
    """The definition, sample by sample."""
    total = 0.0
    for j, x in enumerate(features):
        weight = weights[j] if weights else 1 / x[0].numel()
        total = total + sum(weight * sample.abs().sum() for sample in x.float().unbind()) / len(x)
    return GAMMA * total


def gradients(model: nn.Module, value: Tensor) -> list[Tensor]:
    parameters = list(model.parameters())
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def assert_same(first: list[Tensor], second: list[Tensor], **tolerances) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, **tolerances)


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 2, 6, 6)


# --- value and gradient -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, [2.0, 0.25], [0, 1]])
def test_value_and_gradient_are_those_of_eager(weights):
    model, y = Network(), images()
    expected = eager_penalty(model.features(y), weights)
    penalty = SparsityPenalty(model, LAYERS, GAMMA, weights=weights)
    model(y)
    value = penalty()
    assert value.shape == () and value.dtype == torch.float32
    torch.testing.assert_close(value, expected)
    assert_same(gradients(model, value), gradients(model, expected))
    assert any(g.abs().sum() > 0 for g in gradients(model, eager_penalty(model.features(y), weights)))


def test_a_training_step_with_the_penalty_adds_its_gradient():
    model, y = Network(), images()
    alone = gradients(model, model(y).square().sum())
    extra = gradients(model, eager_penalty(model.features(y)))
    with SparsityPenalty(model, LAYERS, GAMMA) as penalty:
        (model(y).square().sum() + penalty()).backward()
    assert_same([p.grad for p in model.parameters()], [a + b for a, b in zip(alone, extra, strict=True)])


def test_the_default_weights_do_not_depend_on_batch_or_size():
    """Every value 1: the mean over batch and values is 1 for each layer."""
    model = nn.Sequential(nn.Identity(), nn.Flatten())
    penalty = SparsityPenalty(model, ["0", "1"], 1.0)
    for shape in ((1, 3), (5, 2, 7), (2, 3, 4, 5)):
        model(-torch.ones(shape))
        assert penalty().item() == pytest.approx(2.0)


def test_penalty_lowers_density_in_training():
    y, target = images(8), torch.randn(8, 3)
    densities = []
    for gamma in (0.0, 10.0):
        torch.manual_seed(1)
        model = Network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        penalty = SparsityPenalty(model, "block1.act", gamma)
        for _ in range(20):
            optimizer.zero_grad()
            (nn.functional.mse_loss(model(y), target) + penalty()).backward()
            optimizer.step()
        densities.append(penalty.density()["block1.act"])
    assert densities[1] < 0.5 * densities[0]


def test_a_layer_called_more_than_once_counts_with_each_output():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.act = nn.Linear(4, 4), nn.ReLU()

        def forward(self, x):
            return self.act(self.linear(self.act(self.linear(x))))

    model, x = Twice(), torch.randn(3, 4)
    first = torch.relu(model.linear(x))
    second = torch.relu(model.linear(first))
    expected = eager_penalty([first, second], [2.0, 2.0])
    penalty = SparsityPenalty(model, "act", GAMMA, weights=[2.0])
    model(x)
    value = penalty()
    torch.testing.assert_close(value, expected)
    assert_same(gradients(model, value), gradients(model, expected))
    assert penalty.density()["act"] == pytest.approx(functional.density(torch.stack([first, second])).item())


def test_an_empty_batch_costs_nothing():
    model = Network()
    penalty = SparsityPenalty(model, LAYERS, GAMMA)
    model(images(0))
    value = penalty()
    assert value == 0
    assert all((g == 0).all() for g in gradients(model, value))
    assert penalty.density() == {"block1.act": 0.0, "block2.act": 0.0}


# --- which layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("block1.act", ["block1.act"]),
        (["block2.act", "block1.act"], ["block2.act", "block1.act"]),
        ("*.act", ["block1.act", "block2.act"]),
        (["block2.*", "block?.act"], ["block2.conv", "block2.act", "block1.act"]),
        (("block[12].conv",), ["block1.conv", "block2.conv"]),
        (["block1.act", "block1.act", "*1.act"], ["block1.act"]),
        ("*", ["block1", "block1.conv", "block1.act", "block2", "block2.conv", "block2.act", "head"]),
    ],
)
def test_names_and_patterns(layers, names):
    assert SparsityPenalty(Network(), layers, GAMMA).names == names


def test_modules_in_place_of_names():
    model = Network()
    for layers in (model.block2["act"], [model.block2["act"]]):
        assert SparsityPenalty(model, layers, GAMMA).names == ["block2.act"]
    mixed = [model.block2["act"], "block1.act", model.block1["act"]]
    assert SparsityPenalty(model, mixed, GAMMA).names == ["block2.act", "block1.act"]


def test_weights_follow_the_order_of_layers():
    model, y = Network(), images()
    first, second = model.features(y)
    penalty = SparsityPenalty(model, ["block2.act", "block1.act"], GAMMA, weights=[3.0, 5.0])
    model(y)
    torch.testing.assert_close(penalty(), eager_penalty([second, first], [3.0, 5.0]))
    assert list(penalty.density()) == ["block1.act", "block2.act"]


def test_an_unknown_name_is_told_the_names_there_are():
    with pytest.raises(ValueError, match="'block3.act'.*there are: block1, block1.conv, block1.act, block2, .*, head$"):
        SparsityPenalty(Network(), ["block1.act", "block3.act"], GAMMA)


def test_a_layer_that_returns_no_tensor_is_refused_by_name():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent = nn.LSTM(3, 4)

        def forward(self, x):
            return self.recurrent(x)[0]

    model = Model()
    with SparsityPenalty(model, "recurrent", GAMMA), pytest.raises(TypeError, match="'recurrent' returned tuple"):
        model(torch.zeros(2, 1, 3))


# --- the life of the features -----------------------------------------------------------------------------------------


def watch(model: nn.Module, name: str) -> list[weakref.ref]:
    """Weak references to what a layer returns from now on."""
    seen = []
    model.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(weakref.ref(output)))
    return seen


def alive(references: list[weakref.ref]) -> list[bool]:
    gc.collect()
    return [reference() is not None for reference in references]


@pytest.mark.supports("memory", "the penalty's features are given up after the step, and hooks can be taken off")
def test_features_die_with_the_graph_after_the_penalty():
    model = Network()
    seen = watch(model, "block1.act")
    penalty = SparsityPenalty(model, LAYERS, GAMMA)
    loss = model(images()).sum() + penalty()
    loss.backward()
    del loss
    assert alive(seen) == [False]


def test_a_forward_pass_replaces_the_features_of_the_one_before():
    model, y = Network(), images()
    seen = watch(model, "block1.act")
    penalty = SparsityPenalty(model, LAYERS, GAMMA)
    model(images())
    model(y)
    assert alive(seen) == [False, True]
    torch.testing.assert_close(penalty(), eager_penalty(model.features(y)))


def test_the_penalty_of_one_forward_pass_is_given_once():
    model = Network()
    penalty = SparsityPenalty(model, LAYERS, GAMMA)
    with pytest.raises(RuntimeError, match="no forward pass"):
        penalty()
    model(images())
    penalty()
    with pytest.raises(RuntimeError, match="no forward pass.*block1.act, block2.act"):
        penalty()
    model(images())
    penalty()


def test_a_forward_pass_that_fails_leaves_nothing_for_the_next():
    model, y = Network(), images()
    penalty = SparsityPenalty(model, LAYERS, GAMMA)
    with pytest.raises(RuntimeError):
        model(images()[..., :4])  # the head refuses its size, after both blocks
    model(y)
    torch.testing.assert_close(penalty(), eager_penalty(model.features(y)))


@pytest.mark.parametrize("how", ["remove", "context", "exception"])
def test_removal_takes_every_hook_off(how):
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    model = Network()
    seen = watch(model, "block1.act")
    before = hooks()
    penalty = SparsityPenalty(model, LAYERS, GAMMA)
    assert hooks() == before + 3
    if how == "remove":
        model(images())
        penalty.remove()
        penalty.remove()
    elif how == "context":
        with penalty as entered:
            assert entered is penalty
            model(images())
    else:
        with pytest.raises(KeyError), penalty:
            model(images())
            raise KeyError
    assert hooks() == before
    assert alive(seen) == [False]
    model(images())
    with pytest.raises(RuntimeError, match="no forward pass"):
        penalty()


# --- density ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1e-6, 0.3])
def test_density_is_that_of_each_layer(alpha):
    model, y = Network(), images()
    expected = dict(zip(LAYERS, (functional.density(x, alpha).item() for x in model.features(y)), strict=True))
    assert len(set(expected.values())) == 2
    penalty = SparsityPenalty(model, LAYERS, GAMMA, alpha=alpha)
    model(y)
    assert penalty.density() == pytest.approx(expected)  # before the penalty is asked for
    assert penalty.density() == pytest.approx(expected)
    model(y)
    penalty()
    assert penalty.density() == pytest.approx(expected)  # and after
    model.eval()
    y = images()
    expected = dict(zip(LAYERS, (functional.density(x, alpha).item() for x in model.features(y)), strict=True))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            model(y)
        assert penalty.density() == pytest.approx(expected)
        assert not penalty._features.outputs


# --- ways to run a model ----------------------------------------------------------------------------------------------


def test_autocast():
    model, y = Network(), images()
    penalty = SparsityPenalty(model, LAYERS, GAMMA)
    with torch.autocast("cpu", torch.bfloat16):
        features = model.features(y)
        assert features[0].dtype == torch.bfloat16
        expected = eager_penalty(features)
        model(y)
        value = penalty()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)
    # Weights and signs agree; the gradient is then rounded to bfloat16 on its way through the convolutions.
    assert_same(gradients(model, value), gradients(model, expected), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("how", ["in_place", "wrapped"])
def test_torch_compile(how):
    model = Network()
    penalty = SparsityPenalty(model, LAYERS, GAMMA)
    compiled = model
    if how == "in_place":
        model.compile(fullgraph=True, backend="aot_eager")
    else:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (4, 4, 2):
        y = images(batch)
        expected = eager_penalty(model.features(y))
        compiled(y)
        value = penalty()
        torch.testing.assert_close(value, expected)
        assert_same(gradients(model, value), gradients(model, expected))
        assert penalty.density()["block1.act"] == pytest.approx(functional.density(model.features(y)[0]).item())
        with pytest.raises(RuntimeError, match="no forward pass"):
            penalty()


def test_torch_compile_of_a_whole_training_step():
    model = Network()
    penalty = SparsityPenalty(model, LAYERS, GAMMA)

    def loss(y):
        return model(y).square().mean() + penalty()

    y = images()
    expected = gradients(model, loss(y))
    assert_same(gradients(model, torch.compile(loss, fullgraph=True, backend="aot_eager")(y)), expected)


@pytest.mark.supports("compile and transform", "`SparsityPenalty` with checkpointing (`use_reentrant=False`)")
def test_activation_checkpointing():
    model, y = Network(), images()
    plain = gradients(model, model(y).square().sum() + eager_penalty(model.features(y)))
    model.checkpointed = True
    calls = []
    model.block1["conv"].register_forward_hook(lambda *_: calls.append(1))
    penalty = SparsityPenalty(model, [*LAYERS, "head"], GAMMA, weights=[1 / 180, 1 / 72, 0.0])
    loss = model(y).square().sum() + penalty()
    density = penalty.density()
    assert_same(gradients(model, loss), plain)
    assert len(calls) == 2  # the backward pass did run the layers again, and no penalty can be taken of that
    assert penalty.density() == density
    with pytest.raises(RuntimeError, match="no forward pass"):
        penalty()


def test_backward_before_the_penalty_keeps_the_features():
    """... of the forward pass, where a checkpoint would show those of the recomputation."""
    model, y = Network(checkpointed=True), images()
    expected = eager_penalty(model.features(y))
    penalty = SparsityPenalty(model, LAYERS, GAMMA)
    checkpoint(model, y, use_reentrant=False).sum().backward()
    torch.testing.assert_close(penalty(), expected)


def _train_in_two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, y = torch.load(f"{folder}/start.pt", weights_only=False)
    penalty = SparsityPenalty(model, LAYERS, GAMMA)
    parallel = DistributedDataParallel(model)
    for _ in range(2):
        parallel.zero_grad()
        (parallel(y[rank::2]).square().mean() + penalty()).backward()
    torch.save(([p.grad for p in model.parameters()], penalty.density()), f"{folder}/end{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # Now and then a thread of torch's outlives the interpreter, which then aborts: what is tested is done.
    os._exit(0)


@pytest.mark.supports("distributed", "`SparsityPenalty` under DistributedDataParallel")
def test_two_processes_have_the_gradient_of_the_joined_batch(tmp_path):
    model, y = Network(), images(6)
    torch.save((model, y), tmp_path / "start.pt")
    expected = gradients(model, model(y).square().mean() + eager_penalty(model.features(y)))
    torch.multiprocessing.spawn(_train_in_two_processes, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        grads, densities = torch.load(tmp_path / f"end{rank}.pt")
        assert_same(grads, expected)
        assert densities["block1.act"] == pytest.approx(functional.density(model.features(y[rank::2])[0]).item())


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.supports("state", "`deepcopy`, `pickle`, whole models in files")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_that_carries_a_penalty_can_be_copied(copied):
    model, y = Network(), images()
    seen = watch(model, "block1.act") if copied is copy.deepcopy else []
    penalty = SparsityPenalty(model, LAYERS, GAMMA)
    model(y)
    if copied is copy.deepcopy:
        model.block1["act"]._forward_hooks.popitem(last=False)  # the watching one, which no copy should carry
    twin = copied(model)
    # The copy takes no features along, and what it does is not seen by the original's penalty.
    torch.testing.assert_close(twin(y), model(y))
    expected = eager_penalty(model.features(y))
    twin(images())
    torch.testing.assert_close(penalty(), expected)
    twin(images())
    with pytest.raises(RuntimeError, match="no forward pass"):
        penalty()
    assert not any(alive(seen))
    # A penalty of its own works.
    y = images()
    own = SparsityPenalty(twin, LAYERS, GAMMA)
    twin(y)
    torch.testing.assert_close(own(), eager_penalty(twin.features(y)))
    penalty.remove()
    twin(y)
    torch.testing.assert_close(own(), eager_penalty(twin.features(y)))
