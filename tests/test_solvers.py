"""ISTA and FISTA as solvers: the objective falls, the step is right, and the minimum is that of scikit-learn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numerics import CONVOLUTIONS, Convolution, random_convolution
from torch import Tensor

from dsc_ops import LISTALinear
from dsc_ops.functional import analysis, ista, lasso_objective, lipschitz, synthesis

SMALL = [
    Convolution(1, 1, 3, (12,), (3,), padding="same"),
    Convolution(2, 2, 4, (11,), (4,), stride=3, padding=1, dilation=2, groups=2),
    Convolution(1, 1, 4, (7, 6), (3, 3)),
    Convolution(2, 2, 3, (6, 5), (3, 1), stride=(2, 1), padding=(1, 0)),
    Convolution(1, 4, 4, (7, 7), (3, 3), padding=2, dilation=2, groups=4),
    Convolution(1, 2, 5, (4, 9), (2, 5), stride=(1, 2), padding=(0, 2), dilation=(3, 1)),
]


# --- analysis and synthesis -------------------------------------------------------------------------------------------


def is_adjoint(case: Convolution) -> bool:
    y, weight = case.signal(), case.weight()
    codes = analysis(y, weight, **case.geometry)
    assert case.padding != "same" or codes.shape[2:] == y.shape[2:]
    x = torch.randn_like(codes)
    decoded = synthesis(x, weight, case.size, **case.geometry)
    assert decoded.shape == y.shape
    left, right = (codes * x).sum(), (y * decoded).sum()
    return abs(left - right).item() <= 1e-12 * (codes.norm() * x.norm()).item()


def one_argument_at_a_time() -> list[Convolution]:
    """Every value of one argument beside defaults of the others, in one and two dimensions."""
    cases = []
    for size in ((13,), (11, 8)):
        kernels = [(1,) * len(size), (2,) * len(size), (5,) * len(size), (4, 3)[: len(size)], size]
        cases += [Convolution(2, 3, 4, size, kernel) for kernel in kernels]
        kernel = (3,) * len(size)
        cases += [Convolution(2, 3, 4, size, kernel, stride=s) for s in (2, 3, 20, (3, 1)[: len(size)])]
        cases += [Convolution(2, 3, 4, size, kernel, padding=p) for p in (1, 2, 5, (0, 2)[-len(size) :])]
        cases += [Convolution(2, 3, 4, size, kernel, padding="same", dilation=d) for d in (1, 2, (2, 3)[: len(size)])]
        cases += [Convolution(2, 3, 4, size, kernel, dilation=d) for d in (2, 3, (1, 3)[-len(size) :])]
        cases += [Convolution(2, 6, 12, size, kernel, groups=g) for g in (2, 3, 6)]
        cases += [Convolution(1, 1, 1, (1,) * len(size), (5,) * len(size), padding="same")]
    return cases


@pytest.mark.parametrize("case", one_argument_at_a_time() + CONVOLUTIONS, ids=str)
def test_synthesis_is_the_adjoint_of_analysis(case):
    assert is_adjoint(case)


def test_synthesis_is_the_adjoint_of_analysis_for_random_arguments():
    generator = torch.Generator().manual_seed(2)
    for _ in range(100):
        case = random_convolution(generator)
        assert is_adjoint(case), case


# --- lipschitz --------------------------------------------------------------------------------------------------------


def synthesis_matrix(dictionary: Tensor, case: Convolution) -> Tensor:
    """S_D as a matrix (code entries, signal entries), a row being the image of one basis vector."""
    codes = analysis(torch.zeros(1, case.channels, *case.size, dtype=dictionary.dtype), dictionary, **case.geometry)
    basis = torch.eye(codes.numel(), dtype=dictionary.dtype).reshape(-1, *codes.shape[1:])
    return synthesis(basis, dictionary, case.size, **case.geometry).flatten(1)


def largest_eigenvalue(dictionary: Tensor, case: Convolution) -> Tensor:
    matrix = synthesis_matrix(dictionary, case)
    return torch.linalg.eigvalsh(matrix @ matrix.T)[-1]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_lipschitz_is_the_largest_eigenvalue(case):
    dictionary = case.weight()
    torch.testing.assert_close(
        lipschitz(dictionary, case.size, **case.geometry), largest_eigenvalue(dictionary, case), rtol=1e-6, atol=0
    )


def test_lipschitz_is_the_largest_eigenvalue_for_random_arguments():
    generator = torch.Generator().manual_seed(3)
    for _ in range(25):
        case = random_convolution(generator)
        dictionary = case.weight()
        exact = largest_eigenvalue(dictionary, case)
        # Lanczos has 40 steps: exact for up to 40 signal values, a lower bound in any case.
        tolerance = 1e-9 if case.channels * np.prod(case.size) <= 40 else 1e-3
        value = lipschitz(dictionary, case.size, **case.geometry)
        assert (1 - tolerance) * exact <= value <= (1 + 1e-9) * exact, case


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_lipschitz_is_homogeneous(scale):
    case, dictionary = SMALL[3], SMALL[3].weight().float()
    expected = scale**2 * lipschitz(dictionary, case.size, **case.geometry)
    torch.testing.assert_close(lipschitz(scale * dictionary, case.size, **case.geometry), expected, rtol=1e-4, atol=0)


def test_lipschitz_of_a_zero_dictionary_is_zero():
    dictionary = torch.zeros(2, 1, 3, requires_grad=True)
    value = lipschitz(dictionary, 9)
    assert value == 0
    assert torch.autograd.grad(value, dictionary)[0].abs().sum() == 0


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradient_of_lipschitz(case):
    dictionary = case.weight().requires_grad_()
    assert torch.autograd.gradcheck(lambda d: lipschitz(d, case.size, **case.geometry), dictionary, fast_mode=True)


# --- the objective ----------------------------------------------------------------------------------------------------


def problem(case: Convolution) -> tuple[Tensor, Tensor, Tensor]:
    """Signal, dictionary, and a lam for each atom at which a minimiser has zeros and non-zeros."""
    y, dictionary = case.signal(), case.weight()
    largest = analysis(y, dictionary, **case.geometry).abs().amax()
    return y, dictionary, largest * (0.05 + 0.2 * torch.rand(case.atoms, dtype=torch.float64))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_objective_is_its_definition(case):
    y, dictionary, lam = problem(case)
    x = case.code(0.5)
    decoded = x.flatten(1) @ synthesis_matrix(dictionary, case)
    norms = x.abs().transpose(0, 1).flatten(2).sum(2)  # (M, N)
    for weights in (lam, lam[0], lam[0].item()):
        each = lam if weights is lam else lam[:1].expand(case.atoms)
        expected = (y.flatten(1) - decoded).square().sum(1) / 2 + each @ norms
        torch.testing.assert_close(lasso_objective(x, y, dictionary, weights, **case.geometry), expected)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradient_of_the_objective(case):
    y, dictionary, lam = (t.requires_grad_() for t in problem(case))
    x = case.code(1.0).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, y, d, lam: lasso_objective(x, y, d, lam, **case.geometry), (x, y, dictionary, lam), fast_mode=True
    )


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_objective_of_ista_never_rises(case, one_sided):
    y, dictionary, lam = problem(case)
    options = case.geometry
    step = 1 / lipschitz(dictionary, case.size, **options)
    x = torch.zeros_like(analysis(y, dictionary, **options))
    before = lasso_objective(x, y, dictionary, lam, **options)
    start = before
    for k in range(1, 31):
        # One step after the other; the first ten also as k steps at once, from zero.
        x = ista(y, dictionary, lam, iterations=1, step=step, x0=x, one_sided=one_sided, **options)
        if k <= 10:
            at_once = ista(y, dictionary, lam, iterations=k, one_sided=one_sided, **options)
            torch.testing.assert_close(at_once, x)
        objective = lasso_objective(x, y, dictionary, lam, **options)
        assert (objective <= before * (1 + 1e-12)).all(), f"iteration {k}: {before} to {objective}"
        before = objective
    assert (objective < 0.99 * start).all()


def test_objective_of_ista_never_rises_from_any_start():
    case = SMALL[4]
    y, dictionary, lam = problem(case)
    x = 10 * torch.randn_like(analysis(y, dictionary, **case.geometry))
    for _ in range(20):
        before = lasso_objective(x, y, dictionary, lam, **case.geometry)
        x = ista(y, dictionary, lam, iterations=1, x0=x, **case.geometry)
        assert (lasso_objective(x, y, dictionary, lam, **case.geometry) < before).all()


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_fista_is_ahead_of_ista(case, one_sided):
    y, dictionary, lam = problem(case)
    options = case.geometry | dict(iterations=20, one_sided=one_sided)
    slow, fast = (
        lasso_objective(ista(y, dictionary, lam / 10, fast=fast, **options), y, dictionary, lam / 10, **case.geometry)
        for fast in (False, True)
    )
    assert (fast < slow).all()


@pytest.mark.parametrize("one_sided", [False, True])
def test_fista_is_that_of_beck_and_teboulle(one_sided):
    """Written out with a matrix: momentum (m_l - 1) / m_{l+1}, m_1 = 1, m_{l+1} = (1 + sqrt(1 + 4 m_l^2)) / 2."""
    case = SMALL[3]
    y, dictionary, _ = problem(case)
    matrix, lam = synthesis_matrix(dictionary, case), 0.1
    step = 1 / largest_eigenvalue(dictionary, case)
    z = before = torch.zeros(case.batch, matrix.shape[0], dtype=torch.float64)
    m = 1.0
    for k in range(1, 13):
        u = z + step * (y.flatten(1) - z @ matrix) @ matrix.T
        x = torch.relu(u - lam * step) - (0 if one_sided else torch.relu(-u - lam * step))
        codes = ista(y, dictionary, lam, iterations=k, step=step, fast=True, one_sided=one_sided, **case.geometry)
        torch.testing.assert_close(codes.flatten(1), x)
        m_next = (1 + (1 + 4 * m * m) ** 0.5) / 2
        z, before, m = x + (m - 1) / m_next * (x - before), x, m_next


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_solution_satisfies_the_optimality_conditions(case, one_sided):
    """A_D(y - S_D x) = lam sign(x) on the support; elsewhere at most lam in size, or at most lam when x >= 0."""
    y, dictionary, lam = problem(case)
    options = case.geometry | dict(one_sided=one_sided)
    x = ista(y, dictionary, lam, iterations=3000, fast=True, **options)
    gradient = analysis(y - synthesis(x, dictionary, case.size, **case.geometry), dictionary, **case.geometry)
    bound = lam.reshape(-1, *[1] * len(case.size)).expand_as(x)
    support = x != 0
    assert 0 < support.sum() < x.numel()
    torch.testing.assert_close(gradient[support], (bound * x.sign())[support], rtol=1e-6, atol=1e-7)
    outside = gradient[~support] if one_sided else gradient[~support].abs()
    assert (outside <= bound[~support] * (1 + 1e-6)).all()
    assert not one_sided or (x >= 0).all()
    # ... and is then a fixed point.
    torch.testing.assert_close(ista(y, dictionary, lam, iterations=1, x0=x, **options), x, rtol=1e-6, atol=1e-7)


# --- against scikit-learn ---------------------------------------------------------------------------------------------


def sklearn_objective(y: np.ndarray, matrix: np.ndarray, lam: float, positive: bool) -> tuple[float, np.ndarray]:
    """min 1/2 ||y - matrix x||^2 + lam ||x||_1 by coordinate descent; matrix has atoms in its columns."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    solver = linear_model.Lasso(alpha=lam / len(y), fit_intercept=False, positive=positive, tol=1e-12, max_iter=200_000)
    x = solver.fit(matrix, y).coef_
    return dense_objective(x, y, matrix, lam), x


