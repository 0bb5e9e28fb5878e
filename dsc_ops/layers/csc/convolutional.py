"""SDNet's layer: a convolutional lasso as a forward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import Self

from dsc_ops import _checks as check
from dsc_ops import functional, reference
from dsc_ops.layers.atoms import UnitNormAtoms
from dsc_ops.layers.lista import ConvolutionalCodes
from dsc_ops.layers.state import WholeState
from dsc_ops.layers.threshold import weight_shape

SOLVERS = ("ista", "fista")
# The step is this over L: what a power iteration is behind by between two training steps is well below the rest.
STEP = 0.9
# L is taken on a signal of so many kernel extents along each axis, where it has all but reached its limit.
EXTENTS = 8


class _Atoms(UnitNormAtoms):
    """Unit-norm atoms that know when a dictionary was assigned: the eigenvector of the one before is of no use then."""

    def __init__(self) -> None:
        super().__init__()
        self.assigned = True

    def right_inverse(self, atoms: Tensor) -> Tensor:
        self.assigned = True
        return atoms


class CSCConv(ConvolutionalCodes, WholeState):
    """Convolutional sparse coding: ISTA or FISTA for min_x 1/2 ||y - S_D x||^2 + lam ||x||_1, on atoms of unit norm.

    Args:
        in_channels: C.
        code_channels: M, the number of atoms.
        kernel_size: of the atoms.
        iterations: K steps from zero, each of length 0.9 / L.
        stride: as in nn.Conv2d.
        padding: as in nn.Conv2d; None is "same", or (kernel - 1) // 2 when strided.
        lam: weight of the l1 norm, a number or a tensor (M,).
        solver: "fista" (Beck and Teboulle's momentum at every step) or "ista".
        one_sided: codes x >= 0; else of both signs.
        learn_threshold: make ``lam`` a parameter (M,); else it is a buffer of the shape that was given.

    Shape: y (N, C, H, W) to codes (N, M, H', W'). ``dictionary`` (M, C, kh, kw) is a parametrization (UnitNormAtoms):
    state_dict has parametrizations.dictionary.original, and lam, lipschitz, eigenvector. ``lam`` may be set at any
    time, to a number or to a tensor of its shape. Raises ``ValueError`` for another solver.

    L, the largest eigenvalue of A_D S_D for this stride and padding, is that on a signal of eight kernel extents. It is
    exact in a new layer and after the dictionary was assigned; in training each changed dictionary gets one step of
    power iteration from the eigenvector before; evaluation takes L as it is. The gradient of the codes reaches the
    dictionary through analysis and synthesis, with L held constant. Equivalent to ``functional.ista(y, dictionary, lam,
    iterations=K, step=0.9 / L, fast=True, one_sided=True)``. Source: Dai et al. (NeurIPS 2022), SDNet.

    >>> layer = CSCConv(3, 16, 5, lam=0.2)
    >>> y = torch.randn(2, 3, 8, 8)
    >>> codes = layer(y)
    >>> codes.shape, layer.decode(codes).shape, layer.objective(y, codes).shape
    (torch.Size([2, 16, 8, 8]), torch.Size([2, 3, 8, 8]), torch.Size([2]))
    """

    dims, dilation, groups = 2, (1, 1), 1

    def __init__(
        self,
        in_channels: int,
        code_channels: int,
        kernel_size: int | tuple[int, ...],
        iterations: int = 2,
        *,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str | None = None,
        lam: float | Tensor = 0.1,
        solver: str = "fista",
        one_sided: bool = True,
        learn_threshold: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        shape = weight_shape("CSCConv", 2, in_channels, code_channels, kernel_size, 1)
        self.in_channels, self.code_channels, self.kernel_size = in_channels, code_channels, shape[2:]
        self.iterations = check.integer("CSCConv", "iterations", iterations, least=1)
        if solver not in SOLVERS:
            raise ValueError(f"CSCConv: solver is {solver!r}, it takes one of {', '.join(SOLVERS)}")
        self.solver, self.one_sided, self.learn_threshold = solver, bool(one_sided), bool(learn_threshold)
        strides = check.integers("CSCConv", "stride", stride, 2, least=1)
        if padding is None:
            halves = tuple((k - 1) // 2 for k in self.kernel_size)
            padding = halves if any(s != 1 for s in strides) else "same"
        weight = torch.empty(shape, device="meta")
        conv = check.geometry("CSCConv", "dictionary", weight, stride, padding, 1, 1)
        self.stride, self.padding = tuple(conv.stride), tuple(conv.padding)

        self.dictionary = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        parametrize.register_parametrization(self, "dictionary", _Atoms())
        self._start = self._lam_of(lam, (code_channels,))
        shape = (code_channels,) if learn_threshold else tuple(self._start.shape)
        values = torch.empty(shape, device=device, dtype=dtype)
        if learn_threshold:
            self.lam = nn.Parameter(values)
        else:
            self.register_buffer("lam", values)
        size = [EXTENTS * k for k in self.kernel_size]
        self.register_buffer("lipschitz", torch.empty((), device=device, dtype=dtype))
        self.register_buffer("eigenvector", torch.empty(1, in_channels, *size, device=device, dtype=dtype))
        self._version: int | None = None  # of the dictionary that `lipschitz` belongs to
        self.reset_parameters()

    @classmethod
    def from_dictionary(cls, dictionary: Tensor, iterations: int = 2, **options) -> Self:
        """A layer on a copy of a given dictionary (M, C, kh, kw), scaled to unit norm; ``options`` are the layer's."""
        dictionary = check.weight("CSCConv.from_dictionary", "dictionary", dictionary)
        if dictionary.dim() != 4:
            raise ValueError(
                f"CSCConv.from_dictionary: dictionary has shape {tuple(dictionary.shape)}, it takes (M, C, kh, kw)"
            )
        atoms, channels, *kernel = dictionary.shape
        options = {"device": dictionary.device, "dtype": dictionary.dtype} | options
        layer = cls(channels, atoms, tuple(kernel), iterations, **options)
        layer.dictionary = dictionary.detach().clone()
        layer.find_step()
        return layer

    def __setattr__(self, name: str, value) -> None:
        held = getattr(self, "lam", None) if name == "lam" else None
        if held is None or isinstance(value, nn.Parameter):
            return super().__setattr__(name, value)
        with torch.no_grad():
            held.copy_(self._lam_of(value, tuple(held.shape)))

    @staticmethod
    def _lam_of(value: float | Tensor, shape: tuple[int, ...]) -> Tensor:
        """A value of lam as a tensor, 0-d or of the shape."""
        if not isinstance(value, Tensor):
            return torch.tensor(check.number("CSCConv", "lam", value), dtype=torch.float64)
        if check.tensor("CSCConv", "lam", value).shape not in ((), shape):
            raise ValueError(f"CSCConv: lam has shape {tuple(value.shape)}, it takes a number or shape {shape}")
        return value.detach()

    def reset_parameters(self) -> None:
        """Kaiming-uniform atoms, scaled to unit norm, L of them, and lam as given to the layer."""
        with torch.no_grad():
            atoms = torch.empty_like(self.dictionary)
            nn.init.kaiming_uniform_(atoms)
            self.dictionary = atoms / atoms.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            self.lam.copy_(self._start)
        self.find_step()

    def _size(self) -> tuple[int, ...]:
        return tuple(self.eigenvector.shape[2:])

    @torch.no_grad()
    def find_step(self) -> None:
        """L of the dictionary as it is, from nothing: for a dictionary that was changed by hand, in place."""
        atoms = self.dictionary
        if atoms.is_meta:
            return
        wide = atoms if atoms.dtype == torch.float64 else atoms.float()
        geometry = self._geometry()
        with reference.without_autocast(atoms.device.type):
            top = reference.top_signal(wide, self._size(), geometry)
            self.lipschitz.copy_(reference.analysis(top, wide, **geometry).square().sum())
        self.eigenvector.copy_(top)
        self.parametrizations.dictionary[0].assigned = False
        self._version = self._current_version()

    @torch.no_grad()
    def _follow(self, atoms: Tensor) -> None:
        """One step of power iteration: v <- S_D A_D v / L, L = ||S_D A_D v||."""
        wide = atoms.detach() if atoms.dtype == torch.float64 else atoms.detach().float()
        geometry = self._geometry()
        with reference.without_autocast(atoms.device.type):
            top = self.eigenvector.to(wide.dtype)
            image = reference.synthesis(reference.analysis(top, wide, **geometry), wide, self._size(), **geometry)
            norm = image.norm()
        self.lipschitz.copy_(norm)
        self.eigenvector.copy_(image / torch.where(norm == 0, 1, norm))
        self._version = self._current_version()

    def _step(self, atoms: Tensor) -> Tensor:
        if self.parametrizations.dictionary[0].assigned:
            self.find_step()
        elif self.training and ((version := self._current_version()) is None or version != self._version):
            self._follow(atoms)
        return STEP * reference.longest_step(self.lipschitz)

    def _current_version(self) -> int | None:
        """What changes with the dictionary; None under torch.compile, where every training step changes it."""
        return None if torch.compiler.is_compiling() else self.parametrizations.dictionary.original._version

    def forward(self, y: Tensor) -> Tensor:
        atoms = self.dictionary
        return functional.ista(
            y,
            atoms,
            self.lam,
            iterations=self.iterations,
            step=self._step(atoms),
            fast=self.solver == "fista",
            **self._geometry(),
            one_sided=self.one_sided,
        )

    def residual(self, y: Tensor, codes: Tensor) -> Tensor:
        """||y - S_D codes||_2 of each sample, (N,)."""
        y = check.tensor("CSCConv.residual", "y", y)
        return (y - self.decode(codes, tuple(y.shape[2:]))).flatten(1).norm(dim=1)

    def objective(self, y: Tensor, codes: Tensor) -> Tensor:
        """1/2 ||y - S_D codes||^2 + lam ||codes||_1 of each sample, (N,)."""
        return functional.lasso_objective(codes, y, self.dictionary, self.lam, **self._geometry())

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.code_channels}, kernel_size={self.kernel_size}, iterations={self.iterations}, "
            f"stride={self.stride}, padding={self.padding}, solver={self.solver!r}, one_sided={self.one_sided}, "
            f"learn_threshold={self.learn_threshold}"
        )
