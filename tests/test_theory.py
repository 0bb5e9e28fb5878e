"""dsc_ops.theory: the tests are the theorems, over hundreds of random problems, with counter-examples outside."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from numerics import CONVOLUTIONS, assert_as_exact_as_eager, error, random_convolution
from torch import Tensor, nn

pytest.importorskip("scipy", reason="the theory's linear programmes need pip install dsc_ops[theory]")

from dsc_ops import LISTAConv, LISTAConv1d, LISTALinear, functional, reference, theory

# HiGHS misses a constraint by up to 1e-10, relative to coefficients of about 1; a coherence is a ratio of a few.
LINEAR_PROGRAMME = 1e-8
ROUNDING = 1e-12  # of float64 results of size 1, the rule of numerics.py


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def unit_columns(D: Tensor) -> Tensor:
    return D / D.norm(dim=0)


def random_dictionary(m: int, d: int) -> Tensor:
    return unit_columns(normal(m, d))


def spikes_and_hadamard(m: int) -> Tensor:
    """[I, H / sqrt(m)]: mutual coherence 1 / sqrt(m)."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < m:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return torch.cat([torch.eye(m, dtype=torch.float64), H / m**0.5], dim=1)


def cycle(n: int) -> Tensor:
    """Each atom joins two neighbours on a ring of n: only all the others together make it, so mu~ = 1 / (n - 1)."""
    one = torch.eye(n, dtype=torch.float64)
    return (one - one.roll(1, dims=0)) / 2**0.5


def chords(rows: int, columns: int) -> Tensor:
    """Atoms of two entries, a ring and chords across 7 of it: sparse codes make sparse signals, and mu~ = 1 / 7."""
    D = torch.cat([cycle(rows), torch.zeros(rows, columns - rows, dtype=torch.float64)], dim=1)
    for number in range(columns - rows):
        D[16 * number, rows + number], D[16 * number + 7, rows + number] = 0.5**0.5, -(0.5**0.5)
    return D


def sparse_codes(count: int, d: int, s: int, B: float = 1.0) -> Tensor:
    """Codes of 1 to s non-zeros of size up to B; a third of them +-B, the hardest."""
    codes = torch.zeros(count, d, dtype=torch.float64)
    for n in range(count):
        places = torch.randperm(d)[: int(torch.randint(1, s + 1, ()))]
        values = B * (2 * torch.rand(len(places), dtype=torch.float64) - 1)
        codes[n, places] = values if n % 3 else B * values.sign()
    return codes


def spark(D: Tensor) -> int:
    """The fewest dependent columns, by trying all."""
    for size in range(1, D.shape[1] + 1):
        for columns in itertools.combinations(range(D.shape[1]), size):
            if torch.linalg.matrix_rank(D[:, list(columns)], rtol=1e-9) < size:
                return size
    return D.shape[1] + 1


# --- coherence --------------------------------------------------------------------------------------------------------

