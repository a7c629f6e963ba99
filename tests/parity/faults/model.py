"""Faults of the model: planted in the ranks' copy of `models/`, which the reference shares.

A fault in the files themselves would be in the reference too, and parity would not see it.
`tests/unit/test_gpt.py` compares them with transformers.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from tests.parity.cases import DOCUMENTS, EPS_KEY, Case
from tests.parity.faults.seeded import FEW_ROWS, LOSS_1, NORM_1, WEIGHTS, Seeded
from tests.parity.planting import plant

IN, OUT = "its input", "its output"
ATTENTION_OUT = r"blocks\.0\.attention\.out"


def _plant_attention(change: Any) -> None:
    """`change(query, key, value, settings)` returns the same four, for torch's attention."""
    import torch.nn.functional as F

    right: Any = F.scaled_dot_product_attention

    def wrong(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Any:
        query, key, value, settings = change(query, key, value, settings)
        return right(query, key, value, **settings)

    plant(F, "scaled_dot_product_attention", wrong)


def no_causal_mask() -> None:
    _plant_attention(lambda q, k, v, settings: (q, k, v, {**settings, "is_causal": False}))


def causal_mask_shifted() -> None:
    """Each token sees the one that it has to predict."""

    def shifted(query: Tensor, key: Tensor, value: Tensor, settings: Any) -> Any:
        size = query.shape[2]
        mask = torch.ones(size, size, dtype=torch.bool).tril(1)
        return query, key, value, {**settings, "is_causal": False, "attn_mask": mask}

    _plant_attention(shifted)


def scores_scaled_by_the_width_of_all_heads() -> None:
    def scaled(query: Tensor, key: Tensor, value: Tensor, settings: Any) -> Any:
        width = query.shape[1] * query.shape[3]
        return query, key, value, {**settings, "scale": width**-0.5}

    _plant_attention(scaled)


def key_heads_tiled() -> None:
    """Query heads 0 and 1 share a key head; repeated as a whole, the keys go to heads 0 and 2."""

    def tiled(query: Tensor, key: Tensor, value: Tensor, settings: Any) -> Any:
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat(1, times, 1, 1), value.repeat(1, times, 1, 1)
        return query, key, value, {**settings, "enable_gqa": False}

    _plant_attention(tiled)


def queries_rotated_one_position_further() -> None:
    """Not keys: if they went with them nothing would change, as only distances count."""
    from models import attention

    right = attention.rotate
    calls = iter(range(10**9))

    def wrong(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        shift = 1 if next(calls) % 2 == 0 else 0  # queries come first
        return right(x, (table[0].roll(-shift, -2), table[1].roll(-shift, -2)))

    plant(attention, "rotate", wrong)


def rotary_pairs_interleaved() -> None:
    """GPT-J's order of a head's elements in the place of Llama's."""
    from models import attention

    def wrong(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        half = x.shape[-1] // 2
        cos, sin = (each[..., :half] for each in table)
        even, odd = x[..., ::2], x[..., 1::2]
        pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
        return pairs.flatten(-2).to(x.dtype)

    plant(attention, "rotate", wrong)


def rotary_table_in_bf16() -> None:
    from models import attention

    right = attention.rotary_table

    def wrong(config: Any, positions: Tensor) -> Any:
        return tuple(each.bfloat16().float() for each in right(config, positions))

    plant(attention, "rotary_table", wrong)


def norms_of_queries_and_keys_skipped() -> None:
    from models.attention import Attention

    right = Attention.__init__

    def wrong(self: Attention, *arguments: Any) -> None:
        right(self, *arguments)
        self.qk_norm = False

    plant(Attention, "__init__", wrong)


def gate_and_up_swapped() -> None:
    import torch.nn.functional as F

    from models.gpt import MLP

    def wrong(self: MLP, x: Tensor) -> Tensor:
        up, gate = self.up(x).chunk(2, dim=-1)
        down: Tensor = self.down(F.silu(gate) * up)
        return down

    plant(MLP, "forward", wrong)


def epsilon_of_the_norms() -> None:
    """1e-6, which Llama has, in the place of GPT-2's 1e-5."""
    from models import gpt
    from models.norms import make_norm

    plant(
        gpt,
        "make_norm",
        lambda config, tp: make_norm(dataclasses.replace(config, norm_eps=1e-6), tp),
    )


def mlp_without_its_residual() -> None:
    from models.gpt import Block

    def wrong(self: Block, x: Tensor, inputs: Any) -> Tensor:
        x = x + self.attention(self.attention_norm(x), inputs)
        changed: Tensor = self.mlp(self.mlp_norm(x))
        return changed

    plant(Block, "forward", wrong)


def norm_after_the_residual() -> None:
    """The MLP gets what attention got, as in a parallel block."""
    from models.gpt import Block

    def wrong(self: Block, x: Tensor, inputs: Any) -> Tensor:
        attended = self.attention(self.attention_norm(x), inputs)
        changed: Tensor = x + attended + self.mlp(self.mlp_norm(x))
        return changed

    plant(Block, "forward", wrong)


def positions_count_from_one() -> None:
    from models.gpt import Position

    right = Position.forward

    def wrong(self: Position, x: Tensor, positions: Tensor | None) -> Tensor:
        counted = torch.arange(1, x.shape[1] + 1).expand(x.shape[:2]) % self.weight.shape[0]
        return right(self, x, counted)

    plant(Position, "forward", wrong)


def learned_positions_that_go_on_across_documents() -> None:
    from models.gpt import Position

    right = Position.forward
    plant(Position, "forward", lambda self, x, positions: right(self, x, None))


def documents_begin_a_token_late() -> None:
    from models import attention

    right = attention.document_mask
    plant(attention, "document_mask", lambda positions: right((positions - 1).clamp(min=-1)))


def labels_shifted_twice() -> None:
    """The loss shifts labels that the batch has shifted already."""
    from models import gpt

    right = vars(gpt)["vocab_parallel_cross_entropy"]

    def wrong(logits: Tensor, labels: Tensor, *arguments: Any) -> Any:
        return right(logits, labels.roll(-1, -1), *arguments)

    plant(gpt, "vocab_parallel_cross_entropy", wrong)


def loss_summed_in_bf16() -> None:
    from models import gpt

    right = vars(gpt)["vocab_parallel_cross_entropy"]

    def wrong(logits: Tensor, *arguments: Any) -> Any:
        return right(logits.bfloat16(), *arguments)

    plant(gpt, "vocab_parallel_cross_entropy", wrong)


def recomputed_without_the_document_mask() -> None:
    """Activation checkpointing: the backward pass is of another forward pass."""
    from torch.utils.checkpoint import checkpoint

    from models import gpt

    def wrong(block: Any, x: Tensor, inputs: Any, recompute: bool, on_cpu: bool) -> Tensor:
        passes = iter((inputs, *(inputs._replace(mask=inputs.mask.tril(-1)),) * 9))

        def run(given: Tensor) -> Any:
            return block(given, next(passes))

        out: Tensor = checkpoint(run, x, use_reentrant=False) if recompute else block(x, inputs)
        return out

    plant(gpt, "run_block", wrong)


def residual_weights_not_scaled_by_depth() -> None:
    from models import init_weights

    class OneLayer:
        def sqrt(self, x: float) -> float:
            return 1.0

    plant(init_weights, "math", OneLayer())


GPT2 = Case("zero1", 1, overrides=(FEW_ROWS,))
LLAMA = Case("zero1", 1, "fp32", "llama", overrides=(FEW_ROWS,))
ROWS_OF_DOCUMENTS = Case("zero2", 1, overrides=(FEW_ROWS, DOCUMENTS))


def _forward(fault: Any, case: Case, name: str, quantity: str) -> Seeded:
    return Seeded(fault, case, LOSS_1, "forward", name, quantity)


FAULTS = [
    _forward(no_causal_mask, GPT2, ATTENTION_OUT, IN),
    _forward(causal_mask_shifted, GPT2, ATTENTION_OUT, IN),
    _forward(scores_scaled_by_the_width_of_all_heads, GPT2, ATTENTION_OUT, IN),
    _forward(key_heads_tiled, LLAMA, ATTENTION_OUT, IN),
    _forward(queries_rotated_one_position_further, LLAMA, ATTENTION_OUT, IN),
    _forward(rotary_pairs_interleaved, LLAMA, ATTENTION_OUT, IN),
    # Seen by nothing but what Adam makes of tiny gradients, with its usual eps.
    Seeded(
        rotary_table_in_bf16, LLAMA, WEIGHTS, "forward", ATTENTION_OUT, IN, changes={EPS_KEY: 1e-8}
    ),
    _forward(
        norms_of_queries_and_keys_skipped,
        dataclasses.replace(LLAMA, overrides=(FEW_ROWS, "model.qk_norm=true")),
        ATTENTION_OUT,
        IN,
    ),
    _forward(gate_and_up_swapped, LLAMA, r"blocks\.0\.mlp\.down", IN),
    _forward(epsilon_of_the_norms, GPT2, r"blocks\.0\.attention_norm", OUT),
    _forward(mlp_without_its_residual, GPT2, r"blocks\.0", OUT),
    _forward(norm_after_the_residual, GPT2, r"blocks\.0\.mlp_norm", IN),
    _forward(positions_count_from_one, GPT2, r"embedding\.position", OUT),
    _forward(
        learned_positions_that_go_on_across_documents,
        ROWS_OF_DOCUMENTS,
        r"embedding\.position",
        OUT,
    ),
    _forward(documents_begin_a_token_late, ROWS_OF_DOCUMENTS, ATTENTION_OUT, IN),
    Seeded(labels_shifted_twice, GPT2, LOSS_1, "loss", "loss", "of a micro batch"),
    Seeded(loss_summed_in_bf16, GPT2, LOSS_1, "loss", "loss", "of the step"),
    Seeded(
        recomputed_without_the_document_mask,
        dataclasses.replace(ROWS_OF_DOCUMENTS, checkpoint_activations=True),
        NORM_1,
        "backward",
        r"blocks\.1\.mlp\.(up|down)",
        "gradient of its (in|out)put",
    ),
    Seeded(
        residual_weights_not_scaled_by_depth,
        GPT2,
        LOSS_1,
        "weights before",
        r"blocks\.0\.attention\.out\.weight",
    ),
]
