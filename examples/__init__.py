"""Networks of the papers on real data, trained with Lightning: `python -m examples.demo --help`.

This is no part of the installed package; it runs from a checkout, with `pip install dsc_ops[examples]`.
"""
