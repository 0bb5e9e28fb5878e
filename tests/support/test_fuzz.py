"""A random walk over the public functions and layers, each step against plain PyTorch; and arguments of every kind.

DSC_OPS_FUZZ_SECONDS (30 by default) is how long the walk goes on, DSC_OPS_FUZZ_SEED where it begins (0 by default, so
that every run of the suite walks the same way, as far as it gets). `make fuzz` walks ten minutes from elsewhere.
"""

from __future__ import annotations

import fractions
import os
import time
from types import SimpleNamespace

import numerics
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from numerics import Convolution
from torch import Tensor

from dsc_ops import _C, ConvSoftThreshold, ConvSoftThreshold1d, LISTAConv, LISTAConv1d, functional, reference

SECONDS = float(os.environ.get("DSC_OPS_FUZZ_SECONDS", "30"))
SEED = int(os.environ.get("DSC_OPS_FUZZ_SEED", "0"))

LAYOUTS = ("contiguous", "channels_last", "every other", "reversed", "offset", "expanded", "transposed")
VALUES = ("normal", "sparse", "zero", "constant", "small", "large", "integers")
SPECIAL = (float("nan"), float("inf"), -float("inf"), -0.0)
WRONG = {
    "none": None,
    "text": "1",
    "number": 1.5,
    "negative": -1,
    "list": [],
    "object": object(),
    "five dimensions": torch.ones(2, 2, 2, 2, 2),
    "integers": torch.ones(1).long(),
}
seeds = st.integers(0, 2**31 - 1)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another order in memory ("expanded" makes batch entries equal)."""
    if layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "every other":
        return torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2].copy_(x)
    if layout == "reversed":
        return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    if layout == "offset":
        return torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape)
    if layout == "expanded" and x.shape[0]:
        return x[:1].expand_as(x)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x.contiguous()


def values(shape, kind: str, generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "sparse":
        return x * (torch.rand(shape, generator=generator) < 0.2)
    if kind == "integers":
        return (2 * x).round()
    return {"zero": 0 * x, "constant": torch.full_like(x, 0.75), "small": 1e-3 * x, "large": 30 * x}.get(kind, x)


def of_pairs(weight: Tensor) -> Tensor:
    """Weights of what rounds with |weight|: neighbours may go through three columns as a pair, by Winograd's F(2, 3).

    With taps g0, g1, g2 and values d0, d1, d2 a pair's first result is (d1 + d2) (g0 + g1 + g2) / 2
    + (d2 - d1) (g0 - g1 + g2) / 2 + (d0 - d2) g0, and its second likewise: a value meets the sum of |g| at most twice.
    """
    return weight if weight.shape[-1] < 3 else 2 * weight.sum(-1, keepdim=True).expand_as(weight)


def majorant(name: str, arguments: dict, options: dict) -> Tensor:
    """What bounds each result's rounding: the same sums over absolute values, nothing subtracted, no threshold."""
    a = {key: value.abs() for key, value in arguments.items() if isinstance(value, Tensor)}
    geometry = {key: options[key] for key in ("stride", "padding", "dilation", "groups")}
    if name in ("analysis", "conv_soft_threshold"):
        u = reference.analysis(a["y"], of_pairs(a["weight"]), **geometry)
        return (
            u + (reference.per_channel(a["bias"], u) if "bias" in a else 0) + reference.per_channel(a["theta"], u)
            if ("theta" in a)
            else u
        )
    if name == "synthesis":
        return reference.synthesis(a["x"], a["weight"], options["signal_size"], **geometry)
    x = a.get("x0", a.get("x"))
    iterations = options.get("iterations") or (1 if name == "lista_step" else a["analysis"].shape[0])
    for k in range(iterations):
        weight = a["analysis"][k] if a["analysis"].dim() > a["dictionary"].dim() else a["analysis"]
        residual = a["y"]
        if x is not None:
            x = 3 * x  # momentum of at most one
            residual = residual + reference.synthesis(x, a["dictionary"], a["y"].shape[2:], **geometry)
        u = reference.analysis(residual, of_pairs(weight), **geometry)
        theta = a["theta"][k] if a["theta"].dim() == 2 else a["theta"]
        u = u + reference.per_channel(theta, u)
        x = u if x is None else x + u
    return x