def dense_objective(x: np.ndarray, y: np.ndarray, matrix: np.ndarray, lam: float) -> float:
    return 0.5 * float(np.sum((y - matrix @ x) ** 2)) + lam * float(np.abs(x).sum())


def convolution_matrix(dictionary: np.ndarray, case: Convolution) -> tuple[np.ndarray, tuple[int, ...]]:
    """The synthesis written out, (signal entries, code entries), from the definition: code pixel i and tap k meet
    signal pixel i stride - padding + k dilation."""
    dims = len(case.size)

    def each(value):
        return value if isinstance(value, tuple) else (value,) * dims

    stride, padding, dilation = each(case.stride), each(case.padding), each(case.dilation)
    spans = zip(case.size, padding, dilation, case.kernel, stride, strict=True)
    code_size = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in spans)
    matrix = np.zeros((case.channels, *case.size, case.atoms, *code_size))
    channels, atoms = case.channels // case.groups, case.atoms // case.groups
    for m, c in itertools.product(range(case.atoms), range(channels)):
        channel = m // atoms * channels + c
        for code_pixel in np.ndindex(*code_size):
            for tap in np.ndindex(*case.kernel):
                axes = zip(code_pixel, stride, padding, tap, dilation, strict=True)
                pixel = tuple(i * s - p + k * d for i, s, p, k, d in axes)
                if all(0 <= a < n for a, n in zip(pixel, case.size, strict=True)):
                    matrix[(channel, *pixel, m, *code_pixel)] += dictionary[(m, c, *tap)]
    return matrix.reshape(case.channels * int(np.prod(case.size)), -1), (case.atoms, *code_size)


