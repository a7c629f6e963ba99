"""Text to documents, documents to tokens on disk, tokens to batches.

May import `runtime`, `config` and what lies below them.
"""
