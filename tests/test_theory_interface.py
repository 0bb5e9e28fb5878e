"""dsc_ops.theory from outside: promised names and arguments, examples, error messages, and life without scipy."""

from __future__ import annotations

import ast
import doctest
import inspect
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from test_docstrings import written
from test_errors import raise_statements, raised
from torch import nn

from dsc_ops import LISTAConv, LISTALinear, theory
from dsc_ops.theory import _checks, _programmes, coherence, convolution, guarantees, realization, solvers

MODULES = (coherence, convolution, guarantees, realization, solvers)
ROOT = Path(__file__).parents[1]
NEEDS_SCIPY = pytest.mark.skipif(find_spec("scipy") is None, reason="needs pip install dsc_ops[theory]")

# --- names, arguments, examples ---------------------------------------------------------------------------------------

GEOMETRY = "*, stride=1, padding=0, dilation=1, groups=1"
SIGNATURES = [
    "mutual_coherence(D)",
    "generalized_coherence(D)",
    "coherence_certificate(D)",
    "analytic_coherence(D)",
    f"conv_matrix(weight, signal_size, {GEOMETRY})",
    f"conv_coherence(weight, signal_size, {GEOMETRY})",
    "stripe_norm(x, kernel_size, *, stride=1, dilation=1, alpha=0.0)",
    "uniqueness_bound(mu)",
    "deep_uniqueness_bounds(dictionaries)",
    "is_unique(codes, dictionaries, alpha=0.0)",
    "stability_bound(eps, lambdas, dictionaries)",
    "noise_stability_bound(noise, lambdas, dictionaries)",
    "model_stability_bound(eps, lambdas, dictionaries)",
    "earlier_stability_bounds(noise, lambdas, dictionaries)",
    "convergence_rate(mu, s)",
    "basis_pursuit(y, D)",
    "certified_lista(D, *, B, s, delta=0.0, iterations, W=None, beta=0.0)",
    "dsc_solve(y, dictionaries, *, sparsity, method='layerwise', iterations, delta=0.0, weights=None)",
    "iterates(layer, y)",
    "lista_to_relu_network(layer, signal_bound=None)",
    "matrix_to_cnn(A, kernel_size, bias=None)",
    "lista_to_cnn(layer, kernel_size, signal_bound=None)",
    "network_size(network)",
    "lista_with_activation(layer, rho)",
    "conv_to_attention(conv)",
    "lista_to_transformer(layer)",
]
CLASSES = {"Certificate", "DeepCodes", "NetworkSize", "UniquenessBound"}


def name_of(signature: str) -> str:
    return signature.partition("(")[0]


@pytest.mark.parametrize("signature", SIGNATURES, ids=name_of)
def test_signatures(signature):
    function = getattr(theory, name_of(signature))
    assert written(name_of(signature), function) == signature
    annotated = inspect.signature(function)
    assert annotated.return_annotation is not annotated.empty
    assert all(p.annotation is not p.empty for p in annotated.parameters.values())
    for part in ("Source:", "Returns:", "Args:", ">>>"):
        assert part in function.__doc__, f"{function.__name__} has no {part}"


def test_public_names_are_the_promised_ones():
    assert set(theory.__all__) == {name_of(signature) for signature in SIGNATURES} | CLASSES
    assert sorted(sum((module.__all__ for module in MODULES), [])) == sorted(theory.__all__)
    import dsc_ops

    assert dsc_ops.theory is theory and "theory" in dsc_ops.__all__


def examples() -> dict[str, doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=False)
    tests = [test for module in MODULES for test in finder.find(module, extraglobs=dict(torch=torch))]
    return {test.name: test for test in tests}


EXAMPLES = examples()


@NEEDS_SCIPY
@pytest.mark.parametrize("name", [name for name, test in EXAMPLES.items() if test.examples])
def test_example(name):
    said = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.DocTestRunner(optionflags=flags).run(EXAMPLES[name], out=said.append, clear_globs=False)
    assert result.attempted and not result.failed, "".join(said)


@pytest.mark.parametrize("name", theory.__all__)
def test_each_public_name_has_an_example(name):
    test = EXAMPLES[f"{getattr(theory, name).__module__}.{name}"]
    assert any(name in example.source for example in test.examples)


# --- errors -----------------------------------------------------------------------------------------------------------

D = torch.cat([torch.eye(3), torch.full((3, 1), 0.6)], dim=1)
LAYER = LISTALinear(3, 4, iterations=1)
W = torch.ones(2, 1, 3)
ZERO = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
Case = tuple[Callable[[], object], type[Exception], str]


def case(kind: type[Exception], message: str, function: Callable, *arguments, **options) -> Case:
    return lambda: function(*arguments, **options), kind, f"{function.__name__}: {message}"


