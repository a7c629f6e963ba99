"""Every workaround for DeepSpeed, one function each; nothing else may patch DeepSpeed.

May import `models` and `launch.errors`.
"""
