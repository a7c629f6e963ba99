"""The user's request: a recipe, its DeepSpeed JSON and the number of ranks, checked and resolved.

May import `ds_json`. Does not need torch.
"""
