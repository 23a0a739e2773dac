"""Benchmarks as data: their questions, and how scores of pictures become the published numbers.

Nothing here draws or looks at a picture, and nothing of the benchmarks' own comes with the package:
users name the directory that they downloaded. A module of this package that has `BENCHMARKS` is
found by `base.benchmark`; that is all that adding one takes.
"""
