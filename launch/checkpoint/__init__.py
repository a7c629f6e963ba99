"""Save a run so that any layout can go on from it, resume, and gather full weights from any layout.

May import `runtime`, `config`, `deepspeed_patches` and the layers below them.
"""
