"""The benchmark: rows to time (rows.py), in fresh processes (run.py, measure.py), and their results.

watch.py times steps, equality.py compares losses with the plain loop's, result.py and table.py show what
was measured. Imports what `launch/perf` may.
"""
