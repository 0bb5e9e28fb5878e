"""The CUDA kernels on packed codes, executed on the CPU, against plain PyTorch in float64.

Besides what is here, the property tests of the CPU kernels run on them: see the last test.
"""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass, replace

import numerics
import pytest
import torch
from cuda_sim_build import SIM

from dsc_ops import _on_cuda, reference

every_mode = pytest.mark.every_mode
PRECISE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Case:
    """A packed_lista; sizes that divide neither 8 nor 16 nor 32."""

    batch: int
    channels: int
    size: tuple[int, ...]
    atoms: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    iterations: int = 3
    dtype: torch.dtype = torch.float32
    theta: float = 0.7
    shared: bool = False
    start: float | None = None  # density of x0
    momentum: tuple[float, ...] = ()
    one_sided: bool = False
    tensor_cores: bool = False

    def __str__(self) -> str:
        default = {name: field.default for name, field in self.__dataclass_fields__.items()}
        parts = [str(v).replace(" ", "") for k, v in vars(self).items() if v != default[k]]
        return "-".join(parts).replace("torch.", "")

    @property
    def geometry(self) -> dict:
        return dict(stride=self.stride, padding=self.padding)

    def arguments(self) -> dict[str, torch.Tensor]:
        """In float64, representable in the dtype."""
        fan_in = self.channels * torch.tensor(self.kernel).prod().item()
        dictionary = torch.randn(self.atoms, self.channels, *self.kernel).double() / fan_in**0.5
        scales = torch.linspace(0.2, 0.3, 1 if self.shared else self.iterations).double()
        made = dict(
            y=torch.randn(self.batch, self.channels, *self.size).double(),
            dictionary=dictionary,
            analysis=scales.view(-1, *[1] * dictionary.dim()) * dictionary,
            theta=self.theta * (0.2 + 0.1 * torch.rand(self.iterations, self.atoms).double()),
        )
        if self.start is not None:
            empty = reference.analysis(made["y"], dictionary, **self.geometry)
            made["x0"] = torch.randn_like(empty) * (torch.rand_like(empty) < self.start)
        return {name: value.to(self.dtype).double() for name, value in made.items()}


IMAGE = Case(2, 1, (19, 21), 64, (7, 7), padding=(3, 3))
CASES = [
    IMAGE,
    replace(IMAGE, momentum=(0.0, 0.3, 0.5), start=0.2, shared=True, one_sided=True),
    replace(IMAGE, momentum=(9.0, -0.4, 0.5)),
    replace(IMAGE, iterations=1, start=0.1),
    replace(IMAGE, theta=0.0),  # all present: more values than the buffers hold
    replace(IMAGE, theta=9.0),  # none present
    replace(IMAGE, theta=9.0, start=1.0),
    Case(2, 3, (17, 18), 70, (3, 3), padding=(1, 1), start=0.1),  # two slabs, the second with 6 atoms
    Case(1, 3, (33, 37), 20, (7, 7), (2, 2), (3, 3), momentum=(0.0, 0.3, 0.5)),
    Case(1, 2, (30, 20), 33, (5, 3), (3, 1), (2, 1), shared=True),
    Case(1, 1, (23, 30), 64, (5, 5), (2, 2), (2, 2), start=0.5),
    Case(1, 1, (20, 20), 130, (4, 8)),
    Case(1, 2, (12, 40), 64, (3, 9), padding=(1, 4), start=0.1),
    Case(1, 4, (9, 70), 5, (2, 6), padding=(5, 9), shared=True),
    Case(1, 4, (9, 9), 1, (9, 3), (1, 2), (4, 4)),
    Case(1, 1, (5, 5), 3, (5, 5)),  # one pixel
    Case(3, 1, (100,), 64, (65,), (1,), (32,), start=0.1),
    Case(17, 2, (50,), 66, (5,), (1,), (2,), shared=True, momentum=(0.0, 0.3, 0.5)),
    Case(2, 1, (61,), 9, (7,), (2,), (0,), one_sided=True),
    Case(1, 1, (1, 300), 16, (1, 3), padding=(0, 1)),
    Case(2, 3, (17, 18), 70, (3, 3), padding=(1, 1), dtype=torch.float64),
    Case(1, 2, (12, 40), 64, (3, 9), (2, 1), (1, 4), dtype=torch.float64, momentum=(0.0, 0.3, 0.5), start=0.1),
]
# Small ones, which the slower modes see too: all inputs, more values than buffers hold, two slabs, stride 2, 1-D.
SMALL = [
    replace(CASES[1], batch=1, size=(9, 33), iterations=2, momentum=(0.0, 0.3)),
    replace(IMAGE, batch=1, size=(9, 17), theta=0.0, iterations=2),
    replace(CASES[7], batch=1, size=(9, 18), iterations=2),
    replace(CASES[8], size=(19, 37), atoms=9),
    replace(CASES[17], size=(20,), iterations=2, momentum=(0.0, 0.3)),
]
over_cases = pytest.mark.parametrize(
    "case",
    [*(pytest.param(c, id=str(c)) for c in CASES), *(pytest.param(c, id=str(c), marks=every_mode) for c in SMALL)],
)


