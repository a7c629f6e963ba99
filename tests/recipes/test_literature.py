"""The planner's arithmetic against published numbers."""

import pytest

from launch.ds_json.strict_json import load_json
from launch.memory.activations import Precision, block_bytes, reference_block_bytes
from launch.memory.shapes import Shape
from launch.memory.state import state
from launch.paths import ROOT
from models.config import SIZES, GPTConfig
from models.pipeline_stages import ideal_bubble, micro_batches_alive

# ZeRO, arXiv:1910.02054, figure 1: GB a device for 7.5 billion parameters on 64 devices, with 2 bytes of
# weights, 2 of gradients and 12 of optimizer each.
ZERO = {0: 120.0, 1: 31.4, 2: 16.6, 3: 1.9}


@pytest.mark.parametrize("stage", ZERO)
def test_zero_partitions_as_its_paper_says(stage: int) -> None:
    """Without what DeepSpeed adds to the paper's: gradients accumulated in fp32, buckets, whole copies."""
    shapes, ranks = [Shape("w", 7_500_000_000, True)], 64
    names = {0: "zero0", 1: "zero1_fp16", 2: "zero2_fp16", 3: "zero3_fp16"}
    config = load_json(ROOT / "ds_configs" / f"{names[stage]}.json")
    config["data_types"] = {"grad_accum_dtype": "fp16"}
    if stage == 0:
        config |= {"torch_autocast": {"enabled": False}, "bf16": {"enabled": True}}
    found = state(shapes, config, ranks, 1)
    gradients = found.gradients
    if stage == 1:  # the rank's part is a view of the whole
        gradients -= 2 * shapes[0].numel // ranks
    assert (found.weights + gradients + found.optimizer) / 1e9 == pytest.approx(
        ZERO[stage], rel=0.03
    )


def test_megatrons_activations() -> None:
    """arXiv:2205.05198, equation 1 and table 2, for GPT-3 (sequence 2048, 96 heads, hidden 12288)."""
    config = SIZES["175b"]
    hidden = config.hidden
    assert 5 * config.heads * config.context / hidden == 80  # the paper's own number for the scores
    assert reference_block_bytes(config, 1, False) == hidden * (34 + 80)
    assert reference_block_bytes(config, 8, False) == hidden * (10 + 3 + 10)
    assert reference_block_bytes(config, 8, True) == hidden * (10 + 3)
    # Ours is the formula with selective recomputation, less two masks of dropout and, of one block, none.
    ours = block_bytes(config, 8, False, Precision(2, 2))
    assert ours == reference_block_bytes(config, 8, True) - 2 * hidden


def test_gpipes_bubble() -> None:
    """arXiv:1811.06965, section 2.3: (K - 1) / (M + K - 1), negligible if M is 4 K or more."""
    assert ideal_bubble("gpipe", 4, 1) == 3 / 4
    assert ideal_bubble("gpipe", 4, 8) == 3 / 11
    assert ideal_bubble("gpipe", 4, 16) == pytest.approx(0.158, abs=1e-3)
    assert ideal_bubble("naive", 4, 16) == 3 / 4
    # And its memory: every micro batch's activations, against 1F1B's number of stages.
    assert [micro_batches_alive("gpipe", 4, stage, 16) for stage in range(4)] == [16] * 4
    assert [micro_batches_alive("1f1b", 4, stage, 16) for stage in range(4)] == [4, 3, 2, 1]


def test_a_gpt_of_any_width_scales_as_its_square() -> None:
    narrow, wide = (GPTConfig(1, h, 8, 8, 8) for h in (256, 512))
    assert block_bytes(wide, 1, False, Precision(2, 2)) == 2 * block_bytes(
        narrow, 1, False, Precision(2, 2)
    )
