"""From a recipe to an engine, and one step of it: model, optimizer, loss, metrics.

May import `data`, `checkpoint`, `runtime` and what lies below them.
"""
