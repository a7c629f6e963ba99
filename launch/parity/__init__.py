"""Does a layout compute the same as one device? The plain PyTorch reference and the comparison.

May import `training`, `checkpoint` and the packages below them.
"""
