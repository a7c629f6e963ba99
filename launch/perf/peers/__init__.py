"""Peers: what a user would train the same GPT with instead, a file each, to be timed beside a recipe.

They share `plain_gpt.py` (a GPT-2 in plain PyTorch) and `job.py` (what to train: sizes, batches, initial
weights, learning rates), and nothing of `models/` or of DeepSpeed's engine beyond what they are to show.
Imports what `launch/perf` may.
"""

# In the order of the table: the names of `--peers`, which are the modules of this package.
PEERS = ("torch_compiled", "fsdp2", "raw_deepspeed", "hf_trainer", "dtensor", "megatron_core")
