"""Networks of the papers on real data, trained with Lightning: `python -m examples.demo --help`.

This is no part of the installed package; it runs from a checkout, with the packages of `pip install dsc_ops[examples]`.
"""

import sys
from importlib.util import find_spec

EXTRAS = (
    "jsonargparse",
    "lightning",
    "matplotlib",
    "mlxtend",
    "scipy",
    "skimage",
    "tensorboard",
    "torchmetrics",
    "torchvision",
    "tqdm",
)


def require_extras(*others: str) -> None:
    """End the program with one clear sentence when packages of the examples are missing."""
    missing = [name for name in (*EXTRAS, *others) if find_spec(name) is None]
    if missing:
        sys.exit(f"The examples need {', '.join(missing)}, not installed here: pip install dsc_ops[examples]")
