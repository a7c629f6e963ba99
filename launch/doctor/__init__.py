"""What a host needs for DeepSpeed: `probe.py` runs on the host, `checks.py` judges.

May import `runtime` and what lies below it.
"""
