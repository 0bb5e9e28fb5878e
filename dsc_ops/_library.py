"""Loads the shared objects and tells what was built and what was found.

`_C` (operator schemas and CPU kernels) must load; `_cuda` (CUDA kernels) is loaded when this torch can use it. Trouble
with CUDA never stops the import: `cuda_reason` says why the kernels are absent, and `python -m dsc_ops` prints it.
"""

import importlib.util
import os
import re
import sysconfig
from collections.abc import Callable
from typing import Any

import torch

OLDEST_TORCH = (2, 10)


def check_torch(version: str) -> None:
    """Raise ImportError when this torch is older than the stable ABI that the objects are built for."""
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
        needed = ".".join(map(str, OLDEST_TORCH))
        raise ImportError(f"dsc_ops needs torch {needed} or newer, found torch {version}")


def check_interpreter(free_threaded: bool) -> None:
    """Raise ImportError under a Python without the global interpreter lock, where nothing here was ever tested."""
    if free_threaded:
        raise ImportError(
            "dsc_ops does not support free-threaded Python, use the build with the global interpreter lock"
        )


check_torch(torch.__version__)
check_interpreter(bool(sysconfig.get_config_var("Py_GIL_DISABLED")))

try:
    from dsc_ops import _C
except ImportError as error:
    if importlib.util.find_spec("dsc_ops._C"):
        raise ImportError(
            f"dsc_ops: the compiled library cannot be loaded: {str(error).splitlines()[0]}; install the package "
            "again on this machine, for this Python and torch"
        ) from error
    raise ImportError(
        f"dsc_ops: {os.path.dirname(__file__)} has no compiled library for this Python; install the package "
        "(pip install . in the source folder) and start Python outside the source folder, or install it with pip's -e"
    ) from error

version: str = _C.version


def choose_cpu_capability(level: str | None) -> None:
    """Use the CPU kernels of the level that DSC_OPS_CPU_CAPABILITY names; by default the best that this machine has."""
    available = _C.cpu_capabilities()
    if level and level not in available:
        raise ImportError(
            f"DSC_OPS_CPU_CAPABILITY is {level!r}, which is not available; this machine has: {', '.join(available)}"
        )
    if level:
        _C.set_cpu_capability(level)


def cuda_obstacle(built: str, running: str | None) -> str:
    """Why an object built with CUDA version `built` cannot serve a torch with CUDA `running`; empty when it can."""
    if not built:
        return (
            "dsc_ops was built without CUDA kernels (an installation with DSC_OPS_CUDA=1 in the environment says why)"
        )
    if not running:
        return "this torch is a build without CUDA"
    if built.split(".")[0] != running.split(".")[0]:
        return f"dsc_ops was built with CUDA {built}, this torch has CUDA {running}"
    return ""


def load_cuda() -> str:
    """Load the CUDA kernels; the reason why not, empty when they are loaded. This needs no GPU and no driver."""
    reason = cuda_obstacle(_C.cuda_version, torch.version.cuda)
    if reason:
        return reason
    found = importlib.util.find_spec("dsc_ops._cuda")
    if found is None or found.origin is None:
        return "the file of the CUDA kernels is missing from this installation"
    try:
        torch.ops.load_library(found.origin)
    except OSError as error:  # torch names the file alone, the loader what is missing
        return f"the CUDA kernels cannot be loaded: {str(error.__cause__ or error).splitlines()[0]}"
    return ""


def refuse_cuda(name: str, reason: str) -> Callable:
    """What an operator without CUDA kernels does with a tensor on a GPU."""

    def refuse(*arguments):
        raise RuntimeError(f"dsc_ops: {name} cannot run on a GPU: {reason}; tensors on the CPU work")

    return refuse


choose_cpu_capability(os.environ.get("DSC_OPS_CPU_CAPABILITY"))
cuda_reason = load_cuda()


def information() -> dict[str, Any]:
    """What was built and what was found here, for bug reports."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "version": version,
        "torch": torch.__version__,
        "torch_built": _C.torch_version,
        "compiler": _C.compiler,
        "cpu_capability": _C.cpu_capability(),
        "cpu_capabilities": _C.cpu_capabilities(),
        "threads": torch.get_num_threads(),
        "cuda_loaded": not cuda_reason,
        "cuda_reason": cuda_reason,
        "cuda_built": _C.cuda_version,
        "cuda_architectures": _C.cuda_architectures,
        "gpus": gpus,
    }


def report() -> str:
    """`information` for people."""
    facts = information()
    cuda = f"not loaded: {facts['cuda_reason']}"
    if facts["cuda_loaded"]:
        cuda = "loaded"
    if facts["cuda_built"]:
        cuda += f" (built with CUDA {facts['cuda_built']} for {facts['cuda_architectures']})"
    rows = {
        "dsc_ops": facts["version"],
        "torch": f"{facts['torch']} (dsc_ops was built against {facts['torch_built']})",
        "compiler": facts["compiler"],
        "CPU kernels": f"{facts['cpu_capability']} (available: {', '.join(facts['cpu_capabilities'])})",
        "threads": str(facts["threads"]),
        "CUDA kernels": cuda,
        "GPU": ", ".join(facts["gpus"]) or "none found",
    }
    return "\n".join(f"{name:14}{value}" for name, value in rows.items())
