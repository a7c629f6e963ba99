"""One module, template and page for each kind of cluster: how a job is rendered, submitted and ended.

May import what `cluster` may, and `cluster` itself.
"""