CONVOLUTIONAL = [
    Convolution(1, 1, 4, (30,), (5,), padding=2),
    Convolution(1, 1, 6, (9, 8), (3, 3), padding=1),
    Convolution(1, 2, 8, (9, 10), (4, 3), stride=2, padding=(1, 2)),
    Convolution(1, 4, 6, (7, 8), (3, 3), padding=(2, 1), dilation=(2, 1), groups=2),
]


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("case", CONVOLUTIONAL, ids=str)
def test_convolutional_lasso_of_sklearn(case, one_sided):
    y, dictionary = case.signal(), case.weight()
    matrix, code_shape = convolution_matrix(dictionary.numpy(), case)
    lam = 0.1 * float(np.abs(matrix.T @ y.numpy().ravel()).max())
    expected, _ = sklearn_objective(y.numpy().ravel(), matrix, lam, one_sided)
    x = ista(y, dictionary, lam, iterations=4000, fast=True, one_sided=one_sided, **case.geometry)
    assert x.shape[1:] == code_shape and 0 < (x != 0).sum() < x.numel()
    assert lasso_objective(x, y, dictionary, lam, **case.geometry).item() == pytest.approx(expected, rel=1e-6)
    assert dense_objective(x.numpy().ravel(), y.numpy().ravel(), matrix, lam) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("one_sided", [False, True])