def certified(**changes):
    return theory.certified_lista(**({"D": D, "B": 1.0, "s": 1, "iterations": 2, "W": D} | changes))


def solve(**changes):
    right = {"y": torch.zeros(3), "dictionaries": [torch.eye(3)], "sparsity": [1], "iterations": 2}
    return theory.dsc_solve(**(right | {"weights": [torch.eye(3)]} | changes))


def named(name: str, kind: type[Exception], message: str, function: Callable, **changes) -> Case:
    return lambda: function(**changes), kind, f"{name}: {message}"


def matrix_cases() -> list[Case]:
    """Every function of one dictionary: no tensor, wrong dtype, shape, value."""
    cases = []
    for function in (
        theory.mutual_coherence,
        theory.generalized_coherence,
        theory.coherence_certificate,
        theory.analytic_coherence,
    ):
        cases += [
            case(TypeError, "D must be a torch.Tensor, got list", function, [[1.0]]),
            case(TypeError, "D has dtype torch.int64, it takes float32", function, D.long()),
            case(ValueError, "D has shape (3,), it takes (m, d), sizes of at least 1", function, D[:, 0]),
            case(ValueError, "D has shape (0, 4), it takes (m, d), sizes of at least 1", function, D[:0]),
            case(ValueError, "D has values that are not finite", function, D / 0),
            case(ValueError, "D has a zero column, number 1: it takes atoms", function, ZERO),
        ]
    return cases


def guarantee_cases() -> list[Case]:
    bound, unique = theory.stability_bound, theory.is_unique
    return [
        case(ValueError, "mu is -0.5, it takes a number of at least 0", theory.uniqueness_bound, -0.5),
        case(TypeError, "mu must be a number, got str", theory.uniqueness_bound, "0.5"),
        case(TypeError, "dictionaries must be a sequence of at least one matrix, got Tensor", bound, [0, 0], [1], D),
        case(TypeError, "dictionaries must be a sequence of at least one matrix, got list", bound, [0, 0], [1], []),
        case(
            ValueError,
            "dictionaries[1] has shape (3, 4), it takes 4 rows, as many as dictionaries[0] has columns",
            bound,
            [0, 0, 0],
            [1, 1],
            [D, D],
        ),
        case(
            TypeError,
            "dictionaries[1] has dtype torch.float64",
            theory.deep_uniqueness_bounds,
            [D, torch.eye(4).double()],
        ),
        case(ValueError, "lambdas has 2 values, it takes 1, one for each dictionary", bound, [0, 0], [1, 1], [D]),
        case(TypeError, "lambdas must be a sequence of 1 one for each dictionary, got int", bound, [0, 0], 1, [D]),
        case(ValueError, "lambdas[0] is 0, it takes an integer of at least 1", bound, [0, 0], [0], [D]),
        case(ValueError, "lambdas[0] is 3, it takes less than (1 + 1/mu) / 2 = ", bound, [0, 0], [3], [D]),
        case(ValueError, "eps has 1 values, it takes 2, the noise and one for each", bound, [0], [1], [torch.eye(3)]),
        case(ValueError, "eps[1] is -1, it takes a number of at least 0", bound, [0, -1], [1], [torch.eye(3)]),
        case(ValueError, "noise is -1, it takes", theory.noise_stability_bound, -1, [1], [torch.eye(3)]),
        case(ValueError, "noise is -1, it takes", theory.earlier_stability_bounds, -1, [1], [torch.eye(3)]),
        case(ValueError, "eps has 2 values, it takes 1", theory.model_stability_bound, [0, 0], [1], [torch.eye(3)]),
        case(ValueError, "codes has 2 values, it takes 1, one for each", unique, [D[0], D[0]], [D]),
        case(ValueError, "codes[0] has shape (3,), it takes (*, 4)", unique, [D[:, 0]], [D]),
        case(ValueError, "alpha is -1, it takes", unique, [D[0]], [D], -1),
        case(TypeError, "mu must be a number, got Tensor", theory.convergence_rate, torch.tensor(0.5), 1),
        case(ValueError, "s is 0, it takes an integer of at least 1", theory.convergence_rate, 0.5, 0),
    ]


