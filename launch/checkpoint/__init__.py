"""Save and check checkpoints, resume from them, and gather full weights from any layout.

May import `runtime`, `config`, `deepspeed_patches` and the layers below them.
"""
