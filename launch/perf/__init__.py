"""Speed: the benchmark and the trace of a pipeline.

May import `parity`, `planner`, `training` and what lies below them.
"""