def convolution_cases() -> list[Case]:
    cases = []
    for function in (theory.conv_matrix, theory.conv_coherence):
        cases += [
            case(ValueError, "weight has shape (3, 4), it takes (M, C/groups, k) or", function, D, 5),
            case(ValueError, "signal_size has 2 values, it takes one or 1", function, W, (5, 5)),
            case(ValueError, "kernel (3,) with dilation (1,) does not fit into a signal of size (2,)", function, W, 2),
            case(ValueError, "stride is 0, it takes an integer of at least 1", function, W, 5, stride=0),
        ]
    stripe = theory.stripe_norm
    return cases + [
        case(
            ValueError,
            "padding is (3,), it leaves nothing of atom 0 at the border",
            theory.conv_coherence,
            W,
            5,
            padding=3,
        ),
        case(ValueError, "x has shape (3, 4), it takes (N, M, *code_size) with one or two axes", stripe, D, 3),
        case(ValueError, "kernel_size is 0, it takes an integer of at least 1", stripe, D[None], 0),
        case(ValueError, "alpha is -1, it takes a number of at least 0", stripe, D[None], 3, alpha=-1),
    ]


def solver_cases() -> list[Case]:
    def refused(kind: type[Exception], message: str, **changes) -> Case:
        return named("certified_lista", kind, message, certified, **changes)

    def unsolved(kind: type[Exception], message: str, **changes) -> Case:
        return named("dsc_solve", kind, message, solve, **changes)

    return [
        refused(ValueError, "B is -1, it takes a number of at least 0", B=-1),
        refused(ValueError, "s is 0, it takes an integer of at least 1", s=0),
        refused(ValueError, "s is 9, it takes less than (1 + 1/mu) / 2 = ", s=9),
        refused(ValueError, "delta is -1, it takes", delta=-1),
        refused(ValueError, "iterations is 0, it takes", iterations=0),
        refused(ValueError, "beta is -1, it takes", beta=-1),
        refused(ValueError, "W has shape (4, 3), it takes that of D, (3, 4)", W=D.T),
        refused(TypeError, "W has dtype torch.float64, D has torch.float32", W=D.double()),
        refused(ValueError, "W has values that are not finite", W=D / 0),
        refused(ValueError, "W has a column with w_i^T d_i = -", W=-D),
        unsolved(ValueError, "y has shape (4,), it takes (*, 3)", y=torch.zeros(4)),
        unsolved(ValueError, "method is 'fastest', it takes one of layerwise, deepest-first", method="fastest"),
        unsolved(TypeError, "sparsity must be a sequence of 1 one for each dictionary, got int", sparsity=1),
        unsolved(ValueError, "sparsity[0] is 0, it takes", sparsity=[0]),
        unsolved(ValueError, "weights has 2 values, it takes 1, one for each network", weights=[D, D]),
        unsolved(
            ValueError,
            "the product of dictionaries has a zero column, number 0",
            dictionaries=[torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [-1.0]])],
            y=torch.zeros(1),
            sparsity=[1, 1],
            method="deepest-first",
        ),
        case(TypeError, "layer must be a LISTALinear, got Linear", theory.iterates, nn.Linear(3, 4), D),
        case(ValueError, "y has shape (4,), it takes (*, 3)", theory.iterates, LAYER, torch.zeros(4)),
        named(
            "DeepCodes.errors",
            ValueError,
            "codes has 0 values, it takes 1, one for each layer",
            theory.DeepCodes([D], [0.0], [D]).errors,
            codes=[],
        ),
    ]


def realization_cases() -> list[Case]:
    relu, cnn, attention = theory.lista_to_relu_network, theory.matrix_to_cnn, theory.conv_to_attention
    conv = LISTAConv(1, 2, 3)
    return [
        case(TypeError, "layer must be a LISTALinear, got LISTAConv", relu, conv),
        case(ValueError, "signal_bound is -1, it takes a number of at least 0", relu, LAYER, -1),
        case(ValueError, "A has shape (3,), it takes (m, d)", cnn, D[:, 0], 2),
        case(ValueError, "kernel_size is 1, it takes an integer of at least 2", cnn, D, 1),
        case(ValueError, "bias has shape (4,), it takes (3,)", cnn, D, 2, torch.zeros(4)),
        case(ValueError, "kernel_size is 1, it takes an integer of at least 2", theory.lista_to_cnn, LAYER, 1),
        case(TypeError, "layer must be a LISTALinear, got LISTAConv", theory.lista_to_cnn, conv, 2),
        case(TypeError, "network must be a Module, got list", theory.network_size, []),
        case(
            ValueError,
            "rho is 'tanh', it takes a function or one of relu, leaky_relu, elu, silu, mish, gelu",
            theory.lista_with_activation,
            LAYER,
            "tanh",
        ),
        case(
            TypeError,
            "layer must be a LISTALinear or LISTAConv or LISTAConv1d, got Linear",
            theory.lista_with_activation,
            nn.Linear(1, 1),
            "elu",
        ),
        case(TypeError, "conv must be a Conv2d or Conv1d, got Linear", attention, nn.Linear(1, 1)),
        case(
            ValueError,
            "conv has padding_mode 'reflect', it takes \"zeros\"",
            attention,
            nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"),
        ),
        case(
            ValueError,
            'conv has padding "same" with kernel (2, 3), it takes odd kernels',
            attention,
            nn.Conv2d(1, 1, (2, 3), padding="same"),
        ),
        case(
            TypeError, "layer must be a LISTAConv or LISTAConv1d, got LISTALinear", theory.lista_to_transformer, LAYER
        ),
    ]


