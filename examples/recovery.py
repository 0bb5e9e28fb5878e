"""The sparse recovery benchmark of the LISTA literature: its data, its networks, and their training layer by layer.

A signal y = D x (+ noise) of 250 numbers, codes of 500 entries of which each is non-zero with probability 0.1; how well
do 16 iterations recover x? The networks are trained by Lightning, one stage an epoch, so that a run goes on from its
last finished stage. Sources: Chen, Liu, Wang, Yin (NeurIPS 2018); Liu, Chen, Wang, Yin (ICLR 2019).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.run import torch_threads, write_whole
from dsc_ops import functional, reference, theory
from examples.data.sampling import FreshSeeds
from examples.training import Learner, fit

TRAINED = ("LISTA", "LISTA-CP", "LISTA-CP-SS", "ALISTA")
FIXED = ("ISTA", "FISTA")
NOISELESS = math.inf
MOMENTUM = reference.momentum_weights("fista", 100)
TEST_SEED = 10**15  # no batch of the training has such a seed


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark and of the training."""

    m: int = 250
    d: int = 500
    layers: int = 16
    probability: float = 0.1
    snrs: tuple[float, ...] = (NOISELESS, 40.0, 30.0, 20.0)  # dB
    batch: int = 64
    steps_per_stage: int = 60
    final_stages: int = 4  # of all layers together, at each of the two smaller learning rates
    weight_rate: float = 1e-3
    scalar_rate: float = 2e-2
    alista_rate: float = 1e-2  # of ALISTA, which has nothing but scalars
    lam: float = 0.4  # of the start
    test: int = 1000
    lams: tuple[float, ...] = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)  # among which ISTA and FISTA choose


def dictionary(settings: Settings, seed: int) -> Tensor:
    """Gaussian atoms of unit norm, in columns."""
    D = torch.randn(settings.m, settings.d, generator=torch.Generator().manual_seed(seed))
    return D / D.norm(dim=0)


