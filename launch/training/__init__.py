"""From a recipe to an engine and its training steps: model, optimizer, loss, metrics.

May import `data`, `checkpoint`, `runtime` and the packages below them.
"""
