"""The DeepSpeed JSON: read strictly, viewed, and linted. It needs no recipe.

May import `launch.errors` and `launch.paths`.
"""
