"""What a rank's memory is made of at one moment."""

from dataclasses import dataclass, fields

# Workspaces that cuBLAS takes from torch's allocator on an H100 or H200: 32 MiB for each of the two
# threads that run kernels (the forward and the backward pass).
WORKSPACES = 64 * 2**20


@dataclass(frozen=True)
class Parts:
    """Bytes on the device at one moment."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    buckets: float = 0.0
    gathered: float = 0.0
    overhead: float = WORKSPACES

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(float(getattr(self, field.name)) for field in fields(self))