CASES = [*matrix_cases(), *guarantee_cases(), *convolution_cases(), *solver_cases(), *realization_cases()]
SCIPY_CASES = [
    case(
        ValueError,
        "y is not in the span of D (sample 1): no x has D x = y",
        theory.basis_pursuit,
        torch.eye(2),
        torch.tensor([[1.0], [0.0]]),
    ),
    case(ValueError, "y has shape (4,), it takes (*, 3)", theory.basis_pursuit, torch.zeros(4), D),
]


@pytest.mark.parametrize(("function", "kind", "message"), CASES, ids=[message for _, _, message in CASES])
def test_message(function, kind, message):
    error = raised(function, kind)
    assert type(error) is kind and str(error).startswith(message), str(error)


@NEEDS_SCIPY
@pytest.mark.parametrize(("function", "kind", "message"), SCIPY_CASES)
def test_message_of_linear_programmes(function, kind, message):
    error = raised(function, kind)
    assert type(error) is kind and str(error).startswith(message), str(error)


def test_what_the_cases_start_from_is_right():
    certified()
    solve()


@NEEDS_SCIPY
def test_every_message_of_the_theory_has_a_case():
    reached = set()
    for function, kind, _ in CASES + SCIPY_CASES:
        trace = raised(function, kind).__traceback__
        while trace.tb_next:
            trace = trace.tb_next
        reached.add((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
    statements = set().union(*[raise_statements(module) for module in (_checks, *MODULES)])
    assert statements and statements <= reached, sorted(statements - reached)


# --- linear programmes ------------------------------------------------------------------------------------------------


def test_the_package_imports_and_works_without_scipy():
    """What needs no linear programme works; the rest says what to install, in one sentence."""
    code = """
import sys
sys.modules["scipy"] = sys.modules["scipy.optimize"] = None
import torch, dsc_ops
from dsc_ops import theory
assert not any(name.startswith("scipy.") for name in sys.modules if sys.modules[name])
D = torch.eye(3, 4) + 0.1
mu, W, gap = theory.analytic_coherence(D)
theory.certified_lista(torch.eye(3), B=1.0, s=1, iterations=2, W=torch.eye(3))
for call in (
    lambda: theory.generalized_coherence(D),
    lambda: theory.coherence_certificate(D),
    lambda: theory.basis_pursuit(torch.ones(3), D),
    lambda: theory.certified_lista(D, B=1.0, s=1, iterations=2),
):
    try:
        call()
    except ImportError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    sentence = "dsc_ops.theory solves linear programmes with scipy, not installed here: pip install dsc_ops[theory]"
    assert run.stdout.splitlines() == [sentence] * 4, run.stderr


def test_scipy_is_an_extra():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'theory = ["scipy"' in text
    source = ast.parse(Path(_programmes.__file__).read_text())
    imports = [node.names[0].name for node in ast.walk(source) if isinstance(node, ast.Import)]
    assert "scipy" not in imports


@NEEDS_SCIPY
def test_a_programme_without_optimum_says_so():
    with pytest.raises(RuntimeError, match="dsc_ops.theory: HiGHS found no optimum of a linear programme: .*unbounded"):
        _programmes.solve(c=[-1.0], bounds=(0, None))
    assert _programmes.solve(c=[1.0], A_eq=[[0.0]], b_eq=[1.0]) is None


@NEEDS_SCIPY
def test_long_programmes_have_a_bar(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(_programmes, "BAR_AFTER", 0.0)
    assert _programmes.solve_each(lambda n: time.sleep(0.02) or n, 9, "counting") == list(range(9))
    assert "counting" in capsys.readouterr().err
    monkeypatch.setattr(_programmes, "BAR_AFTER", 60.0)
    _programmes.solve_each(lambda n: n, 9, "counting")
    assert "counting" not in capsys.readouterr().err


@NEEDS_SCIPY
def test_there_need_not_be_a_bar(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert _programmes.solve_each(lambda n: n * n, 5, "squares") == [0, 1, 4, 9, 16]


@NEEDS_SCIPY
def test_after_an_error_the_rest_is_not_begun():
    begun = []

    def task(index: int) -> None:
        begun.append(index)
        time.sleep(0.01)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _programmes.solve_each(task, 1000, "interrupted")
    assert len(begun) < 100
