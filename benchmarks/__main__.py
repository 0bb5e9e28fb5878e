"""`python -m benchmarks`: see :mod:`benchmarks.run`."""

from examples import require_extras

if __name__ == "__main__":
    require_extras()

    from benchmarks.run import main

    main()
