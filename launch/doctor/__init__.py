"""Check that a host can run DeepSpeed: `probe.py` runs on the host, `checks.py` evaluates.

May import `runtime` and the layers below it.
"""
