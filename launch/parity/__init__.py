"""Does a layout compute what one device computes? The plain PyTorch reference, and the comparison.

May import `training`, `checkpoint` and what lies below them.
"""