def problems(D: Tensor, count: int, settings: Settings, snr: float, seed: int) -> tuple[Tensor, Tensor]:
    """Signals and their codes; the noise is relative to the signals' standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, settings.d)
    codes = torch.randn(shape, generator=generator)
    codes = codes * (torch.rand(shape, generator=generator) < settings.probability)
    y = codes @ D.T
    if snr != NOISELESS:
        y = y + y.std() * 10 ** (-snr / 20) * torch.randn(y.shape, generator=generator)
    return y, codes


class Batches(Dataset):
    """Batches made from their seed."""

    def __init__(self, D: Tensor, settings: Settings, snr: float):
        self.D, self.settings, self.snr = D, settings, snr

    def __getitem__(self, seed: int) -> tuple[Tensor, Tensor]:
        return problems(self.D, self.settings.batch, self.settings, self.snr, seed)


def nmse(found: Tensor, codes: Tensor) -> Tensor:
    """10 log10(sum ||x - x*||^2 / sum ||x*||^2), in dB."""
    return 10 * torch.log10((found - codes).square().sum() / codes.square().sum())


class Network(nn.Module):
    """K layers of LISTA, LISTA-CP, LISTA-CP with support selection, or ALISTA with support selection.

    Thresholds and steps are learned by their logarithms. A network starts as ISTA (LISTA and LISTA-CP, W = D / L),
    ALISTA with the analytic weights; what a layer learns is where the next begins.
    """

    def __init__(self, kind: str, D: Tensor, layers: int, lam: float):
        super().__init__()
        self.kind, self.layers = kind, layers
        self.register_buffer("atoms", D.T.contiguous())
        L = 1.001 * float(torch.linalg.matrix_norm(D, 2)) ** 2
        theta, weight = lam / L, self.atoms / L
        if kind == "ALISTA":
            self.register_buffer("W", theory.analytic_coherence(D)[1].T.contiguous())
            theta = lam / 2
        elif kind == "LISTA":
            weight = torch.cat([weight, torch.eye(len(weight)) - weight @ D], dim=1)
        self.weights = nn.ParameterList([] if kind == "ALISTA" else [weight.clone() for _ in range(layers)])
        self.log_theta = nn.ParameterList([torch.tensor([math.log(theta)]) for _ in range(layers)])
        self.log_step = nn.ParameterList([torch.zeros(1) for _ in range(layers if kind == "ALISTA" else 0)])

    def lists(self) -> list[nn.ParameterList]:
        return [values for values in (self.weights, self.log_theta, self.log_step) if len(values)]

    def forward(self, y: Tensor, depth: int, x: Tensor | None = None, first: int = 0) -> Tensor:
        """The code after the layers first .. depth - 1, from the code x before them."""
        thetas = torch.stack([value.exp() for value in self.log_theta[first:depth]])
        if self.kind == "LISTA-CP":  # all layers in one operator; samples are its pixels
            analysis = torch.stack(list(self.weights[first:depth])).unsqueeze(-1)
            start = None if x is None else x.t().unsqueeze(0)
            pixels = y.t().contiguous().unsqueeze(0)
            return functional.lista(pixels, self.atoms.unsqueeze(-1), analysis, thetas, x0=start).squeeze(0).t()
        for k, theta in zip(range(first, depth), thetas, strict=True):
            x = self.layer(k, y, y.new_zeros(len(y), len(self.atoms)) if x is None else x, theta)
        return x

    def layer(self, k: int, y: Tensor, x: Tensor, theta: Tensor) -> Tensor:
        if self.kind == "LISTA":
            both = torch.cat([y, x], dim=1).t().unsqueeze(0)
            return functional.conv_soft_threshold(both, self.weights[k].unsqueeze(-1), theta.reshape(())).squeeze(0).t()
        residual = y - x @ self.atoms
        if self.kind == "ALISTA":
            u = x + self.log_step[k].exp() * F.linear(residual, self.W)
        else:
            u = x + F.linear(residual, self.weights[k])
        shrunk = functional.soft_threshold(u, theta.reshape(()))
        count = round(len(self.atoms) * min(1.2 * (k + 1), 13.0) / 100)
        if count == 0:
            return shrunk
        size = u.detach().abs()
        kept = (size >= size.topk(count, dim=1).values[:, -1:]) & (size > theta)
        return torch.where(kept, u, shrunk)

    @torch.no_grad()
    def begin_layer(self, k: int) -> None:
        """Layer k starts as the layer before it is now."""
        for values in self.lists():
            if k > 0:
                values[k].copy_(values[k - 1])


@dataclass(frozen=True)
class Stage:
    """What one stage trains: layers first .. depth - 1, for the code after them, at a share of the learning rate."""

    depth: int
    first: int
    share: float


def stages(settings: Settings) -> list[Stage]:
    """A new layer alone, then all so far, layer by layer; at last all together."""
    made = []
    for depth in range(1, settings.layers + 1):
        made.append(Stage(depth, depth - 1, 1.0))
        if depth > 1:
            made.append(Stage(depth, 0, 0.2))
    made += [Stage(settings.layers, 0, 0.2)] * settings.final_stages
    return made + [Stage(settings.layers, 0, 0.02)] * settings.final_stages


class LayerwiseLearner(Learner):
    """Trains a :class:`Network` stage by stage, an epoch each; the loss is the NMSE in dB."""

    def __init__(self, network: Network, plan: list[Stage], settings: Settings):
        super().__init__(network, nmse, torch.optim.Adam)
        self.plan, self.settings = plan, settings

    @property
    def stage(self) -> Stage:
        return self.plan[self.current_epoch]

    def on_train_epoch_start(self) -> None:
        stage, optimizer = self.stage, self.optimizers().optimizer
        if stage.depth - stage.first == 1:
            self.network.begin_layer(stage.first)
        for values in self.network.lists():
            for k, parameter in enumerate(values):
                parameter.requires_grad_(stage.first <= k < stage.depth)
                parameter.grad = None
        if stage != self.plan[self.current_epoch - 1]:
            optimizer.state.clear()
        for group in optimizer.param_groups:
            group["lr"] = stage.share * group["rate"]

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        y, codes = batch
        stage, x = self.stage, None
        if stage.first:
            with torch.no_grad():
                x = self.network(y, stage.first)
        loss = self.loss(self.network(y, stage.depth, x, stage.first), codes)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        network, settings = self.network, self.settings
        scalars = [*network.log_theta, *network.log_step]
        rate = settings.alista_rate if network.kind == "ALISTA" else settings.scalar_rate
        groups = [{"params": scalars, "rate": rate}]
        if len(network.weights):
            groups.append({"params": list(network.weights), "rate": settings.weight_rate})
        return torch.optim.Adam(groups, lr=settings.weight_rate, fused=True)


def train(kind: str, snr: float, D: Tensor, settings: Settings, seed: int, folder: Path) -> Network:
    """A trained network; its folder has the checkpoint of the last finished stage."""
    network, plan = Network(kind, D, settings.layers, settings.lam), stages(settings)
    sampler = FreshSeeds(settings.steps_per_stage, seed)
    loader = DataLoader(Batches(D, settings, snr), batch_size=None, sampler=sampler)
    fit(LayerwiseLearner(network, plan, settings), loader, len(plan), folder, f"{kind}, {level(snr)}")
    return network.requires_grad_(False)


def level(snr: float) -> str:
    return "noiseless" if snr == NOISELESS else f"{snr:g} dB"


@torch.no_grad()
def curve(network: Network, y: Tensor, codes: Tensor) -> list[float]:
    """NMSE after each layer."""
    x, found = None, []
    for k in range(network.layers):
        x = network(y, k + 1, x, k)
        found.append(float(nmse(x, codes)))
    return found


def iterations(D: Tensor, y: Tensor, lam: float, count: int, fast: bool) -> Iterator[Tensor]:
    """Codes of ISTA or FISTA after 1 .. count iterations."""
    pixels, atoms = y.t().contiguous().unsqueeze(0), D.T.contiguous().unsqueeze(-1)
    step = 1 / float(torch.linalg.matrix_norm(D, 2)) ** 2
    x = before = pixels.new_zeros(1, D.shape[1], len(y))
    for k in range(count):
        z = x + MOMENTUM[k] * (x - before) if fast else x
        before, x = x, functional.lista_step(z, pixels, atoms, step * atoms, step * lam)
        yield x.squeeze(0).t()


@torch.no_grad()
def fixed_curve(kind: str, D: Tensor, settings: Settings, snr: float, seed: int) -> dict[str, Any]:
    """ISTA or FISTA with the lambda that is best after the last iteration, on problems that are not the test's."""
    y, codes = problems(D, settings.test, settings, snr, seed + 1)
    fast = kind == "FISTA"

    def last(lam: float) -> float:
        return float(nmse(list(iterations(D, y, lam, settings.layers, fast))[-1], codes))

    lam = min(settings.lams, key=last)
    y, codes = problems(D, settings.test, settings, snr, seed)
    return {"lam": lam, "nmse": [float(nmse(x, codes)) for x in iterations(D, y, lam, settings.layers, fast)]}


