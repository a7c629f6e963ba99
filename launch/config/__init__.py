"""What the user asked for: a recipe, its DeepSpeed JSON and its number of ranks, checked and resolved.

May import `ds_json`. It needs no torch.
"""
