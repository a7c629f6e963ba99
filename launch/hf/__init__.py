"""Models from and to the format of transformers, and weights files read in slices.

May import `checkpoint`, `data`, `runtime`, `config` and the packages below them.
"""
