"""Every fault that parity has to see, and where `scripts/parity.py --bisect` has to find it.

A fault is planted in the ranks of a layout, never in the reference. Not here, since parity cannot see
them, and where they are seen instead:

- What both sides share and a fault would change alike: a GPT's layers (`tests/unit/test_gpt.py`, against
  transformers), its initial weights (their distribution there too), the batches and where documents begin
  (`tests/unit/test_batches.py`, `test_documents.py`), the schedule's formula
  (`tests/unit/test_lr_schedule.py`), and how the JSON is read (`tests/ds_configs`). Here they are planted
  on one side.
- Changes that are no fault, as the result is the same: samples in another order within a global batch,
  rotary positions of queries and keys shifted alike, a bias of all keys.
- Changes below rounding at the size of initial weights: the exact GELU in the place of its tanh form.
- What a run from the start does not do: checkpoints and swapped optimizer state
  (`tests/resume`, `tests/deepspeed_patches/test_nvme.py`), evaluation (`test_evaluation.py`), dropout masks
  (`tests/unit/test_parallel_rng.py`).
- Workarounds without an effect on these numbers: `pipeline.use_schedule` taken out runs DeepSpeed's own
  1f1b, which computes the same; those of start-up, locks and swap folders. `tests/deepspeed_patches` has
  all.
"""

from tests.parity.faults import (
    chunks,
    clip,
    data,
    hf,
    interleaved,
    model,
    optimizer,
    pipeline,
    sequence,
    sft,
    tensor,
    workarounds,
    zero,
    zero_bubble,
)

KINDS_OF_ONE_MODEL = (model, zero, clip, optimizer, data, chunks, sft)
ONE_MODEL = [fault for kind in KINDS_OF_ONE_MODEL for fault in kind.FAULTS]
SHARDED = [
    fault
    for kind in (tensor, sequence, pipeline, zero_bubble, interleaved, hf, workarounds)
    for fault in kind.FAULTS
]
FAULTS = [*ONE_MODEL, *SHARDED]
