"""Strict parsing, typed access and linting of DeepSpeed JSON. Does not need a recipe.

May import `launch.errors` and `launch.paths`.
"""
