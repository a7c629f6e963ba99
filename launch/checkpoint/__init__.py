"""Save, check, resume, and whole weights out of any layout.

May import `runtime`, `config`, `deepspeed_patches` and what lies below them.
"""
