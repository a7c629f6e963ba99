"""The kind of work of a GPU kernel, or of an operator on a CPU, by its name."""

import re

GEMM, ATTENTION, LOSS, OPTIMIZER = "GEMM", "attention", "loss", "optimizer"
ELEMENTWISE, COPY, COMMUNICATION = "element-wise and norms", "copies", "communication"
# In this order, where several run at the same time on different streams.
COMPUTE = (GEMM, ATTENTION, LOSS, OPTIMIZER, ELEMENTWISE, COPY)

# The first that matches decides. What matches none is element-wise: norms, activations, additions, casts,
# and what a compiler has fused of those.
_PATTERNS = [
    # A compiler names its kernels by the operators around them, collectives among them.
    (COMMUNICATION, r"^(?!triton).*(nccl|gloo:|c10d|all_?reduce|all_?gather|reduce_?scatter)"),
    # The kernels of cuDNN, FlashAttention and cutlass; a softmax without a logarithm is attention's.
    (ATTENTION, r"sdpa|fmha|flash|attention|(?<!log_)(?<!log)softmax(?!.*log_?softmax)"),
    (LOSS, r"cross_?entropy|nll_?loss|log_?softmax"),
    # Norms of lists of tensors are the clipping's.
    (OPTIMIZER, r"adam|optimizer\.step|multi_tensor_apply|foreach|lpnorm"),
    (GEMM, r"gemm|nvjet|cutlass|xmma|cublas|splitk|triton_tem|\b(add|b|badd|aten::)?mm\b|"
           r"addmm|bmm|matmul|aten::linear|mmbackward"),
    (COPY, r"^memcpy|^memset|aten::(copy_|_to_copy|to)$"),
]  # fmt: skip
_COMPILED = [(kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in _PATTERNS]


def kind_of(name: str) -> str:
    """The kind of a kernel or operator."""
    for kind, pattern in _COMPILED:
        if pattern.search(name):
            return kind
    return ELEMENTWISE
