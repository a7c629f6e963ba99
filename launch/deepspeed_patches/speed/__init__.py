"""Workarounds for what DeepSpeed does slowly. Numbers stay the same, or are rounded once less.

`apply.py` says when each is used; recipes/SPEED.md has what each brought. May import what
`launch.deepspeed_patches` may.
"""
