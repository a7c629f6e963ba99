"""What a layout needs, before anything is computed: parameters, FLOPs, memory.

May import `training`, `checkpoint` and what lies below them.
"""
