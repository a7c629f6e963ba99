"""Every workaround for a defect of DeepSpeed, one function each; nothing else may patch DeepSpeed.

A workaround's docstring says what the defect is, in which versions it was seen, what the workaround
does, and which test in `tests/deepspeed_patches` shows the defect on raw DeepSpeed. That test fails once
DeepSpeed has repaired it. A function that only helps a workaround says which one it is part of.
`versions.py` rejects the versions of DeepSpeed that none of this was tested with.

May import `models`, `launch.ds_json` and `launch.errors`.
"""
