"""Read text as documents, tokenise them to disk, and build batches.

May import `runtime`, `config` and the layers below them.
"""
