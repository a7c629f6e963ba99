"""Tests of the DeepSpeed JSONs and of their linter."""
