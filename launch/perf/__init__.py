"""Performance: the benchmark and the pipeline trace.

May import `parity`, `planner`, `training` and the packages below them.
"""
