"""fp16 for the parity cases: a loss scale that stays, so that no step is skipped."""


def fp16(stage: int) -> tuple[str, ...]:
    """Overrides that put a tiny recipe of this ZeRO stage (1 to 3) into fp16."""
    return (
        f"deepspeed.config=ds_configs/zero{stage}_fp16.json",
        "deepspeed.bf16=null",
        "deepspeed.fp16.loss_scale=1024",
    )
