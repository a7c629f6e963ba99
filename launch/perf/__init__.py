"""Performance: the benchmark with its levers and peers, the pipeline trace, memory.

May import `parity`, `planner`, `training` and the packages below them.
"""
