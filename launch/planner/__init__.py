"""A layout's requirements, before anything is computed: parameters, FLOPs, memory.

May import `training`, `checkpoint` and the packages below them.
"""