SHAPES = [(2, 3), (5, 9), (8, 8), (12, 20), (20, 26), (6, 4), (3, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mutual_coherence_is_the_largest_cosine_whatever_the_norms(shape):
    D = normal(*shape)
    pairs = itertools.combinations(range(shape[1]), 2)
    cosines = [abs(float(D[:, i] @ D[:, j] / (D[:, i].norm() * D[:, j].norm()))) for i, j in pairs]
    assert theory.mutual_coherence(D) == pytest.approx(max(cosines, default=0.0), abs=ROUNDING)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_generalized_coherence_meets_its_certificate(shape):
    D = random_dictionary(*shape)
    mu, W = theory.generalized_coherence(D)
    assert W.shape == D.shape and W.dtype == D.dtype
    assert error((W * D).sum(dim=0), torch.ones(shape[1]).double()) <= ROUNDING * max(1, float(W.abs().max()))
    products = (W.T @ D).fill_diagonal_(0).abs().max()
    assert mu == pytest.approx(float(products), abs=ROUNDING)
    assert mu <= theory.mutual_coherence(D) + LINEAR_PROGRAMME
    proof, C = theory.coherence_certificate(D)
    assert proof - LINEAR_PROGRAMME <= mu <= proof + LINEAR_PROGRAMME
    spanned = C.isfinite().all(dim=0)
    assert not C.diagonal()[spanned].any()
    assert error(D @ C[:, spanned], D[:, spanned]) <= LINEAR_PROGRAMME
    assert (spanned.any() and shape[0] < shape[1]) or proof == 0


def test_the_weights_of_a_small_dictionary_are_those_found_by_trying_all():
    """In the plane w^T d = 1 is a line: try its points."""
    D = random_dictionary(2, 4)
    mu, W = theory.generalized_coherence(D)
    steps = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    least, entries = [], []
    for i in range(4):
        across = torch.stack([-D[1, i], D[0, i]])
        points = D[:, i] + steps.unsqueeze(1) * across
        coherence = (points @ torch.cat([D[:, :i], D[:, i + 1 :]], dim=1)).abs().amax(dim=1)
        least.append(float(coherence.min()))
        entries.append((points, coherence))
    step = float(steps[1] - steps[0])
    assert mu == pytest.approx(max(least), abs=step)
    for i, (points, coherence) in enumerate(entries):
        allowed = points[coherence <= mu + step]
        assert float(W[:, i].abs().max()) == pytest.approx(float(allowed.abs().amax(dim=1).min()), abs=4 * step)


@pytest.mark.parametrize("n", [3, 5, 8])
def test_the_coherence_of_a_ring_is_known(n):
    assert theory.generalized_coherence(cycle(n))[0] == pytest.approx(1 / (n - 1), abs=LINEAR_PROGRAMME)
    assert theory.mutual_coherence(cycle(n)) == pytest.approx(1 / 2, abs=ROUNDING)


def test_atoms_of_any_norm_and_dtype():
    D = random_dictionary(6, 10)
    mu, W = theory.generalized_coherence((3 * D).float())
    assert W.dtype == torch.float32
    assert mu == pytest.approx(theory.generalized_coherence(D)[0], abs=1e-6)


@pytest.mark.parametrize("shape", [(2, 3), (12, 20), (20, 26), (30, 50), (8, 8), (6, 4)], ids=str)
def test_the_analytic_weights_are_as_near_to_the_best_as_they_say(shape):
    D = random_dictionary(*shape)
    mu, W, gap = theory.analytic_coherence(D)
    assert error((W * D).sum(dim=0), torch.ones(shape[1]).double()) <= ROUNDING * max(1, float(W.abs().max()))
    assert mu == pytest.approx(float((W.T @ D).fill_diagonal_(0).abs().max()), abs=ROUNDING)
    best = theory.generalized_coherence(D)[0]
    assert mu - gap - LINEAR_PROGRAMME <= best <= mu + LINEAR_PROGRAMME
    # Among all weights they have the least Frobenius norm of W^T D.
    other = theory.generalized_coherence(D)[1]
    assert float((W.T @ D).norm()) <= float((other.T @ D).norm()) * (1 + ROUNDING)


# --- uniqueness, l0 = l1 ----------------------------------------------------------------------------------------------


def test_fewer_dependent_columns_than_the_bound_allows_do_not_exist():
    for _ in range(60):
        D = random_dictionary(4, 7)
        # Two codes of k non-zeros for one signal are 2 k dependent columns.
        assert spark(D) >= 2 * theory.uniqueness_bound(D) - ROUNDING


def test_the_uniqueness_bound_is_sharp():
    """At the bound there are two codes: a square of spikes is a square of Hadamard atoms."""
    D = spikes_and_hadamard(4)
    assert theory.uniqueness_bound(D) == theory.uniqueness_bound(0.5) == 1.5
    one, other = torch.zeros(8).double(), torch.zeros(8).double()
    one[[0, 1]] = 1.0
    other[[4, 6]] = 1.0
    assert error(D @ one, D @ other) <= ROUNDING
    assert not theory.is_unique([one], [D])


def test_l0_is_l1_inside_the_bound_and_not_outside():
    D = spikes_and_hadamard(16)
    bound = theory.uniqueness_bound(D)
    assert bound == 2.5
    codes = sparse_codes(200, 32, 2)
    assert all(theory.is_unique([code], [D]) for code in codes)
    assert error(theory.basis_pursuit(codes @ D.T, D), codes) <= LINEAR_PROGRAMME
    # Eight spikes of random signs are more than the l1 norm can tell apart.
    codes = sparse_codes(30, 32, 9)
    found = theory.basis_pursuit(codes @ D.T, D)
    assert error(found @ D.T, codes @ D.T) <= LINEAR_PROGRAMME
    assert (found.abs().sum(dim=1) <= codes.abs().sum(dim=1) + LINEAR_PROGRAMME).all()
    wrong = (found - codes).abs().amax(dim=1) > 1e-3
    assert wrong.any() and (codes[wrong].count_nonzero(dim=1) >= bound).all()


def test_a_product_can_prove_what_a_layer_cannot():
    """D_1 has two equal columns; D_2 never uses them apart, so that D_1 D_2 is fine."""
    D1 = torch.cat([spikes_and_hadamard(16), torch.eye(16).double()[:, :1]], dim=1)
    D2 = torch.cat([torch.eye(32).double(), torch.zeros(1, 32).double()])
    D2[[0, 32], 0] = 0.5
    first, second = theory.deep_uniqueness_bounds([D1, D2])
    assert (first.first, first.last, first.bound) == (1, 1, 1.0)
    assert (second.first, second.last) == (2, 2) and second.bound == math.inf
    codes = sparse_codes(100, 32, 2)
    assert all(theory.is_unique([x @ D2.T, x], [D1, D2]) for x in codes)  # by D_1 D_2 alone
    assert not any(theory.is_unique([x @ D2.T], [D1]) for x in codes)
    assert error(theory.basis_pursuit(codes @ (D1 @ D2).T, D1 @ D2), codes) <= LINEAR_PROGRAMME
    # Where the product is worse than its factors, the chain goes over the layers.
    D2 = chords(32, 34)
    bounds = theory.deep_uniqueness_bounds([D1[:, :32], D2])
    assert bounds[1].first == 2 and bounds[1].bound > theory.uniqueness_bound(D1[:, :32] @ D2)
    x = torch.zeros(34).double()
    x[3] = 1.0
    assert theory.is_unique([D2 @ x, x], [D1[:, :32], D2])


def test_what_is_called_unique_is_unique():
    """Deep models small enough to search all supports."""
    found = 0
    for _ in range(100):
        D1, D2 = random_dictionary(5, 6), random_dictionary(6, 7) * (torch.rand(6, 7) < 0.4)
        D2[torch.arange(6), torch.arange(6)] = 1.0
        D2[0, 6] = 1.0
        code = sparse_codes(1, 7, 2)[0]
        if theory.is_unique([D2 @ code, code], [D1, D2]):
            found += 1
            count, product = int(code.count_nonzero()), D1 @ D2
            direct = count < theory.uniqueness_bound(product)
            assert not direct or spark(product) > 2 * count
            assert direct or (spark(D2) > 2 * count and spark(D1) > 2 * int((D2 @ code).count_nonzero()))
    assert found > 10


# --- stability --------------------------------------------------------------------------------------------------------


def rulers(rows: int, columns: int) -> Tensor:
    """Shifts of two Golomb rulers of four marks, which share one mark at most: mutual coherence 1/4."""
    D = torch.zeros(rows, 2 * rows, dtype=torch.float64)
    for number, marks in enumerate(((0, 1, 4, 6), (0, 8, 17, 29))):
        for mark in marks:
            places = torch.arange(rows)
            D[(places + mark) % rows, places + number * rows] = 0.5
    return D[:, :columns]


# Each layer's codes have 1, 2 and 8 non-zeros at most, from the last to the first.
DEEP = [spikes_and_hadamard(256), rulers(512, 530), chords(530, 540)]


def perturbed(x: Tensor, size: float, dense: bool = False) -> Tensor:
    """Other codes near x, some on another support of as many non-zeros."""
    moved = x + size * torch.randn_like(x) * (x != 0)
    return moved.roll(1, dims=-1) if torch.rand(()) < 0.2 else moved


def deep_pair(J: int, size: float) -> tuple[list[Tensor], list[Tensor]]:
    """Codes of an exact deep model with x_J of one or two entries, and other codes that leave residuals."""
    x = sparse_codes(1, DEEP[J - 1].shape[1], 1)[0]
    exact, other = [x], [perturbed(x, size)]
    for D in DEEP[J - 1 : 0 : -1]:
        exact.insert(0, D @ exact[0])
        other.insert(0, perturbed(D @ other[0], size))
    return exact, other


@pytest.mark.parametrize("J", [1, 2, 3])
def test_codes_are_as_near_as_their_residuals_promise(J):
    lambdas = [[1], [4, 1], [8, 2, 1]][J - 1]
    # The bound is linear in eps: its values for each unit vector once, for two hundred problems.
    units = torch.eye(J + 1).tolist()
    answers = torch.tensor([theory.stability_bound(unit, lambdas, DEEP[:J]) for unit in units], dtype=torch.float64)
    tight = 0.0
    for trial in range(200):
        exact, other = deep_pair(J, 10.0 ** -(trial % 4))
        noise = 10.0 ** -(trial % 5) * normal(256)
        signals = [DEEP[0] @ other[0] if trial % 3 == 0 else DEEP[0] @ exact[0] + noise, *other]
        clean = [DEEP[0] @ exact[0], *exact]
        eps = [float((signals[0] - clean[0]).norm())]
        eps += [float((a - D @ b).norm()) for a, b, D in zip(signals, other, DEEP, strict=False)]
        assert all(int(x.count_nonzero()) <= n for pair in (exact, other) for x, n in zip(pair, lambdas, strict=True))
        deltas = (torch.tensor(eps, dtype=torch.float64) @ answers).tolist()
        errors = [float((a - b).norm()) for a, b in zip(exact, other, strict=True)]
        assert all(e <= delta * (1 + ROUNDING) + ROUNDING for e, delta in zip(errors, deltas, strict=True))
        tight = max(tight, errors[0] / max(deltas[0], 1e-300))
    assert deltas == pytest.approx(theory.stability_bound(eps, lambdas, DEEP[:J]))
    assert 0.1 < tight <= 1 + ROUNDING  # and the promise is not an empty one


def test_corollaries_are_the_theorem_with_zeros():
    lambdas, eps = [8, 2, 1], [0.3, 0.2, 0.1]
    assert theory.noise_stability_bound(0.5, lambdas, DEEP) == pytest.approx(
        theory.stability_bound([0.5, 0, 0, 0], lambdas, DEEP)
    )
    assert theory.model_stability_bound(eps, lambdas, DEEP) == pytest.approx(
        theory.stability_bound([0, *eps], lambdas, DEEP)
    )
    scaled = [2 * D for D in DEEP]
    assert theory.noise_stability_bound(0.5, lambdas, scaled) == pytest.approx(
        [b / 2**j for j, b in enumerate(theory.noise_stability_bound(0.5, lambdas, DEEP), start=1)]
    )


def test_earlier_bounds_hold_and_are_looser():
    lambdas = [8, 2, 1]
    new = theory.noise_stability_bound(1.0, lambdas, DEEP)
    earlier = theory.earlier_stability_bounds(1.0, lambdas, DEEP)
    assert earlier["layered"] == pytest.approx([2**j * b for j, b in enumerate(new, start=1)])
    assert earlier["projected"][0] == pytest.approx(2 * new[0])
    units = theory.earlier_stability_bounds(1.0, [1], DEEP[:1])
    for _ in range(200):
        exact, other = deep_pair(1, 0.1)
        noise = normal(256) * 0.1
        residual = float((DEEP[0] @ exact[0] + noise - DEEP[0] @ other[0]).norm())
        level = max(residual, float(noise.norm()))  # the other codes explain y to the noise
        assert all(float((exact[0] - other[0]).norm()) <= level * b[0] for b in units.values())


def test_without_sparsity_there_is_no_stability():
    """Two codes of the same signal, at the number of non-zeros that the bound excludes."""
    D = spikes_and_hadamard(4)
    with pytest.raises(ValueError, match=r"lambdas\[0\] is 2, it takes less than \(1 \+ 1/mu\) / 2 = 1.5, mu = 0.5"):
        theory.stability_bound([0.0, 0.0], [2], [D])
    one, other = torch.zeros(8).double(), torch.zeros(8).double()
    one[[0, 1]], other[[4, 6]] = 1.0, 1.0
    assert float((D @ one - D @ other).norm()) < 1e-12 < float((one - other).norm())


# --- certified LISTA-CP -----------------------------------------------------------------------------------------------


NAMES = ["random", "random of any norm", "spikes", "ring"]


@pytest.fixture(scope="module")
def certified_dictionaries() -> dict[str, tuple[Tensor, Tensor, int]]:
    """Dictionaries with their best weights and the largest s that is promised."""
    torch.manual_seed(0)
    made = {
        "random": random_dictionary(40, 48),
        "random of any norm": random_dictionary(30, 36) * (0.5 + torch.rand(36, dtype=torch.float64)),
        "spikes": spikes_and_hadamard(16),
        "ring": cycle(9),
    }
    found = {}
    for name, D in made.items():
        mu, W = theory.generalized_coherence(D)
        found[name] = D, W, math.ceil(theory.uniqueness_bound(mu)) - 1
    assert [found[name][2] for name in NAMES] == [4, 3, 2, 4]
    return found


def noises(count: int, W: Tensor, delta: float) -> Tensor:
    """Noise of l1 norm delta: spread, or all on the entry where the weights are largest."""
    noise = normal(count, len(W))
    noise[::2] = 0
    noise[::2, int(W.abs().amax(dim=1).argmax())] = torch.where(torch.rand(len(noise[::2])) < 0.5, -1.0, 1.0).double()
    return delta * noise / noise.abs().sum(dim=1, keepdim=True)


@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_certificate_holds_at_every_iteration(certified_dictionaries, name, dtype, delta):
    D, W, most = certified_dictionaries[name]
    D, W = D.to(dtype), W.to(dtype)
    for s in range(1, most + 1):
        network, bounds = theory.certified_lista(D, B=2.0, s=s, delta=delta, iterations=50, W=W)
        codes = sparse_codes(300, D.shape[1], s, B=2.0).to(dtype)
        y = codes @ D.T + noises(300, W, delta).to(dtype)
        found = theory.iterates(network, y)
        assert torch.equal(found[-1], network(y))
        assert not found[:, codes == 0].any()  # the support is inside at every k
        errors = (found.double() - codes.double()).norm(dim=2).amax(dim=1)
        assert (errors <= bounds).all()
        assert bounds.shape == (50,) and bounds.dtype == torch.float64


def test_the_bound_falls_at_the_promised_rate(certified_dictionaries):
    D, W, most = certified_dictionaries["random"]
    s = most - 1
    mu = float((W.T @ D).fill_diagonal_(0).abs().max())
    c, C_W = theory.convergence_rate(mu, s), float(W.abs().max())
    assert c > 0
    for delta in (0.0, 1e-3):
        network, bounds = theory.certified_lista(D, B=2.0, s=s, delta=delta, iterations=30, W=W)
        floor = 2 * s * C_W * delta / (1 - (2 * s - 1) * mu)
        found = network.certificate
        assert (found.mu, found.C_W, found.rate, found.C * delta) == pytest.approx((mu, C_W, c, floor), rel=1e-9)
        k = torch.arange(1, 31, dtype=torch.float64)
        assert (bounds <= (s * 2.0 * torch.exp(-c * k) + floor) * (1 + 1e-9) + 1e-10).all()
        assert bounds[-1] == pytest.approx(floor + (s * 2.0 - floor) * math.exp(-30 * c), rel=1e-6, abs=1e-10)


def test_the_certificate_needs_no_weights_and_takes_others():
    D = random_dictionary(12, 14)
    network, bounds = theory.certified_lista(D, B=1.0, s=1, iterations=80)
    other, others = theory.certified_lista(D, B=1.0, s=1, iterations=80, W=3 * theory.analytic_coherence(D)[1])
    codes = sparse_codes(200, 14, 1)
    for net, bound in ((network, bounds), (other, others)):
        assert ((net(codes @ D.T) - codes).norm(dim=1) <= bound[-1]).all()
    assert bounds[0] <= others[0] + LINEAR_PROGRAMME


def test_too_many_non_zeros_are_refused_with_the_numbers():
    D = spikes_and_hadamard(16)
    message = r"s is 3, it takes less than \(1 \+ 1/mu\) / 2 = 2.5, mu = 0.25 "
    with pytest.raises(ValueError, match=message):
        theory.certified_lista(D, B=1.0, s=3, iterations=5)


def test_outside_of_the_assumptions_the_certificate_fails(certified_dictionaries):
    """More non-zeros, larger ones, or more noise than was said: wrong supports and errors above the bound are found."""
    D, W, _ = certified_dictionaries["random"]
    network, bounds = theory.certified_lista(D, B=1.0, s=1, delta=0.01, iterations=30, W=W)
    for codes, level in ((sparse_codes(100, 48, 12), 0.0), (sparse_codes(100, 48, 1, B=9), 0.0), (None, 1.0)):
        codes = sparse_codes(100, 48, 1) if codes is None else codes
        found = theory.iterates(network, codes @ D.T + noises(100, W, level))
        assert found[:, codes == 0].any()
        assert ((found - codes).norm(dim=2).amax(dim=1) > bounds).any()


def test_a_code_too_dense_for_the_theory_is_missed_by_a_network_that_would_promise_it(certified_dictionaries):
    """With s above the bound the recursion of the thresholds grows: what it gives then does not find the code."""
    D, W, most = certified_dictionaries["spikes"]
    mu, s = 0.25, most + 1
    assert theory.convergence_rate(mu, s) < 0 < theory.convergence_rate(mu, most)
    network = LISTALinear.from_dictionary(D.T.contiguous(), 50)
    with torch.no_grad():
        network.analysis.copy_(W.T.expand_as(network.analysis))
        network.theta.copy_(torch.tensor([mu * s * ((2 * s - 1) * mu) ** k for k in range(50)])[:, None].expand(50, 32))
    codes = sparse_codes(100, 32, s)
    codes = codes[codes.count_nonzero(dim=1) == s]
    assert ((network(codes @ D.T) - codes).norm(dim=1) > 0.1).all()


ACTIVATIONS = {"elu": 1.0, "silu": 0.2785, "mish": 0.3089, "gelu": 0.1701}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_other_activations_are_as_near_as_their_beta(certified_dictionaries, name):
    D, W, most = certified_dictionaries["random"]
    s = most - 1
    rho, v = reference.ACTIVATIONS[name], torch.linspace(-30, 30, 200_001, dtype=torch.float64)
    beta = float((rho(v) - F.relu(v)).abs().max())
    assert beta == pytest.approx(ACTIVATIONS[name], abs=1e-3)
    codes = sparse_codes(200, 48, s, B=2.0)
    floors = []
    for scale in (1e-1, 1e-3):
        options = dict(B=2.0, s=s, iterations=40, W=W, beta=scale * beta * (1 + 1e-3))  # the maximum is between points
        network, bounds = theory.certified_lista(D, **options)
        network = theory.lista_with_activation(network, lambda u, scale=scale: scale * rho(u / scale))
        for delta in (0.0, 1e-2):
            network, bounds = theory.certified_lista(D, delta=delta, **options)
            network = theory.lista_with_activation(network, lambda u, scale=scale: scale * rho(u / scale))
            found = network(codes @ D.T + noises(200, W, delta))
            assert ((found - codes).norm(dim=1) <= bounds[-1]).all()
        floors.append(float((network(codes @ D.T) - codes).detach().norm(dim=1).max()))
    assert floors[1] < floors[0]


# --- the deep problem -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep_weights() -> list[Tensor]:
    """W of each layer, and of the product of all three."""
    product = SMALL[0] @ SMALL[1] @ SMALL[2]
    return [SMALL[0], *[theory.generalized_coherence(D)[1] for D in [*SMALL[1:], product]]]


# Codes of 1, 2 and 4 non-zeros: mu = 1/2 would allow one, mu~ allows three.
SMALL = [spikes_and_hadamard(64), chords(128, 136), chords(136, 144)]


@pytest.mark.parametrize("method", ["layerwise", "deepest-first"])
@pytest.mark.parametrize("delta", [0.0, 1e-3])
@pytest.mark.parametrize("J", [1, 2, 3])
def test_deep_codes_are_as_near_as_promised(deep_weights, J, delta, method):
    dictionaries, last = SMALL[:J], 2 if J == 1 else 1
    codes = [sparse_codes(100, dictionaries[-1].shape[1], last)]
    for D in dictionaries[:0:-1]:
        codes.insert(0, codes[0] @ D.T)
    sparsity = [int(x.count_nonzero(dim=1).max()) for x in codes]
    product = dictionaries[0]
    for D in dictionaries[1:]:
        product = product @ D
    weights = deep_weights[:J]
    if method == "deepest-first":
        weights = [deep_weights[3] if J == 3 else theory.analytic_coherence(product)[1]]
    y = codes[0] @ dictionaries[0].T + noises(100, dictionaries[0], delta)
    for iterations in (1, 3, 10, 40, 200):
        found = theory.dsc_solve(
            y, dictionaries, sparsity=sparsity, method=method, iterations=iterations, delta=delta, weights=weights
        )
        assert isinstance(found, list) and [x.shape for x in found] == [x.shape for x in codes]
        for errors, bound, residual in zip(found.errors(codes), found.bounds, found.residuals, strict=True):
            assert (errors <= bound).all()
            assert residual.shape == (100,)
    if delta == 0:
        assert max(found.bounds) < 1e-6
    if method == "layerwise":
        assert found.bounds == sorted(found.bounds)  # errors add
    else:
        assert all(residual.max() < 1e-12 for residual in found.residuals[1:])


def test_the_deep_solver_needs_no_weights_and_refuses_with_the_numbers():
    D = [random_dictionary(10, 12), cycle(12)]
    code = torch.zeros(12).double()
    code[4] = 3.0
    found = theory.dsc_solve(D[0] @ D[1] @ code, D, sparsity=[2, 1], iterations=200, method="deepest-first")
    assert float(found.errors([D[1] @ code, code])[1]) <= found.bounds[1]
    with pytest.raises(
        ValueError, match=r"dsc_solve: sparsity\[1\] is 7, it takes less than \(1 \+ 1/mu\) / 2 = 6, mu"
    ):
        theory.dsc_solve(torch.zeros(12).double(), [torch.eye(12).double(), D[1]], sparsity=[2, 7], iterations=2)


def test_the_bound_on_the_codes_comes_from_the_signal():
    """Codes 1000 times as large: the network is made for them."""
    D = random_dictionary(20, 22)
    codes = sparse_codes(50, 22, 1)
    for scale in (1e-3, 1.0, 1e3):
        found = theory.dsc_solve(scale * codes @ D.T, [D], sparsity=[1], iterations=100)
        assert found.bounds[0] < 1e-6 * scale
        assert (found.errors([scale * codes])[0] <= found.bounds[0]).all()
    empty = theory.dsc_solve(torch.zeros(0, 20).double(), [D], sparsity=[1], iterations=3)
    assert empty[0].shape == (0, 22)


# --- convolutional dictionaries ---------------------------------------------------------------------------------------


def convolutions() -> list:
    generator = torch.Generator().manual_seed(1)
    return CONVOLUTIONS + [random_convolution(generator) for _ in range(30)]


@pytest.mark.parametrize("case", convolutions(), ids=str)
def test_the_matrix_of_a_convolution_is_synthesis_and_its_transpose_analysis(case):
    weight, y = case.weight(), case.signal()
    x = torch.randn_like(reference.analysis(y, weight, **case.geometry))
    D = theory.conv_matrix(weight, case.size, **case.geometry)
    assert D.is_sparse and D.is_coalesced()
    ours = (D @ x.flatten(1).T).T.reshape(y.shape)
    truth = reference.synthesis(x, weight, case.size, **case.geometry)
    assert error(ours, truth) <= ROUNDING * max(1.0, float(truth.abs().max()))
    truth = reference.analysis(y, weight, **case.geometry)
    assert error((D.t() @ y.flatten(1).T).T.reshape(truth.shape), truth) <= ROUNDING * max(
        1.0, float(truth.abs().max())
    )


@pytest.mark.parametrize("case", [c for c in convolutions() if math.prod(c.size) < 300 and c.atoms < 40], ids=str)
def test_the_coherence_of_a_convolution_is_that_of_its_matrix(case):
    weight = case.weight()
    D = theory.conv_matrix(weight, case.size, **case.geometry).to_dense()
    if (D == 0).all(dim=0).any():
        with pytest.raises(ValueError, match="leaves nothing of atom"):
            theory.conv_coherence(weight, case.size, **case.geometry)
    else:
        coherence = theory.conv_coherence(weight, case.size, **case.geometry)
        assert coherence == pytest.approx(theory.mutual_coherence(D), abs=ROUNDING)


@pytest.mark.parametrize("size", range(9, 60, 7))
@pytest.mark.parametrize(
    "geometry", [dict(), dict(stride=2), dict(stride=3, padding=1, dilation=2), dict(padding=2)], ids=str
)
def test_a_small_signal_stands_in_for_a_large_one(size, geometry):
    weight = normal(3, 2, 3)
    D = theory.conv_matrix(weight, size, **geometry).to_dense()
    assert theory.conv_coherence(weight, size, **geometry) == pytest.approx(theory.mutual_coherence(D), abs=ROUNDING)


def test_the_coherence_of_a_large_signal_takes_no_matrix():
    weight = normal(4, 3, 5, 5)
    same = [theory.conv_coherence(weight, n, padding=2, stride=2) for n in (40, 42, 10**6)]
    assert same[0] == same[1] == same[2]


@pytest.mark.parametrize("case", [c for c in convolutions() if c.groups == 1 and c.atoms < 40], ids=str)
def test_the_stripe_norm_counts_the_codes_that_share_pixels(case):
    x = case.code(0.3)
    D = (theory.conv_matrix(torch.ones_like(case.weight()), case.size, **case.geometry).to_dense() != 0).double()
    kernel = [d * (k - 1) + 1 for k, d in zip(case.kernel, pair(case.dilation, case), strict=True)]
    full = theory.stripe_norm(x, kernel, stride=case.stride)
    assert torch.equal(full, theory.stripe_norm(x, case.kernel, stride=case.stride, dilation=case.dilation))
    # Atoms that share a pixel lie in each other's stripe, so no stripe counts fewer than any atom's neighbours.
    neighbours_of_atoms = ((D.T @ D) > 0).double() @ (x != 0).double().flatten(1).T
    assert (neighbours_of_atoms.amax(dim=0) <= full).all()
    if case.dilation == 1 and case.padding == 0:
        assert torch.equal(neighbours_of_atoms.amax(dim=0).long(), full)


def pair(value, case) -> tuple:
    return (value,) * len(case.size) if isinstance(value, int) else value


def test_stripe_sparse_codes_are_found_by_basis_pursuit_however_many_they_are():
    """uniqueness_bound holds for the stripe norm: a long signal may have many non-zeros, far apart."""
    weight = torch.tensor([[[1.0, 0.1, -0.1, 0.05]], [[-0.1, 0.1, 1.0, 0.1]]], dtype=torch.float64)
    size = 60
    D = theory.conv_matrix(weight, size).to_dense()
    bound = theory.uniqueness_bound(theory.conv_coherence(weight, size))
    assert bound > 1
    for _ in range(20):
        x = torch.zeros(1, 2, 57).double()
        places = torch.arange(int(torch.randint(0, 5, ())), 57, 7)
        x[0, torch.randint(0, 2, (len(places),)), places] = normal(len(places))
        assert int(theory.stripe_norm(x, 4)) == 1 < bound < x.count_nonzero()
        assert error(theory.basis_pursuit(D @ x.flatten(), D), x.flatten()) <= LINEAR_PROGRAMME


# --- realisations -----------------------------------------------------------------------------------------------------


def trained(layer: nn.Module) -> nn.Module:
    """A layer that is no longer ISTA: every parameter moved."""
    with torch.no_grad():
        layer.analysis.add_(0.05 * torch.randn_like(layer.analysis))
        layer.theta.mul_(0.5 + torch.rand_like(layer.theta))
    return layer


def linear_layers() -> list[LISTALinear]:
    torch.manual_seed(3)
    options = [dict(), dict(untied=False), dict(one_sided=True), dict(iterations=1)]
    return [trained(LISTALinear(7, 11, **{"iterations": 4, **o}, dtype=torch.float64)) for o in options]


def single(layer: nn.Module) -> nn.Module:
    """A copy in float32."""
    import copy

    return copy.deepcopy(layer).float()


def assert_equal_to_rounding(make, layer: nn.Module, y: Tensor, slack: float = 1.0) -> None:
    """The realisation equals its layer: to 1e-12 of the largest value in float64, within eager's error in float32."""
    with torch.no_grad():
        truth = layer(y)
        assert_as_exact_as_eager([make(layer)(y)], [truth], [truth], ["float64"])
        exact = single(layer).double()(y.float().double())  # of the parameters and signal as rounded
        found, eager = make(single(layer))(y.float()), single(layer)(y.float())
        assert found.dtype == torch.float32
        allowed = 2 * error(eager, exact) + slack * 4 * torch.finfo(torch.float32).eps * float(exact.abs().max())
        assert error(found, exact) <= allowed


# The affine map of an iteration, (1 - W^T D) x + W^T y, is another sum than x + W^T (y - D x): its d + m terms for each
# entry may each be rounded, in each iteration, where the layer's are in two shorter sums.
SUMS = (7 + 11) / 2


@pytest.mark.parametrize("layer", linear_layers(), ids=str)
@pytest.mark.parametrize("bound", [None, 50.0])
def test_the_relu_network_is_its_layer(layer, bound):
    y = 3 * normal(40, 7)
    make = lambda layer: theory.lista_to_relu_network(layer, bound)  # noqa: E731
    if bound is None:
        assert_equal_to_rounding(make, layer, y, SUMS)
    else:  # y + R is rounded as R is, and the layer carries that on
        assert error(make(layer)(y), layer(y)) <= ROUNDING * bound
    network = make(layer)
    assert all(type(module) in (nn.Linear, nn.ReLU) for module in network)
    d, m = 11, 7
    sides = 1 if layer.one_sided else 2
    rows = [len(module.weight) for module in network if isinstance(module, nn.Linear)][::2]
    assert rows == [sides * d + (m if bound else 2 * m)] * (layer.iterations - 1) + [sides * d]
    assert network(y.reshape(4, 10, 7)).shape == (4, 10, 11)


@pytest.mark.parametrize("kernel", [2, 3, 5])
@pytest.mark.parametrize(
    "shape", [(1, 1), (4, 1), (1, 2), (5, 8), (7, 9), (3, 10), (6, 27), (12, 31), (2, 65)], ids=str
)
def test_a_stack_of_convolutions_is_its_matrix(shape, kernel):
    m, d = shape
    A, x, bias = normal(m, d), normal(6, d), normal(m)
    cnn = theory.matrix_to_cnn(A, kernel)
    truth = x @ A.T
    assert error(cnn(x), truth) <= ROUNDING * max(1.0, float(truth.abs().max()))
    assert error(theory.matrix_to_cnn(A, kernel, bias)(x), truth + bias) <= ROUNDING * max(
        1.0, float(truth.abs().max())
    )
    assert all(type(conv) is nn.Conv1d for conv in cnn)
    assert all(conv.kernel_size == conv.stride == (kernel,) for conv in cnn)
    # Integers come out exactly: no value but A's and 1 enters.
    A, x = A.mul(8).round(), x.mul(8).round()
    assert torch.equal(theory.matrix_to_cnn(A, kernel)(x), x @ A.T)
    size = theory.network_size(cnn)
    L = max(1, math.ceil(round(math.log(d, kernel), 9)))
    assert size.depth == L
    assert size.weights == sum(kernel ** (2 * depth) for depth in range(1, L)) + m * kernel**L
    assert size.nonzeros <= sum(kernel**depth for depth in range(1, L)) + m * d


@pytest.mark.parametrize("layer", linear_layers(), ids=str)
@pytest.mark.parametrize("kernel", [2, 3])
def test_the_convolutional_network_is_its_layer(layer, kernel):
    assert_equal_to_rounding(lambda layer: theory.lista_to_cnn(layer, kernel), layer, 3 * normal(20, 7), SUMS)


def test_depth_and_weights_of_the_network_are_of_the_stated_orders():
    """depth <= 2 K (log_s(2 d + 2 m) + 1), weights <= K times a constant times (d + m)^2, over a range of sizes."""
    for d, K, s in itertools.product((8, 32, 128), (1, 3), (2, 3, 5)):
        m = d // 2
        size = theory.network_size(theory.lista_to_cnn(LISTALinear(m, d, K), s))
        rows = 2 * (d + m)
        assert size.depth <= 2 * K * (math.log(rows, s) + 1)
        # Each matrix has at most (s n)^2 / (s^2 - 1) weights that gather n = rows values, and (s n) rows that multiply.
        assert size.weights <= 2 * K * (s**2 / (s**2 - 1) + s) * rows**2 + 2 * K * rows
        assert size.nonzeros <= size.weights


@pytest.mark.parametrize("rho", ["relu", "elu", F.relu, F.silu], ids=["named relu", "named elu", "relu", "silu"])
@pytest.mark.parametrize("layer", linear_layers()[:3], ids=str)
def test_other_activations_are_the_formula(layer, rho):
    y = normal(10, 7)
    found = theory.lista_with_activation(layer, rho).requires_grad_(False)
    activation = reference.ACTIVATIONS[rho] if isinstance(rho, str) else rho
    x = torch.zeros(10, 11).double()
    for k in range(layer.iterations):
        W, theta = (layer.analysis[k], layer.theta[k]) if layer.untied else (layer.analysis, layer.theta)
        u = x + (y - x @ layer.dictionary) @ W.T
        x = activation(u - theta) - (0 if layer.one_sided else activation(-u - theta))
    x = x.detach()
    assert error(found(y), x) <= ROUNDING * max(1.0, float(x.abs().max()))
    if rho in ("relu", F.relu):
        assert error(found(y), layer(y).detach()) <= ROUNDING * max(1.0, float(x.abs().max()))
    found.requires_grad_()
    torch.autograd.grad(found(y).square().sum(), list(found.parameters()))


CONV_LAYERS = {
    "same": lambda: LISTAConv(1, 4, 3, 3, dtype=torch.float64),
    "stride": lambda: LISTAConv(2, 6, 5, 3, stride=2, theta=0.02, dtype=torch.float64),
    "groups": lambda: LISTAConv(4, 6, 3, 2, stride=(1, 2), dilation=(2, 1), groups=2, dtype=torch.float64),
    "wide border": lambda: LISTAConv(2, 3, (2, 3), 2, padding=4, theta=0.02, dtype=torch.float64),
    "tied": lambda: LISTAConv(1, 4, 4, 3, padding=0, untied=False, one_sided=True, dtype=torch.float64),
    "line": lambda: LISTAConv1d(2, 5, 5, 3, stride=3, dtype=torch.float64),
}


@pytest.mark.parametrize("name", CONV_LAYERS)
def test_the_transformer_is_its_layer(name):
    layer = trained(CONV_LAYERS[name]())
    size = (13,) if name == "line" else (9, 8)
    y = normal(2, layer.in_channels, *size)
    assert layer(y).count_nonzero() > 10
    assert_equal_to_rounding(theory.lista_to_transformer, layer, y, SUMS)
    if name != "tied":
        truth = layer(y).detach()
        assert error(theory.lista_with_activation(layer, F.relu)(y).detach(), truth) <= ROUNDING * float(
            truth.abs().max()
        )


@pytest.mark.parametrize(
    "case", [c for c in convolutions() if math.prod(c.size) < 250 and c.padding != "same"], ids=str
)
def test_attention_is_its_convolution(case):
    kind = nn.Conv1d if len(case.size) == 1 else nn.Conv2d
    options = dict(case.geometry, bias=case.atoms % 2 == 0, dtype=torch.float64)
    conv = kind(case.channels, case.atoms, case.kernel, **options)
    y = case.signal()
    attention = theory.conv_to_attention(conv)
    assert attention.centres.shape == (math.prod(case.kernel), len(case.size))
    assert_equal_to_rounding(theory.conv_to_attention, conv, y, SUMS)
    # Every head gives its whole attention to one pixel.
    padded = [n + 2 * p for n, p in zip(case.size, pair(case.padding, case), strict=True)]
    heads = attention.attention(padded)
    assert torch.equal(heads.amax(dim=-1), torch.ones_like(heads[..., 0]))
    assert error(heads.sum(dim=-1).detach(), torch.ones_like(heads[..., 0])) <= ROUNDING


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_attention_takes_the_names_of_paddings(padding):
    conv = nn.Conv2d(2, 3, (3, 5), padding=padding, dilation=(2, 1), dtype=torch.float64)
    assert_equal_to_rounding(theory.conv_to_attention, conv, normal(2, 2, 9, 8), SUMS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_in_low_precision(dtype):
    conv, y = nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, 6, 7)
    low, y = conv.to(dtype), y.to(dtype)
    truth = nn.functional.conv2d(y.double(), low.weight.double(), low.bias.double(), padding=1).detach()
    ours = theory.conv_to_attention(low)(y).detach()
    assert_as_exact_as_eager([ours], [low(y).detach()], [truth], [str(dtype)])
    assert theory.conv_to_attention(low)(y[:0]).shape == (0, 5, 6, 7)


def test_attention_learns():
    """It is a module with parameters, the positions of the heads among them."""
    attention = theory.conv_to_attention(nn.Conv2d(1, 2, 3, padding=1))
    gradients = torch.autograd.grad(attention(torch.randn(1, 1, 5, 5)).sum(), list(attention.parameters()))
    assert [name for name, _ in attention.named_parameters()] == [
        "centres",
        "sharpness",
        "output.weight",
        "output.bias",
    ]
    assert all(g.isfinite().all() for g in gradients)


def test_codes_after_each_iteration():
    layer = linear_layers()[0]
    y = normal(2, 3, 7)
    found = theory.iterates(layer, y)
    assert found.shape == (4, 2, 3, 11)
    assert torch.equal(found[-1], layer(y))
    for k in range(3):
        x = functional.lista(
            y.reshape(6, 7, 1), layer.dictionary[..., None], layer.analysis[: k + 1, ..., None], layer.theta[: k + 1]
        )
        assert torch.equal(found[k].reshape(6, 11), x[..., 0])
