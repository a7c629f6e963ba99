"""Collectives, tensor-parallel layers, random numbers and process groups.

Knows no model, and imports nothing but torch: copy the folder as it is.
"""
