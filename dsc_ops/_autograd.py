"""What PyTorch has to know of each operator besides its kernels: the shape of its results (fake kernels), its gradient,
what torch.func.vmap makes of it, and the dtype that autocast gives it.

Gradients: math.md section 4 of the project's design, that is, for u = z + A_W(y - S_D z), x = T(u), g = dL/dx

    gu = g 1[x != 0]      dtheta = -sum sign(x) g      dW = corr(r, gu)      gr = S_W(gu)      dy = gr
    dD = -corr(gr, z)     dz = gu - A_D(gr)

`analysis`, `synthesis` and `correlation` are the three derivatives of one trilinear form, so each is differentiated, to
any order, by the other two. The backward operators of the rest refuse to be differentiated again, and all refuse
forward mode.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dsc_ops import _on_cuda
from dsc_ops._library import cuda_reason, refuse_cuda

try:
    from torch._functorch.utils import enable_single_level_autograd_function
    from torch.autograd.function import _SingleLevelFunction
except ImportError:  # private names of torch 2.10 to 2.14; without them gradients remain, torch.func does not
    _SingleLevelFunction = None

ops = torch.ops.dsc_ops

_library = torch.library.Library("dsc_ops", "FRAGMENT")


def _code_size(signal_size, kernel, stride, padding, dilation) -> list[int]:
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(signal_size, kernel, stride, padding, dilation, strict=True)
    ]


def _empty_codes(y: Tensor, weight: Tensor, stride, padding, dilation) -> Tensor:
    size = _code_size(y.shape[2:], weight.shape[2:], stride, padding, dilation)
    return y.new_empty([y.shape[0], weight.shape[0], *size])


def _like(u: Tensor) -> Tensor:
    """Elementwise results: dense, channels_last where the input is exactly that."""
    last = u.dim() == 4 and not u.is_contiguous() and u.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(u, memory_format=torch.channels_last if last else torch.contiguous_format)


def _needed(ctx, gradients: tuple[Tensor, ...], inputs: tuple[int, ...]) -> list[Tensor | None]:
    """The gradients that were asked for; the operators return empty tensors in place of the others."""
    return [g if ctx.needs_input_grad[i] else None for g, i in zip(gradients, inputs, strict=True)]


def _differentiate(name: str, backward: Callable, setup_context: Callable) -> None:
    """Registers an operator's gradient, as torch.library.register_autograd does, and besides

    - for torch.func.grad and what is built on it, which take a function of one level with a setup_context;
    - so that forward mode is refused by name, where a tangent would be dropped without a word.
    """
    if _SingleLevelFunction is None:
        torch.library.register_autograd(f"dsc_ops::{name}", backward, setup_context=setup_context)
        return
    op = getattr(ops, name).default

    def below(keyset, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def nested(keyset, *args):
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):  # for the levels below this one
            return below(keyset, *args)

    def setup(ctx, inputs, output):
        setup_context(ctx, inputs[1:], output)

    def gradients(ctx, *grads):
        needs = ctx.needs_input_grad
        ctx.needs_input_grad = needs[1:]
        try:
            result = backward(ctx, *grads)
        finally:
            ctx.needs_input_grad = needs
        return None, *(result if isinstance(result, tuple) else (result,))

    def jvp(ctx, *tangents):
        raise RuntimeError(
            f"dsc_ops: the forward-mode derivative of {name} is not supported (dsc_ops.reference has it)"
        )

    # Under this name anomaly mode and messages about in-place modification speak of the operator.
    rules = dict(setup_context=staticmethod(setup), backward=staticmethod(gradients), jvp=staticmethod(jvp))
    base = type(f"dsc_ops_{name}", (_SingleLevelFunction,), rules | dict(forward=staticmethod(below)))
    level = type(f"dsc_ops_{name}", (_SingleLevelFunction,), rules | dict(forward=staticmethod(nested)))

    def kernel(keyset, *args):
        backward_mode = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        if not backward_mode and forward_ad._current_level < 0:
            return below(keyset, *args)
        if not torch._C._are_functorch_transforms_active():
            return base.apply(keyset, *args)
        with enable_single_level_autograd_function():
            return level.apply(keyset, *args)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


# --- soft_threshold ---------------------------------------------------------------------------------------------------


@torch.library.register_fake("dsc_ops::soft_threshold")
def _(u, theta, bias, residual, one_sided):
    return _like(u)


@torch.library.register_fake("dsc_ops::soft_threshold_backward")
def _(grad, codes, theta, one_sided):
    return _like(codes), torch.empty_like(theta), codes.new_empty(codes.shape[1] if codes.dim() >= 2 else 0)


def _soft_threshold_setup(ctx, inputs, output):
    _, theta, bias, residual, ctx.one_sided = inputs
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    ctx.save_for_backward(output, theta)


def _soft_threshold_backward(ctx, grad):
    codes, theta = ctx.saved_tensors
    grad_u, grad_theta, grad_bias = ops.soft_threshold_backward(grad, codes, theta, ctx.one_sided)
    return grad_u, grad_theta, grad_bias if ctx.has_bias else None, grad_u if ctx.has_residual else None, None


_differentiate("soft_threshold", _soft_threshold_backward, _soft_threshold_setup)

# --- shrink -----------------------------------------------------------------------------------------------------------


@torch.library.register_fake("dsc_ops::shrink")
def _(u, theta, activation, one_sided):
    return _like(u)


@torch.library.register_fake("dsc_ops::shrink_backward")
def _(grad, u, theta, activation, one_sided):
    return _like(u), torch.empty_like(theta)


def _shrink_setup(ctx, inputs, output):
    u, theta, ctx.activation, ctx.one_sided = inputs
    ctx.save_for_backward(u, theta)


def _shrink_backward(ctx, grad):
    u, theta = ctx.saved_tensors
    return *ops.shrink_backward(grad, u, theta, ctx.activation, ctx.one_sided), None, None


_differentiate("shrink", _shrink_backward, _shrink_setup)

# --- l1_norm ----------------------------------------------------------------------------------------------------------


@torch.library.register_fake("dsc_ops::l1_norm")
def _(x, alpha):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((), dtype=wide), x.new_empty((), dtype=torch.int64)


@torch.library.register_fake("dsc_ops::l1_norm_backward")
def _(grad, x):
    return _like(x)


def _l1_norm_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0])


def _l1_norm_backward(ctx, grad, _):
    return (None if grad is None else ops.l1_norm_backward(grad, *ctx.saved_tensors)), None


_differentiate("l1_norm", _l1_norm_backward, _l1_norm_setup)

# --- the passes of the MSD-CSC block, which has the autograd of all ---------------------------------------------------


@torch.library.register_fake("dsc_ops::use_large_pages")
def _(memory):
    return None


@torch.library.register_fake("dsc_ops::dilated_convolution_")
def _(out, x, weight, dilation, transposed, base):
    return None


@torch.library.register_fake("dsc_ops::dilated_correlation")
def _(x, z, dilation):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(z.shape[1], x.shape[1], 3, 3, dtype=wide)


@torch.library.register_fake("dsc_ops::norm_relu_")
def _(x, scale, bias, gamma, beta, mean, variance, training, eps):
    return None


@torch.library.register_fake("dsc_ops::unfold_norm_relu_")
def _(u, g, e, scale, bias, gamma, beta, mean, variance, training, eps, out, error):
    return None


@torch.library.register_fake("dsc_ops::norm_relu_backward_")
def _(grad, x, scale, shift, gamma, beta, inverse, training, factor, handed, e, share, error):
    return tuple(torch.empty_like(gamma) for _ in range(3))


# --- analysis, synthesis, correlation: <A_W y, x> = <y, S_W x> = <W, corr(y, x)> --------------------------------------


@torch.library.register_fake("dsc_ops::analysis")
def _(y, weight, stride, padding, dilation, groups):
    return _empty_codes(y, weight, stride, padding, dilation)


@torch.library.register_fake("dsc_ops::synthesis")
def _(x, weight, signal_size, stride, padding, dilation, groups):
    return x.new_empty([x.shape[0], weight.shape[1] * groups, *signal_size])


@torch.library.register_fake("dsc_ops::correlation")
def _(y, x, kernel_size, stride, padding, dilation, groups):
    return y.new_empty([x.shape[1], y.shape[1] // groups, *kernel_size])


def _pair_setup(ctx, inputs, output):
    """Both factors of the form are the first two arguments; the geometry comes last."""
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.geometry = inputs[-4:]


def _analysis_backward(ctx, grad):
    y, weight = ctx.saved_tensors
    grad_y = ops.synthesis(grad, weight, y.shape[2:], *ctx.geometry) if ctx.needs_input_grad[0] else None
    grad_weight = ops.correlation(y, grad, weight.shape[2:], *ctx.geometry) if ctx.needs_input_grad[1] else None
    return grad_y, grad_weight, None, None, None, None


def _synthesis_backward(ctx, grad):
    x, weight = ctx.saved_tensors
    grad_x = ops.analysis(grad, weight, *ctx.geometry) if ctx.needs_input_grad[0] else None
    grad_weight = ops.correlation(grad, x, weight.shape[2:], *ctx.geometry) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, None, None, None, None, None


def _correlation_backward(ctx, grad):
    y, x = ctx.saved_tensors
    grad_y = ops.synthesis(x, grad, y.shape[2:], *ctx.geometry) if ctx.needs_input_grad[0] else None
    grad_x = ops.analysis(y, grad, *ctx.geometry) if ctx.needs_input_grad[1] else None
    return grad_y, grad_x, None, None, None, None, None


_differentiate("analysis", _analysis_backward, _pair_setup)
_differentiate("synthesis", _synthesis_backward, _pair_setup)
_differentiate("correlation", _correlation_backward, _pair_setup)

# --- conv_soft_threshold ----------------------------------------------------------------------------------------------


@torch.library.register_fake("dsc_ops::conv_soft_threshold")
def _(y, weight, bias, theta, stride, padding, dilation, groups, one_sided):
    return _empty_codes(y, weight, stride, padding, dilation)


@torch.library.register_fake("dsc_ops::conv_soft_threshold_backward")
def _(grad, codes, y, weight, theta, stride, padding, dilation, groups, one_sided, needs):
    full = (y.shape, weight.shape, weight.shape[:1], theta.shape)
    return tuple(y.new_empty(shape if need else 0) for shape, need in zip(full, needs, strict=True))


def _conv_soft_threshold_setup(ctx, inputs, output):
    y, weight, _, theta, *ctx.rest = inputs
    ctx.save_for_backward(output, y, weight, theta)


def _conv_soft_threshold_backward(ctx, grad):
    needs = list(ctx.needs_input_grad[:4])
    gradients = ops.conv_soft_threshold_backward(grad, *ctx.saved_tensors, *ctx.rest, needs)
    return *_needed(ctx, gradients, (0, 1, 2, 3)), *[None] * 5


_differentiate("conv_soft_threshold", _conv_soft_threshold_backward, _conv_soft_threshold_setup)

# Where the operators are those of CUDA; the tests have them on the CPU too.
cuda_device = "cuda"

# --- lista ------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("dsc_ops::lista")
def _(y, dictionary, analysis, theta, x0, momentum, stride, padding, dilation, groups, one_sided, keep_tape):
    codes = _empty_codes(y, dictionary, stride, padding, dilation)
    if y.device.type == cuda_device:
        return codes, _on_cuda.empty_tape(y, dictionary, theta, codes, stride, dilation, groups, keep_tape)
    # TapeLayout of csrc/core/code_format.h.
    value_size = 8 if y.dtype == torch.float64 else 4
    pixels = codes.numel() // dictionary.shape[0] * groups
    mask_size = (dictionary.shape[0] // groups + 63) // 64 * 8
    values = theta.shape[0] * codes.numel() * value_size
    step = (pixels // 32 + groups) * 16 + pixels * mask_size + y.numel() * value_size
    size = (values + 2047) // 2048 * 64 + theta.shape[0] * step + values + 64
    return codes, codes.new_empty(size if keep_tape else 0, dtype=torch.uint8)


@torch.library.register_fake("dsc_ops::lista_backward")
def _(grad, tape, y, dictionary, analysis, theta, x0, momentum, stride, padding, dilation, groups, one_sided, needs):
    full = (y.shape, dictionary.shape, analysis.shape, theta.shape, grad.shape)
    return tuple(y.new_empty(shape if need else 0) for shape, need in zip(full, needs, strict=True))


def _lista_setup(ctx, inputs, output):
    *tensors, ctx.momentum, stride, padding, dilation, groups, one_sided, ctx.has_tape = inputs
    ctx.rest = (stride, padding, dilation, groups, one_sided)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *tensors)


def _lista_backward(ctx, grad, _):
    if grad is None:
        return (None,) * 12
    tape, *tensors = ctx.saved_tensors
    if not ctx.has_tape:  # the caller did not expect a backward pass: run the iterations once more
        tape = ops.lista(*tensors, ctx.momentum, *ctx.rest, True)[1]
    needs = list(ctx.needs_input_grad[:5])
    gradients = ops.lista_backward(grad, tape, *tensors, ctx.momentum, *ctx.rest, needs)
    return *_needed(ctx, gradients, (0, 1, 2, 3, 4)), *[None] * 7


_differentiate("lista", _lista_backward, _lista_setup)

# --- res_csc ----------------------------------------------------------------------------------------------------------


def _channels_last(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@torch.library.register_fake("dsc_ops::res_csc")
def _(x, first, second, scale, gamma_1, *rest):
    return *(_channels_last(x) for _ in range(4)), x.new_empty(4, x.shape[1])


@torch.library.register_fake("dsc_ops::res_csc_backward")
def _(grad, a, g, u, statistics, x, first, second, scale, gamma_1, *rest):
    return (
        _channels_last(x),
        *(w.new_empty(w.shape) for w in (first, second, scale)),
        *(gamma_1.new_empty(gamma_1.shape) for _ in range(4)),
    )


def _res_csc_setup(ctx, inputs, output):
    *tensors, _, _, _, _, training, eps_1, eps_2, shortcut = inputs
    ctx.rest = (training, eps_1, eps_2, shortcut)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:], *tensors)


def _res_csc_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 16
    gradients = ops.res_csc_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return *_needed(ctx, gradients, range(8)), *[None] * 8


_differentiate("res_csc", _res_csc_backward, _res_csc_setup)

# --- no second derivative ---------------------------------------------------------------------------------------------


def _once_differentiable(name: str, definition: str) -> None:
    def setup(ctx, inputs, output):
        pass

    def refuse(ctx, *grads):
        raise RuntimeError(f"dsc_ops: the second derivative of {name} is not supported ({definition}.{name} has it)")

    _differentiate(f"{name}_backward", refuse, setup)


for _name in ("soft_threshold", "shrink", "conv_soft_threshold", "lista"):
    _once_differentiable(_name, "dsc_ops.reference")
_once_differentiable("res_csc", "dsc_ops.layers.csc.reference")


def _l1_norm_double_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _l1_norm_double_backward(ctx, grad):
    # l1_norm_backward(g, x) = g sign(x): linear in g, and constant in x almost everywhere.
    (x,) = ctx.saved_tensors
    return (grad * x.sign()).sum(dtype=torch.float64 if x.dtype == torch.float64 else torch.float32), None


_differentiate("l1_norm_backward", _l1_norm_double_backward, _l1_norm_double_setup)

# --- vmap -------------------------------------------------------------------------------------------------------------


def _join(value: Tensor | None, axis: int | None, size: int) -> Tensor | None:
    """The mapped axis of a batch joined to the batch's own."""
    if value is None:
        return None
    value = value.unsqueeze(0).expand(size, *value.shape) if axis is None else value.movedim(axis, 0)
    return value.flatten(0, 1) if value.dim() > 1 else value


