"""Which released DeepSpeed computes right: probes of raw DeepSpeed, run against each version.

`probes.py` describes a probe, `raw_deepspeed.py` trains it as a user of DeepSpeed alone would, and
`reference.py` trains the same in plain PyTorch on one device. `compositions.py` lists what is tried, and
`issues.py` which known defects that shows. `worker.py` runs probes in one process that has imported one
version, in ranks forked from it (`forked.py`). `environments.py` installs versions side by side,
`survey.py` asks each of them, `results.py` judges and keeps what was measured, and `table.py` writes it
as a page.

The probes share nothing with `launch.training` or `launch.parity`, which hold workarounds for one
version. Nothing that a worker imports may import them.

May import `launch.errors`, `launch.paths` and `launch.runtime`.
"""
