"""Graph in, graph out: one pass a file, one visible list of them in :mod:`qcompile.passes.pipeline`.

The middle floor: nothing here imports a front end.
"""