def benchmark(settings: Settings, seed: int, folder: Path) -> dict[str, Any]:
    """NMSE after each layer of all methods at all noise levels, with what was trained and for how long.

    Each network has a folder with its checkpoint, and in the end its weights and result: finished ones are not run
    again.
    """
    D, results = dictionary(settings, seed), []
    with torch_threads(1):  # so small matrices gain nothing from more
        for snr in settings.snrs:
            for kind in FIXED:
                found = fixed_curve(kind, D, settings, snr, TEST_SEED + seed)
                results.append({"kind": kind, "level": level(snr), "seconds": 0.0, "steps": 0, **found})
            for kind in TRAINED:
                path = folder / name_of(kind, snr) / "result.json"
                if not path.exists():
                    result = trained_result(kind, snr, D, settings, seed, folder)
                    write_whole(path, json.dumps(result, indent=2) + "\n")
                results.append(json.loads(path.read_text(encoding="utf-8")))
    return {"levels": [level(snr) for snr in settings.snrs], "networks": results, "batch": settings.batch}


def trained_result(kind: str, snr: float, D: Tensor, settings: Settings, seed: int, folder: Path) -> dict[str, Any]:
    """Train one network in its folder and test it; "seconds" are those since it was last taken up."""
    here, begun = folder / name_of(kind, snr), time.perf_counter()
    network = train(kind, snr, D, settings, seed, here)
    torch.save(network.state_dict(), here / "weights.pt")
    y, codes = problems(D, settings.test, settings, snr, TEST_SEED + seed)
    return {
        "kind": kind,
        "level": level(snr),
        "seconds": time.perf_counter() - begun,
        "steps": len(stages(settings)) * settings.steps_per_stage,
        "nmse": curve(network, y, codes),
    }


def name_of(kind: str, snr: float) -> str:
    return f"{kind}-{level(snr)}".replace(" ", "-")
