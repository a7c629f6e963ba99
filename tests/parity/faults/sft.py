"""Faults of fine-tuning: which labels count, what attention sees, and how adapters are trained.

`tests/parity/test_sft.py` plants some of them against training by hand as well, which shares neither data
nor loss with the layouts.
"""

import os
from typing import Any

from tests.parity.faults.seeded import LOSS_1, NORM_1, Seeded
from tests.parity.planting import plant
from tests.parity.sft_cases import SFTCase


def questions_count_too() -> None:
    from launch.data.conversations import ConversationFile
    from launch.data.token_file import ANSWER

    right = ConversationFile.read_flagged
    plant(ConversationFile, "read_flagged", lambda self, index: right(self, index) | ANSWER)


def attention_across_conversations() -> None:
    """Positions do not start again."""
    from launch.data.batch import Batch

    right = Batch.micro_batches

    def wrong(self: Any) -> Any:
        for batch in right(self):
            yield batch._replace(positions=None)

    plant(Batch, "micro_batches", wrong)


def one_adapter_not_reduced() -> None:
    """What rank 1 adds to the gradient of one matrix is lost; it is averaged all the same."""
    from launch.training import lora

    right = lora.add_adapters

    def wrong(model: Any, *arguments: Any) -> None:
        right(model, *arguments)
        matrix = model.model.layers[1].self_attn.v_proj.lora_B.default.weight
        if os.environ["RANK"] == "1":
            matrix.register_hook(lambda gradient: 0.0 * gradient)

    plant(lora, "add_adapters", wrong)


def adapters_not_scaled() -> None:
    """By alpha over rank. As B is zero at first, the first loss is right."""
    from launch.training import lora

    right = lora.add_adapters

    def wrong(model: Any, *arguments: Any) -> None:
        right(model, *arguments)
        for layer in lora.adapted_layers(model).values():
            layer.scaling[lora.ADAPTER] = 1.0

    plant(lora, "add_adapters", wrong)


def base_weights_trained_too() -> None:
    from launch.training import lora

    right = lora.add_adapters

    def wrong(model: Any, *arguments: Any) -> None:
        right(model, *arguments)
        model.requires_grad_(True)

    plant(lora, "add_adapters", wrong)


GPT = SFTCase("zero2", 2)
LORA = SFTCase("zero2", 2, model="lora")
BOTH = (0, 1)
FAULTS = [
    Seeded(questions_count_too, GPT, LOSS_1, "batch", "loss weights", ranks=BOTH),
    Seeded(attention_across_conversations, GPT, LOSS_1, "batch", "positions", ranks=BOTH),
    Seeded(
        one_adapter_not_reduced, LORA, NORM_1, "parameter gradients",
        r"model\.layers\.1\.self_attn\.v_proj\.lora_B\.default\.weight", ranks=BOTH,
        more=((SFTCase("zero3", 2, model="lora"), NORM_1),),
    ),
    Seeded(
        adapters_not_scaled, LORA, NORM_1, "backward",
        r"model\.layers\.1\.mlp\.down_proj\.lora_B\.default", "gradient of its output", ranks=BOTH,
    ),
    Seeded(base_weights_trained_too, LORA, NORM_1, "grad norm", "grad norm", ranks=BOTH),
]  # fmt: skip