def cast(arguments: dict, dtype: torch.dtype) -> tuple:
    """The tensors that packed_lista takes."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    y, dictionary, analysis = (arguments[name].to(dtype) for name in ("y", "dictionary", "analysis"))
    x0 = arguments["x0"].to(dtype) if "x0" in arguments else None
    return y, dictionary, analysis, arguments["theta"].to(wide), x0


def run(ops, case: Case, arguments: dict, grad: torch.Tensor) -> list[torch.Tensor]:
    """Codes and gradients; the codes without a tape are the same."""
    tensors, geometry = cast(arguments, case.dtype), (list(case.stride), list(case.padding))
    momentum = list(case.momentum)
    forward = (*tensors, momentum, *geometry, case.one_sided)
    codes, tape = ops.packed_lista(*forward, True, case.tensor_cores)
    inference, none = ops.packed_lista(*forward, False, case.tensor_cores)
    assert torch.equal(codes, inference) and none.numel() == 0
    needs = [True] * 4 + ["x0" in arguments]
    gradients = list(
        ops.packed_lista_backward(grad.to(case.dtype), tape, *tensors, momentum, *geometry, needs, case.tensor_cores)
    )
    gradients[0] = gradients[0].to(case.dtype)
    gradients[3] = gradients[3][:, 0]
    return [codes, *gradients[: 4 + needs[4]]]


def plain(case: Case, arguments: dict, dtype: torch.dtype, grad: torch.Tensor) -> list[torch.Tensor]:
    analysis = arguments["analysis"]
    arguments = arguments | dict(analysis=analysis[0] if case.shared else analysis)
    options = case.geometry | dict(one_sided=case.one_sided, momentum=list(case.momentum) or None)
    results = numerics.evaluate(reference.lista, arguments, options, dtype, grad)
    if case.shared:
        results[3] = results[3][None]
    return results


NAMES = ("codes", "y", "dictionary", "analysis", "theta", "x0")


@over_cases
def test_lista(ops, case):
    arguments = case.arguments()
    grad = torch.randn_like(reference.analysis(arguments["y"], arguments["dictionary"], **case.geometry))
    grad = grad.to(case.dtype).double()
    truth = plain(case, arguments, torch.float64, grad)
    eager = truth if case.dtype == torch.float64 else plain(case, arguments, case.dtype, grad)
    ours = run(ops, case, arguments, grad)
    numerics.assert_as_exact_as_eager(ours, eager, truth, NAMES[: len(ours)])
    if case.theta == 0:
        assert (ours[0] != 0).all()
    if case.theta == 9 and case.start is None:
        assert not ours[0].any()


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "tf32"])
@pytest.mark.parametrize("case", [CASES[1], CASES[8], CASES[11], CASES[16]], ids=str)
def test_lista_by_tensor_cores(ops, case, kind):
    """Values near the threshold may fall on either side of it: the error is that of five problems together."""
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    case = replace(case, dtype=dtype, tensor_cores=kind == "tf32", batch=1)
    ours, eager, exact = [], [], []
    for _ in range(5):
        arguments = case.arguments()
        grad = torch.randn_like(reference.analysis(arguments["y"], arguments["dictionary"], **case.geometry))
        grad = grad.to(dtype).double()
        ours.append(run(ops, case, arguments, grad))
        # As exact as eager in that type; tf32 has the mantissa of float16 and the range of bfloat16.
        eager.append(plain(case, arguments, torch.float16 if kind == "tf32" else dtype, grad))
        exact.append(plain(case, arguments, torch.float64, grad))
    for value, baseline, truth, name in zip(zip(*ours), zip(*eager), zip(*exact), NAMES):  # noqa: B905
        joined = [torch.stack(list(t)).double() for t in (value, baseline, truth)]
        error, allowed = ((t - joined[2]).norm() for t in joined[:2])
        assert error <= 1.5 * allowed + 1e-3 * joined[2].norm(), (name, error, allowed)
        assert kind == "bfloat16" or error <= 0.1 * joined[2].norm(), name


@every_mode
def test_every_kind_of_tensor_core_once(ops):
    for dtype, tensor_cores in ((torch.bfloat16, False), (torch.float16, False), (torch.float32, True)):
        case = Case(1, 2, (11, 13), 66, (3, 7), padding=(1, 3), dtype=dtype, tensor_cores=tensor_cores, theta=0.0)
        arguments = case.arguments()
        grad = torch.randn(1, 66, 11, 13).to(dtype).double()
        codes, exact = run(ops, case, arguments, grad)[0], plain(case, arguments, torch.float64, grad)[0]
        assert (codes.double() - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("seed", range(30))
def test_random_cases(ops, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    stride = draw(1, 2)
    segment = (3, 4, 5, 7)[draw(0, 3)] if stride == 1 else (3, 5, 7)[draw(0, 2)]
    kernel = (draw(1, 6), segment * draw(1, 2))
    padding = (draw(0, kernel[0]), draw(0, kernel[1]))
    size = tuple(draw(max(1, k - 2 * p), 36) for k, p in zip(kernel, padding, strict=True))
    case = Case(
        draw(1, 3), draw(1, 4), size, draw(1, 70), kernel, (draw(1, 3), stride), padding, draw(1, 3),
        theta=draw(0, 20) / 10, shared=draw(0, 1) == 1, start=(None, 0.1, 1.0)[draw(0, 2)], one_sided=draw(0, 1) == 1,
    )  # fmt: skip
    if draw(0, 1):
        case = replace(case, momentum=tuple(draw(-5, 9) / 10 for _ in range(case.iterations)))
    test_lista(ops, case)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)), ids=str)
def test_only_what_is_needed(ops, needs):
    case = Case(1, 2, (9, 11), 5, (3, 3), padding=(1, 1), shared=True, iterations=2)
    arguments = case.arguments()
    y, dictionary, analysis, theta, _ = cast(arguments, case.dtype)
    for x0 in (None, torch.zeros(1, 5, 9, 11)):
        tensors, rest = (y, dictionary, analysis, theta, x0, []), ([1, 1], [1, 1])
        codes, tape = ops.packed_lista(*tensors, *rest, False, True, False)
        full = ops.packed_lista_backward(codes, tape, *tensors, *rest, [True] * 4 + [x0 is not None], False)
        some = ops.packed_lista_backward(codes, tape, *tensors, *rest, [*needs, False], False)
        for expected, value, need in zip(full, some, [*needs, False], strict=True):
            assert torch.equal(value, expected) if need else value.numel() == 0


def test_conv_soft_threshold(ops):
    for case in (*CASES[:1], *CASES[7:19], CASES[20]):
        arguments = case.arguments()
        y, weight, _, thetas, _ = cast(arguments, case.dtype)
        bias, theta = torch.randn(case.atoms).to(thetas.dtype) / 4, thetas[0]
        geometry = (list(case.stride), list(case.padding))
        codes = ops.packed_conv_soft_threshold(y, weight, bias, theta, *geometry, case.one_sided, False)
        grad = torch.randn_like(codes)
        needs = [True] * 4
        grad_y, grad_weight, sums = ops.packed_conv_soft_threshold_backward(
            grad, codes, y, weight, *geometry, needs, False
        )
        leaves = dict(y=y.double(), weight=weight.double(), theta=theta.double(), bias=bias.double())
        options = case.geometry | dict(one_sided=case.one_sided)
        truth = numerics.evaluate(reference.conv_soft_threshold, leaves, options, torch.float64, grad.double())
        eager = numerics.evaluate(reference.conv_soft_threshold, leaves, options, case.dtype, grad)
        numerics.assert_as_exact_as_eager(
            [codes, grad_y, grad_weight, sums[0], sums[1]], eager, truth, ["codes", "y", "weight", "theta", "bias"]
        )
        without = ops.packed_conv_soft_threshold(y, weight, None, theta, *geometry, case.one_sided, False)
        zero = ops.packed_conv_soft_threshold(y, weight, 0 * bias, theta, *geometry, case.one_sided, False)
        assert torch.equal(without, zero)


def test_results_do_not_vary(ops):
    """Every call runs blocks and threads in another order; a small device has smaller slices of the batch."""
    signals = replace(CASES[17], batch=5, start=0.1)
    for case in (CASES[1], replace(CASES[8], batch=3), replace(CASES[0], dtype=torch.bfloat16), signals):
        arguments = case.arguments()
        grad = torch.randn_like(reference.analysis(arguments["y"], arguments["dictionary"], **case.geometry))
        results, launches = [], [ops.launches()]
        for device in (0, 1):
            with ops.device(device):
                results.append(run(ops, case, arguments, grad))
            launches.append(ops.launches())
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert launches[2] - launches[1] > launches[1] - launches[0]


@pytest.mark.parametrize("tensor_cores", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_where_they_belong(ops, value, tensor_cores):
    """Kernels of odd widths: zeros that fill up a unit must meet no infinity."""
    for kernel, padding in (((3, 3), (1, 1)), ((3, 5), (1, 2)), ((7, 7), (3, 3))):
        case = Case(1, 2, (13, 22), 9, kernel, padding=padding, iterations=2, tensor_cores=tensor_cores)
        arguments = case.arguments()
        arguments["y"][0, 1, 6, 11] = value
        y, dictionary, analysis, theta, _ = cast(arguments, case.dtype)
        codes, _ = ops.packed_lista(
            y, dictionary, analysis, theta, None, [], [1, 1], list(padding), False, False, tensor_cores
        )
        exact = reference.lista(y, dictionary, analysis, theta, **case.geometry)
        assert torch.equal(codes.isnan(), exact.isnan())
        assert torch.equal(codes.isinf(), exact.isinf())
        assert codes.isfinite().any()


def test_layouts(ops):
    """Signals, weights and gradients as no kernel reads them."""
    case = CASES[7]
    arguments = case.arguments()
    grad = torch.randn(2, 70, 17, 18)
    expected = run(ops, case, arguments, grad)
    other = {name: torch.stack([v, v + 9], -1)[..., 0] for name, v in arguments.items()}
    other["y"] = other["y"].contiguous(memory_format=torch.channels_last)
    found = run(ops, case, other, grad.transpose(2, 3).contiguous().transpose(2, 3))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("dtype", [*PRECISE, torch.bfloat16])
def test_kernels_serve_where_they_are_said_to(ops, dtype):
    """dsc_ops/_on_cuda.py and csrc/cuda/packed.h have the same table."""
    for stride, width in itertools.product((1, 2, 3), range(1, 15)):
        y, weight = torch.ones(1, 1, 20, dtype=dtype), torch.ones(2, 1, width, dtype=dtype)
        theta = torch.zeros(2, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        arguments = (y, weight, None, theta, [stride], [0], False, False)
        if _on_cuda.is_packed(y, weight.shape, [stride], [1], 1):
            ops.packed_conv_soft_threshold(*arguments)
        else:
            with pytest.raises(RuntimeError, match=f"no packed kernel for kernel width {width} and stride {stride}"):
                ops.packed_conv_soft_threshold(*arguments)


def test_where_packed_kernels_do_not_serve(ops):
    y, weight = torch.ones(1, 4, 70, 70), torch.ones(2, 4, 63, 63)  # more of the signal than shared memory holds
    assert not _on_cuda.is_packed(y, weight.shape, [1, 1], [1, 1], 1)
    with pytest.raises(RuntimeError, match="no packed kernel for a kernel of this size"):
        ops.packed_conv_soft_threshold(y, weight, None, torch.zeros(2), [1, 1], [0, 0], False, False)
    y, shape = torch.ones(1, 3, 8, 8), (4, 3, 3, 3)
    assert _on_cuda.is_packed(y, shape, [1, 1], [1, 1], 1)
    assert not _on_cuda.is_packed(y[:0], shape, [1, 1], [1, 1], 1)
    assert not _on_cuda.is_packed(y, (0, 3, 3, 3), [1, 1], [1, 1], 1)
    assert not _on_cuda.is_packed(y, shape, [1, 1], [1, 2], 1)
    assert not _on_cuda.is_packed(y, (3, 1, 3, 3), [1, 1], [1, 1], 3)
    assert not _on_cuda.is_packed(torch.ones(1, 5, 8, 8), (4, 5, 3, 3), [1, 1], [1, 1], 1)


def test_tf32_only_where_torch_allows_it():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert not _on_cuda.tensor_cores()
        torch.set_float32_matmul_precision("high")
        assert _on_cuda.tensor_cores()
    finally:
        torch.set_float32_matmul_precision(before)


def test_tape_has_the_size_that_is_said(ops):
    for case in CASES[7:]:
        arguments = case.arguments()
        y, dictionary, analysis, theta, x0 = cast(arguments, case.dtype)
        rest = (list(case.momentum), list(case.stride), list(case.padding), False)
        codes, tape = ops.packed_lista(y, dictionary, analysis, theta, x0, *rest, True, False)
        said = _on_cuda.empty_tape(y, dictionary, theta, codes, list(case.stride), [1] * len(case.stride), 1, True)
        assert tape.shape == said.shape and tape.dtype == said.dtype


def test_wrong_arguments_are_refused(ops):
    case = CASES[7]
    y, dictionary, analysis, theta, x0 = cast(case.arguments(), case.dtype)
    rest = ([], [1, 1], [1, 1])
    codes, tape = ops.packed_lista(y, dictionary, analysis, theta, x0, *rest, False, True, False)
    backward = (y, dictionary, analysis, theta, x0, *rest, [True] * 5, False)
    for wrong in (tape[:-1], tape.float(), codes):
        with pytest.raises(RuntimeError, match="tape is not one that lista wrote"):
            ops.packed_lista_backward(codes, wrong, *backward)
    with pytest.raises(RuntimeError, match="grad has the wrong shape"):
        ops.packed_lista_backward(codes[:1], tape, *backward)
    for arguments, message in (
        ((y, dictionary[:, :2], analysis, theta, None), "do not fit together"),
        ((y, dictionary, analysis[:2], theta, None), "analysis has the wrong shape"),
        ((y, dictionary, analysis, theta[:, :3], None), "theta must be"),
        ((y, dictionary, analysis, theta.double(), None), "theta must be"),
        ((y, dictionary, analysis, theta, codes[:, :3]), "x0 has the wrong shape"),
        ((y[:, :, :, :1], dictionary, analysis, theta, None, [], [1, 1], [0, 0]), "does not fit into the signal"),
    ):
        arguments = arguments if len(arguments) > 5 else (*arguments, *rest)
        with pytest.raises(RuntimeError, match=message):
            ops.packed_lista(*arguments, False, False, False)


def test_offsets_of_large_codes(cuda_sim):
    """By sizes only: beyond 2^31 values, runs and bytes."""
    built = cuda_sim.object(SIM / "offsets.cpp", "-O1")
    library = ctypes.CDLL(str(cuda_sim.link("offsets.so", "fast", [built], "-shared").result()))
    found = (ctypes.c_int64 * 5)()
    for images, atoms, height, width in ((1, 64, 3, 5), (300, 130, 512, 510), (64, 64, 4096, 1023), (1, 1, 7, 1 << 30)):
        library.offsets(*map(ctypes.c_int64, (images, atoms, height, width)), found)
        runs, slabs = images * height * -(-width // 8), -(-atoms // 64)
        last_slab = atoms - 64 * (slabs - 1)
        assert list(found) == [
            runs,
            slabs * runs * 32,
            runs * 8 * atoms,
            runs * 8 * atoms - 8 * last_slab,  # the room of the last run's last slab
            images * height * width,
        ]


def test_property_tests_of_the_cpu_kernels(cuda_sim, ops):
    """On CUDA's source, through the public functions: equal to the reference, gradcheck, opcheck, solvers.

    Left out are two whose bounds are the luck of a few values: a float16 threshold that one value of 300 is close to
    (above: test_lista_by_tensor_cores, over five problems), and `shrink` to the last bit of exp (test_cuda_source.py);
    and what has nothing to do with kernels or takes thousands of iterations.
    """
    result = cuda_sim.tests("fast").result()
    assert result.returncode == 0, result.stdout[-8000:]
    assert "passed" in result.stdout
