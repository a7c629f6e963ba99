"""Collectives, tensor-parallel layers, random numbers and process groups.

Independent of any model; imports nothing but torch, so the folder can be copied as is.
"""
