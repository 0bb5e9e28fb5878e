"""What the theory of deep sparse coding promises, for the dictionary in hand.

Matrices are as the papers write them: a dictionary D is (m, d), atoms in columns (so ``LISTALinear.dictionary`` is
D.T); signals are rows, (*, m), and so are codes, (*, d). Coherences and bounds are computed in float64. What solves
linear programmes (:func:`generalized_coherence`, :func:`coherence_certificate`, :func:`basis_pursuit`, and
:func:`certified_lista` and :func:`dsc_solve` when no weights are given) needs scipy: ``pip install dsc_ops[theory]``.
"""

from dsc_ops.theory.coherence import (
    analytic_coherence,
    coherence_certificate,
    generalized_coherence,
    mutual_coherence,
)
from dsc_ops.theory.convolution import conv_coherence, conv_matrix, stripe_norm
from dsc_ops.theory.guarantees import (
    UniquenessBound,
    convergence_rate,
    deep_uniqueness_bounds,
    earlier_stability_bounds,
    is_unique,
    model_stability_bound,
    noise_stability_bound,
    stability_bound,
    uniqueness_bound,
)
from dsc_ops.theory.realization import (
    NetworkSize,
    conv_to_attention,
    lista_to_cnn,
    lista_to_relu_network,
    lista_to_transformer,
    lista_with_activation,
    matrix_to_cnn,
    network_size,
)
from dsc_ops.theory.solvers import Certificate, DeepCodes, basis_pursuit, certified_lista, dsc_solve, iterates

__all__ = [
    "Certificate",
    "DeepCodes",
    "NetworkSize",
    "UniquenessBound",
    "analytic_coherence",
    "basis_pursuit",
    "certified_lista",
    "conv_coherence",
    "conv_matrix",
    "conv_to_attention",
    "convergence_rate",
    "coherence_certificate",
    "deep_uniqueness_bounds",
    "dsc_solve",
    "earlier_stability_bounds",
    "generalized_coherence",
    "is_unique",
    "iterates",
    "lista_to_cnn",
    "lista_to_relu_network",
    "lista_to_transformer",
    "lista_with_activation",
    "matrix_to_cnn",
    "model_stability_bound",
    "mutual_coherence",
    "network_size",
    "noise_stability_bound",
    "stability_bound",
    "stripe_norm",
    "uniqueness_bound",
]