def test_dense_lasso_of_sklearn(one_sided):
    """A dense problem is one with kernels of one pixel; samples are pixels."""
    atoms, length, samples = 60, 25, 3
    dictionary = torch.nn.functional.normalize(torch.randn(atoms, length, dtype=torch.float64), dim=1)
    y = torch.randn(samples, length, dtype=torch.float64)
    lam = 0.1 * (y @ dictionary.T).abs().max().item()
    x = ista(y.T.unsqueeze(0), dictionary.unsqueeze(-1), lam, iterations=5000, fast=True, one_sided=one_sided).squeeze(
        0
    )
    for n in range(samples):
        expected, codes = sklearn_objective(y[n].numpy(), dictionary.T.numpy(), lam, one_sided)
        assert dense_objective(x[:, n].numpy(), y[n].numpy(), dictionary.T.numpy(), lam) == pytest.approx(
            expected, rel=1e-6
        )
        np.testing.assert_allclose(x[:, n].numpy(), codes, atol=1e-4)


@pytest.mark.parametrize("one_sided", [False, True])
def test_untrained_dense_layer_solves_the_lasso_of_sklearn(one_sided):
    length, atoms, theta = 30, 20, 0.05
    dictionary = torch.nn.functional.normalize(torch.randn(atoms, length, dtype=torch.float64), dim=1)
    layer = LISTALinear.from_dictionary(dictionary, 3000, theta=theta, untied=False, one_sided=one_sided)
    lam = theta * torch.linalg.matrix_norm(dictionary, 2).item() ** 2
    y = torch.randn(4, length, dtype=torch.float64)
    with torch.no_grad():
        x = layer(y)
    assert 0 < (x != 0).sum() < x.numel()
    for signal, codes in zip(y.numpy(), x.numpy(), strict=True):
        expected, _ = sklearn_objective(signal, dictionary.T.numpy(), lam, one_sided)
        assert dense_objective(codes, signal, dictionary.T.numpy(), lam) == pytest.approx(expected, rel=1e-6)
