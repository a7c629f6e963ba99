"""Plan a run before anything is computed: what a layout needs, which one fits, which is fastest.

May import `training`, `checkpoint` and the packages below them.
"""
