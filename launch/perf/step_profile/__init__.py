"""Where a step's time goes: what ran on the device when (record.py), by kind of work (split.py, kinds.py).

picture.py draws it. Imports what `launch/perf` may.
"""
