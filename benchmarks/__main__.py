"""`python -m benchmarks`: see :mod:`benchmarks.program`."""

import sys

from benchmarks.program import main

if __name__ == "__main__":
    sys.exit(main())
