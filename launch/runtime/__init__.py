"""Processes and the machine: ranks, signals, errors, run folders, ssh, hardware.

May import `config`, `deepspeed_patches` and the layers below them.
"""
