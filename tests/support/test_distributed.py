"""DistributedDataParallel and FSDP2 on two processes: the gradients of one process with the joined batch."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import network
import pytest
import torch
import torch.distributed
from network import Network, assert_same
from torch import Tensor, nn

from dsc_ops import LISTAConv, SparsityPenalty

GAMMA = 0.3
WAYS: dict[str, Callable] = {}

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)


def way(function: Callable) -> Callable:
    """What the two processes run, one after the other; each returns gradients by name and whatever else is checked."""
    WAYS[function.__name__] = function
    return function


def start() -> tuple[nn.Module, Tensor]:
    """The same in every process."""
    torch.manual_seed(0)
    return Network(), network.images(6)


def step(model: nn.Module, penalty: SparsityPenalty, y: Tensor) -> None:
    (model(y).square().mean() + penalty()).backward()


def whole(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for name, g in grads.items()}


def grads_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def data_parallel(rank: int, memory_format: torch.memory_format, **options) -> dict:
    model, y = start()
    model = model.to(memory_format=memory_format)
    penalty = SparsityPenalty(model, network.PENALISED, GAMMA)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # of gradients whose strides are not those of the parameter
        parallel = nn.parallel.DistributedDataParallel(model, **options)
        for _ in range(2):
            parallel.zero_grad()
            step(parallel, penalty, y[rank::2].contiguous(memory_format=memory_format))
    strides = all(p.grad.stride() == p.stride() for p in model.parameters())
    return dict(grads=whole(grads_of(model)), strides=strides, warned=[str(w.message) for w in caught])


@way
def ddp(rank: int) -> dict:
    return data_parallel(rank, torch.contiguous_format)


@way
def ddp_channels_last(rank: int) -> dict:
    return data_parallel(rank, torch.channels_last, gradient_as_bucket_view=True)


@way
def ddp_static_graph(rank: int) -> dict:
    return data_parallel(rank, torch.contiguous_format, static_graph=True)


@way
def ddp_unused_parameters(rank: int) -> dict:
    return data_parallel(rank, torch.contiguous_format, find_unused_parameters=True)


@way
def fsdp2(rank: int) -> dict:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, y = start()
    mesh = init_device_mesh("cpu", (2,))
    penalty = SparsityPenalty(model, network.PENALISED, GAMMA)
    for layer in (model.first, model.codes, model.dense):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        step(model, penalty, y[rank::2])
    layout = all(p.grad.placements == p.placements for p in model.parameters())
    grads = whole(grads_of(model))
    optimizer.step()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    keys = None
    if rank == 0:
        other = Network()
        other.load_state_dict(state, strict=True)
        keys = sorted(other.state_dict())
    return dict(grads=grads, strides=layout, warned=[], keys=keys)


@way
def fsdp2_from_the_meta_device(rank: int) -> dict:
    """A layer too large for one process: made without memory, sharded, then filled by reset_parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        model = Network()
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model.first, model.codes, model.dense):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    for layer in model.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    assert model(network.images(2)).isfinite().all()
    return dict(
        dictionary=model.codes.dictionary.full_tensor().detach(), analysis=model.codes.analysis.full_tensor().detach()
    )


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for name, function in WAYS.items():
        try:
            results[name] = function(rank)
        except Exception:
            results[name] = traceback.format_exc()
            if name.startswith("fsdp2"):
                break  # the other process may be waiting
    torch.save(results, f"{folder}/end{rank}.pt")
    torch.distributed.barrier()
    # A thread of torch's may outlive the interpreter, which then aborts: what is tested is done.
    os._exit(0)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """What the two processes made of every way."""
    folder: Path = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(run, (str(folder),), nprocs=2)
    return [torch.load(folder / f"end{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    model, y = start()
    penalty = SparsityPenalty(model, network.PENALISED, GAMMA)
    step(model, penalty, y)
    return grads_of(model)


def check(name: str, results: list[dict], expected: dict[str, Tensor]) -> list[dict]:
    found = [result.get(name, "it did not come to this") for result in results]
    for result in found:
        assert isinstance(result, dict), result
        assert_same(result["grads"], expected)
        assert result["strides"], "a gradient has another layout than its parameter"
        assert not [text for text in result["warned"] if "strides" in text.lower()]
    return found


@pytest.mark.supports(
    "distributed", "DistributedDataParallel: the joined batch's gradients, penalty included, in the parameters' layout"
)
@pytest.mark.parametrize("name", [name for name in WAYS if name.startswith("ddp")])
def test_data_parallel_gradients(name, results, expected):
    check(name, results, expected)


@pytest.mark.supports("distributed", "FSDP2 (`fully_shard`): the same, sharded; its full state loads into one process")
def test_sharded_gradients(results, expected):
    found = check("fsdp2", results, expected)
    assert found[0]["keys"] == sorted(Network().state_dict())


@pytest.mark.supports("distributed", "FSDP2 from the meta device: a sharded layer is filled by `reset_parameters`")
def test_sharded_layers_can_be_filled(results):
    found = [result.get("fsdp2_from_the_meta_device", "it did not come to this") for result in results]
    for result in found:
        assert isinstance(result, dict), result
    dictionary, analysis = found[0]["dictionary"], found[0]["analysis"]
    torch.testing.assert_close(dictionary.flatten(1).norm(dim=1), torch.ones(6))
    usual = LISTAConv.from_dictionary(dictionary, 2)
    torch.testing.assert_close(analysis, usual.analysis.detach())
    assert torch.equal(found[1]["dictionary"], dictionary)


def test_the_two_halves_differ(expected):
    """... so that equal gradients say that both took part."""
    model, y = start()
    penalty = SparsityPenalty(model, network.PENALISED, GAMMA)
    step(model, penalty, y[::2])
    alone = grads_of(model)
    assert any(not torch.allclose(alone[name], value, rtol=1e-2) for name, value in expected.items())
