"""The real data of the examples, one source a file; `python -m examples.data --help` fetches what no package brings.

What a training run sees depends on its seed and on the epoch alone, never on what was drawn before, so a run that goes
on from a checkpoint sees the same data as one that was never interrupted.
"""