def _mapped(name: str, *batches: int) -> None:
    """torch.func.vmap: one call where only the arguments at the positions `batches` are mapped, which have a batch axis
    of their own; elsewhere one call for each entry."""
    op = getattr(ops, name)

    def rule(info, in_dims, *args):
        size = info.batch_size
        axes = [axis if isinstance(axis, int) else None for axis in in_dims]
        if all(axis is None or i in batches for i, axis in enumerate(axes)):
            joined = [_join(a, axes[i], size) if i in batches else a for i, a in enumerate(args)]
            result = op(*joined)
            first, *rest = result if isinstance(result, tuple) else (result,)
            mapped = args[0].dim() - (axes[0] is not None) > 0  # else there was no batch axis to join
            first = first.unflatten(0, (size, first.shape[0] // max(size, 1))) if mapped else first
            return ((first, *rest), (0, *[None] * len(rest))) if rest else (first, 0)
        results = []
        for n in range(size):
            entry = [a if axis is None else a.select(axis, n) for a, axis in zip(args, axes, strict=True)]
            if name == "lista_backward" and axes[1] is None and axes[2] is not None:
                # The tape is that of the joined batch: the iterations of this entry once more.
                *call, _ = entry[2:]
                entry[1] = ops.lista(*call, True)[1]
            results.append(op(*entry))
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    torch.library.register_vmap(f"dsc_ops::{name}", rule, lib=_library)


for _name, _batches in {
    "soft_threshold": (0, 3),
    "soft_threshold_backward": (),
    "shrink": (0,),
    "shrink_backward": (),
    "l1_norm": (),
    "l1_norm_backward": (),
    "analysis": (0,),
    "synthesis": (0,),
    "correlation": (),
    "conv_soft_threshold": (0,),
    "conv_soft_threshold_backward": (),
    "lista": (0, 4),
    "lista_backward": (),
    "res_csc": (),
    "res_csc_backward": (),
}.items():
    _mapped(_name, *_batches)

# --- autocast ---------------------------------------------------------------------------------------------------------
# As for torch's convolutions: every floating argument but float64 is cast to the dtype that autocast was entered with.
# The elementwise operators and the penalty have no rule: they take the dtype they are given and compute in float32.


def _lower_precision(name: str, device: str) -> Callable:
    key = f"Autocast{device.upper()}"
    op = getattr(ops, name).default
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(value):
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
            return value.to(torch.get_autocast_dtype(device))
        return value

    def kernel(*args):
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op(*[cast(a) for a in args])

    _library.impl(name, kernel, key)


for _name in ("analysis", "synthesis", "conv_soft_threshold", "lista"):
    for _device in ("cpu", "cuda"):
        _lower_precision(_name, _device)

# --- CUDA implementations that are not kernels ------------------------------------------------------------------------

_on_cuda.register(_library)

# The rest has kernels in _cuda. Without them the dispatcher would answer with a page of backends.
if cuda_reason:
    for _name in ("soft_threshold", "shrink", "l1_norm", "packed_conv_soft_threshold", "packed_lista"):
        for _operator in (_name, f"{_name}_backward"):
            _library.impl(_operator, refuse_cuda(_operator, cuda_reason), "CUDA")
for _name in ("res_csc", "res_csc_backward"):
    _library.impl(_name, refuse_cuda(_name, "there its layer is composed of other operators"), "CUDA")