class Walk(RuleBasedStateMachine):
    """A convolution of random geometry; a signal y and a code x, which the steps make anew; weights and thresholds."""

    @initialize(
        at=seeds,
        dims=st.integers(1, 2),
        dtype=st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16]),
        batch=st.sampled_from([1, 2, 3, 0]),
    )
    def begin(self, at, dims, dtype, batch):
        generator = torch.Generator().manual_seed(at)
        self.case: Convolution = numerics.random_convolution(generator)
        while len(self.case.size) != dims:
            self.case = numerics.random_convolution(generator)
        self.case.batch, self.dtype = batch, dtype
        self.generator = generator
        c = self.case
        self.weight = self.new((c.atoms, c.channels // c.groups, *c.kernel), "normal", scale=self.scale())
        self.bias = self.new((c.atoms,), "normal")
        self.theta = self.new((c.atoms,), "small").abs() * 300
        self.y = self.new((batch, c.channels, *c.size), "normal")
        self.code_shape = tuple(reference.analysis(self.y.double(), self.weight.double(), **c.geometry).shape)
        self.x = self.new(self.code_shape, "sparse")
        self.special = False

    def scale(self) -> float:
        c = self.case
        taps = float(np.prod(c.kernel))
        return 0.7 / (c.channels // c.groups * taps) ** 0.5 / (1 + c.atoms / c.channels) ** 0.5

    def new(self, shape, kind: str, scale: float = 1.0) -> Tensor:
        return (scale * values(shape, kind, self.generator)).to(self.dtype)

    def products(self, name: str, options: dict) -> int:
        """How many products, and other terms, the longest chain of sums of a function adds up."""
        c, others = self.case, 4  # the signal, the code before, bias and threshold
        taps = int(np.prod(c.kernel))
        of_analysis, of_synthesis = taps * c.channels // c.groups, taps * c.atoms // c.groups
        if name in ("lista", "lista_step"):
            return options.get("iterations", 1) * (of_analysis + of_synthesis + others)
        return (of_synthesis if name == "synthesis" else of_analysis) + others

    # --- the comparison -----------------------------------------------------------------------------------------------

    def compare(self, name: str, arguments: dict, **options) -> Tensor:
        """Results with those of float64, within rounding; in float64 the gradients too."""
        result = getattr(functional, name)(**arguments, **options)
        wide = {k: v.detach().double() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        truth = getattr(reference, name)(**wide, **options)
        assert result.shape == truth.shape and result.isnan().any() == truth.isnan().any(), name
        unit = torch.finfo(self.dtype)
        if "stride" not in options:
            # Where an activation cancels, it rounds by what it takes: what it gives may be much smaller.
            taken = wide["u"].abs() + reference.per_channel(wide["theta"].abs(), wide["u"]) if "u" in wide else 0
            ours, exact = result.double(), truth.to(result.dtype).double()
            right = (ours - exact).abs() <= 8 * unit.eps * exact.abs() + 8 * min(unit.eps, 2.0**-23) * taken
            right = right & exact.isfinite() | (ours == exact) | ours.isnan() & exact.isnan()
            assert right.all(), f"{name}: {(ours - exact)[~right].abs().max()} in {self.case}"
        else:
            infinite = ~truth.to(result.dtype).isfinite() & self.special
            torch.testing.assert_close(
                result[infinite].double(), truth.to(result.dtype)[infinite].double(), equal_nan=True
            )
            # What is finite met no special value, or one that a threshold took away.
            tame = {k: v.nan_to_num(0, 0, 0) if isinstance(v, Tensor) else v for k, v in wide.items()}
            bound = majorant(name, tame, options)
            # A sum of n products, in any order, is off by up to n units of rounding of the sum of absolute values. Sums
            # are float32 or wider. Codes between iterations, and residuals, may have the dtype of the arguments.
            sums = self.products(name, options) * min(unit.eps, 2.0**-23) / 2
            between = unit.eps if name in ("lista", "lista_step") else 0
            allowed = 2 * unit.eps * truth.abs() + (sums + between) * bound + unit.smallest_normal * unit.eps
            right = (result.double() - truth).abs() <= allowed
            wrong = ~(right | infinite) & (bound < unit.max)
            assert not wrong.any(), f"{name}: {(result.double() - truth)[wrong].abs().max()} in {self.case}"
        if self.dtype == torch.float64 and not self.special and truth.numel():
            grad = torch.randn(truth.shape, generator=self.generator, dtype=torch.float64)
            ours, exact = ([], [])
            for module, into in ((functional, ours), (reference, exact)):
                leaves = {k: v.detach().requires_grad_() for k, v in wide.items() if isinstance(v, Tensor)}
                value = getattr(module, name)(**(wide | leaves), **options)
                into += torch.autograd.grad(value, list(leaves.values()), grad, materialize_grads=True)
            for key, a, b in zip(leaves, ours, exact, strict=True):
                scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
                assert numerics.error(a, b) <= 1e-9 * scale, f"{name}: gradient of {key} in {self.case}"
        return result.detach()

    # --- steps --------------------------------------------------------------------------------------------------------

    @rule(which=st.sampled_from(["y", "x", "weight"]), layout=st.sampled_from(LAYOUTS))
    def lay_out(self, which, layout):
        if which != "weight" or layout != "expanded":
            setattr(self, which, laid_out(getattr(self, which), layout))

    @rule(kind=st.sampled_from(VALUES), at=seeds)
    def take_another_signal(self, kind, at):
        self.generator.manual_seed(at)
        self.y, self.special = self.new(self.y.shape, kind), False
        self.x = self.new(self.code_shape, "sparse")

    @rule(kind=st.sampled_from(VALUES), negative=st.booleans())
    def take_other_thresholds(self, kind, negative):
        self.theta = self.new(self.theta.shape, kind).abs() * (-0.1 if negative else 0.3)

    @precondition(lambda self: self.y.numel() and self.x.numel())
    @rule(value=st.sampled_from(SPECIAL), at=seeds)
    def put_in_a_special_value(self, value, at):
        self.y, self.x = (t.clone(memory_format=torch.contiguous_format) for t in (self.y, self.x))
        self.y.view(-1)[at % self.y.numel()] = self.x.view(-1)[at % self.x.numel()] = value
        self.special = self.special or value != 0

    @rule(level=st.sampled_from(_C.cpu_capabilities()), threads=st.integers(1, 3))
    def change_the_machine(self, level, threads):
        _C.set_cpu_capability(level)
        torch.set_num_threads(threads)

    @rule(one_sided=st.booleans(), each=st.booleans())
    def soft_threshold(self, one_sided, each):
        theta = self.theta if each else self.theta[0]
        self.compare("soft_threshold", dict(u=self.x, theta=theta), one_sided=one_sided)

    @precondition(lambda self: not self.special and self.dtype in (torch.float32, torch.float64))
    @rule(one_sided=st.booleans(), activation=st.sampled_from(sorted(reference.ACTIVATIONS)))
    def shrink(self, one_sided, activation):
        # Away from the kinks at zero, whose derivatives are a matter of taste.
        self.compare("shrink", dict(u=self.x + 0.01, theta=self.theta), activation=activation, one_sided=one_sided)

    @precondition(lambda self: not self.special)
    @rule()
    def measure(self):
        self.compare("l1_penalty", dict(features=self.x))
        x, alpha = self.x.double(), 0.125
        assert functional.density(self.x, alpha) == reference.density(x, alpha)
        assert torch.equal(functional.hard_threshold(self.x, alpha), reference.hard_threshold(x, alpha).to(self.dtype))

    @rule()
    def analysis(self):
        result = self.compare("analysis", dict(y=self.y, weight=self.weight), **self.case.geometry)
        self.x = result

    @rule()
    def synthesis(self):
        options = self.case.geometry | dict(signal_size=self.case.size)
        self.compare("synthesis", dict(x=self.x, weight=self.weight), **options)

    @rule(one_sided=st.booleans(), bias=st.booleans())
    def conv_soft_threshold(self, one_sided, bias):
        arguments = dict(y=self.y, weight=self.weight, theta=self.theta) | (dict(bias=self.bias) if bias else {})
        self.x = self.compare("conv_soft_threshold", arguments, one_sided=one_sided, **self.case.geometry)

    def dictionaries(self) -> dict:
        return dict(y=self.y, dictionary=self.weight, analysis=self.weight * 0.5, theta=self.theta)

    @precondition(lambda self: not self.special)
    @rule(one_sided=st.booleans())
    def lista_step(self, one_sided):
        self.x = self.compare(
            "lista_step", dict(x=self.x) | self.dictionaries(), one_sided=one_sided, **self.case.geometry
        )
        self.tame()

    @precondition(lambda self: not self.special)
    @rule(
        iterations=st.integers(1, 4),
        one_sided=st.booleans(),
        start=st.booleans(),
        momentum=st.sampled_from([None, "fista", 0.5]),
        untied=st.booleans(),
    )
    def lista(self, iterations, one_sided, start, momentum, untied):
        arguments = self.dictionaries() | (dict(x0=self.x) if start else {})
        if untied:
            factors = torch.linspace(1, 0.5, iterations, dtype=torch.float64).to(self.dtype)
            arguments["analysis"] = torch.stack([self.weight * f for f in factors])
            arguments["theta"] = torch.stack([self.theta * f for f in factors])
        options = self.case.geometry | dict(one_sided=one_sided, iterations=iterations)
        options["momentum"] = [momentum] * iterations if isinstance(momentum, float) else momentum
        self.x = self.compare("lista", arguments, **options)
        self.tame()

    def tame(self) -> None:
        """Random dictionaries may make codes grow; what is too large to say something is taken anew."""
        if self.x.numel() and not self.x.abs().max() < 100:
            self.x = self.new(self.code_shape, "sparse")

    @precondition(lambda self: not self.special and self.dtype == torch.float64)
    @rule(given=st.booleans(), fast=st.booleans())
    def ista_lowers_the_objective(self, given, fast):
        arguments = dict(y=self.y, dictionary=self.weight, lam=0.05)
        options = self.case.geometry
        step = (
            0.99 * reference.longest_step(functional.lipschitz(self.weight, self.case.size, **options))
            if given
            else None
        )
        x = functional.ista(**arguments, iterations=3, step=step, fast=fast, **options)
        torch.testing.assert_close(x, reference.ista(**arguments, iterations=3, step=step, fast=fast, **options))
        objective = functional.lasso_objective(x=x, **arguments, **options)
        torch.testing.assert_close(objective, reference.lasso_objective(x=x, **arguments, **options))
        nothing = self.y.square().flatten(1).sum(1) / 2
        assert (objective <= nothing * (1 + 1e-9) + 1e-12).all()

    @precondition(lambda self: not self.special and self.dtype == torch.float64)
    @rule(iterations=st.integers(1, 3), untied=st.booleans(), one_sided=st.booleans())
    def layers(self, iterations, untied, one_sided):
        """A layer, its state in another layer, and its decoder."""
        c, two = self.case, len(self.case.size) == 2
        make = LISTAConv if two else LISTAConv1d
        options = dict(groups=c.groups, stride=c.stride, padding=c.padding, dilation=c.dilation)
        dictionary = self.weight + 1e-3  # some atoms of a random dictionary may be near zero
        layer, other = (
            make.from_dictionary(d, iterations, untied=untied, one_sided=one_sided, **options)
            for d in (dictionary, torch.ones_like(dictionary))
        )
        other.load_state_dict(layer.state_dict())
        codes = other(self.y)
        expected = reference.lista(
            self.y, layer.dictionary, layer.analysis, layer.theta, iterations=iterations, one_sided=one_sided, **options
        )
        torch.testing.assert_close(codes, expected)
        signal = reference.synthesis(codes, layer.dictionary, c.size, **options)
        torch.testing.assert_close(layer.decode(codes, c.size), signal)
        first = (ConvSoftThreshold if two else ConvSoftThreshold1d)(
            c.channels, c.atoms, c.kernel, one_sided=one_sided, dtype=torch.float64, **options
        )
        expected = reference.conv_soft_threshold(
            self.y, first.weight, first.theta, first.bias, one_sided=one_sided, **options
        )
        torch.testing.assert_close(first(self.y), expected)

    @rule(
        name=st.sampled_from(["analysis", "synthesis", "conv_soft_threshold", "lista"]),
        argument=st.sampled_from(["y", "x", "weight", "dictionary", "analysis", "theta", "bias", "stride", "groups"]),
        kind=st.sampled_from(sorted(WRONG)),
    )
    def wrong_arguments(self, name, argument, kind):
        right = {
            "analysis": dict(y=self.y, weight=self.weight),
            "synthesis": dict(x=self.x, weight=self.weight, signal_size=self.case.size),
            "conv_soft_threshold": dict(y=self.y, weight=self.weight, theta=self.theta, bias=self.bias),
            "lista": self.dictionaries() | dict(iterations=2),
        }[name] | self.case.geometry
        allowed = {"bias": ("none",), "theta": ("number", "negative")}
        if argument not in right or kind in allowed.get(argument, ()):
            return
        with pytest.raises((TypeError, ValueError), match=f"^{name}: .*{argument}"):
            getattr(functional, name)(**(right | {argument: WRONG[kind]}))

    def teardown(self):
        _C.set_cpu_capability(_C.cpu_capabilities()[-1])


@pytest.mark.supports(
    "fuzzing", "a hypothesis state machine over functions and layers, 30 seconds here, ten minutes by `make fuzz`"
)
def test_a_random_walk_agrees_with_plain_pytorch():
    before, begun, steps = torch.get_num_threads(), time.monotonic(), 0
    checks = settings(
        max_examples=25,
        stateful_step_count=12,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink)[: 1 + (SECONDS > 60)],  # a shorter example takes minutes to find
    )
    try:
        while time.monotonic() - begun < SECONDS:
            machine = seed(SEED + steps)(type("Walk", (Walk,), {}))
            run_state_machine_as_test(machine, settings=checks)
            steps += 1
    except BaseException:
        print(f"set DSC_OPS_FUZZ_SEED={SEED + steps} to begin here")
        raise
    finally:
        torch.set_num_threads(before)
    assert steps


# --- the extension module ---------------------------------------------------------------------------------------------

ANYTHING = [
    None, True, 0, -1, 2**63, 2**2000, 1.5, float("nan"), 1j, "", "avx2\0", "default" * 10000, "\ud800", b"neon",
    bytearray(9), memoryview(b"x"), [], ["default"], (), {}, set(), object(), type, len, Ellipsis, NotImplemented,
    range(3), fractions.Fraction(1, 3), np.float32(1), np.array("avx2"), np.zeros(3), torch.ones(2),
    torch.ones(2, device="meta"),
    torch.nn.Linear(1, 1), SimpleNamespace(), Exception("x"), iter([]), (n for n in ()), slice(None), _C,
]  # fmt: skip


@pytest.mark.supports("fuzzing", "the extension module takes any arguments without a crash")
def test_the_extension_module_takes_anything():
    before, refused = _C.cpu_capability(), 0
    functions = [value for name, value in vars(_C).items() if callable(value) and not name.startswith("__")]
    assert len(functions) == 3
    for function in functions:
        for value in ANYTHING:
            for arguments, named in (
                ((value,), {}),
                ((value, value), {}),
                ((), dict(level=value)),
                ((), dict(x=value)),
            ):
                try:
                    function(*arguments, **named)
                except (TypeError, ValueError) as error:
                    assert str(error) or isinstance(error, UnicodeError)
                    refused += 1
    assert refused == len(functions) * len(ANYTHING) * 4
    assert _C.cpu_capability() == before


def test_the_extension_module_is_no_place_to_write():
    """What it tells is its own: changing an answer changes nothing."""
    _C.cpu_capabilities().clear()
    assert _C.cpu_capabilities()
    for name in ("version", "torch_version", "cuda_version", "cuda_architectures", "compiler"):
        assert isinstance(getattr(_C, name), str)
