"""DeepSpeed's C++ ops: built ahead of time, once, by whichever process comes first.

May import `runtime` and the layers below it.
"""
