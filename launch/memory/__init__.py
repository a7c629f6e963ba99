"""A layout's memory per rank, predicted: state, activations, gathered weights, and the step's peak.

Reads a recipe and a resolved DeepSpeed JSON; starts nothing and needs no torch. May import `config` and the
packages below it.
"""
