"""What the linter's rules lock_run_dir, seen in real DeepSpeed runs."""

import copy
from typing import Any

import pytest

from launch.config.resolve import merge
from launch.ds_json.linter import lint
from launch.ds_json.strict_json import load_json
from launch.paths import ROOT
from tests.ds_configs.test_linter import CPU, config, params, zero
from tests.ds_configs.training import train_raw, train_with_accelerate
from tests.ranks import run_ranks


def test_omitted_clipping_is_one() -> None:
    result = run_ranks(train_raw, 1, config({"gradient_clipping": None}), 1)[0]
    assert result["clipping"] == 1.0


def test_nested_auto_trains_in_fp32() -> None:
    changed = config({"bf16": {"enabled": "auto"}})
    assert run_ranks(train_raw, 1, changed, 1)[0]["dtype"] == "torch.float32"


def test_stage_0_in_bf16_really_is_a_step_ahead() -> None:
    plain = config({"bf16": {"enabled": True}, "torch_autocast": None, "data_types": None}, "zero0")
    other = config({"data_types": None}, "zero1")
    lag = run_ranks(train_raw, 1, plain)[0]
    right = run_ranks(train_raw, 1, other)[0]
    autocast = run_ranks(train_raw, 1, config({}, "zero0"))[0]
    assert lag["optimizer"] == "FP16_UnfusedOptimizer"
    drop = [r["losses"][0] - r["losses"][1] for r in (lag, right, autocast)]
    # Bias corrected as if it were the second, the first update is 0.1 / 0.19 / sqrt(0.05 / 0.0975)
    # = 0.73 of what it should be.
    assert drop[0] < 0.9 * drop[1]
    assert drop[2] == pytest.approx(drop[1], rel=0.05)


def test_stage_0_in_bf16_refuses_fp32_accumulation() -> None:
    with pytest.raises(NotImplementedError, match="unsupported mix"):
        run_ranks(train_raw, 1, zero(0), 1)


@pytest.mark.parametrize(
    "changes", [{"max_grad_norm": 1.0}, {"torch_adam": None, "fused": True}, {"beta": 0.9}]
)
def test_what_the_optimizer_refuses_is_an_error(changes: dict[str, Any]) -> None:
    changed = params(**changes)
    if "torch_adam" in changes:
        # The CPU's Adam, since FusedAdam would first be compiled.
        changed = merge(config({}, "zero2_offload_cpu"), {"optimizer": {"params": {"fused": True}}})
    assert any(finding.level == "error" for finding in lint(changed))
    with pytest.raises((TypeError, ValueError)):
        run_ranks(train_raw, 1, changed, 1)


def test_nothing_is_trained_otherwise_by_keys_without_effect() -> None:
    plain = run_ranks(train_raw, 1, zero(2))[0]
    ignored = run_ranks(train_raw, 1, zero(2, offload_param=CPU, sub_group_size=10))[0]
    assert ignored["losses"] == plain["losses"]


def test_zero1_in_bf16_with_fp32_accumulation_is_another_class() -> None:
    assert run_ranks(train_raw, 1, zero(1), 1)[0]["optimizer"] == "BF16_Optimizer"
    bf16 = {**zero(1), "data_types": {"grad_accum_dtype": "bf16"}}
    assert run_ranks(train_raw, 1, bf16, 1)[0]["optimizer"] == "DeepSpeedZeroOptimizer"


def test_zero1_in_bf16_with_fp32_accumulation_keeps_fp32_states() -> None:
    """The keys of bf16 states change no number there, and at stage 2 they do."""
    low = config({}, "zero2_bf16_states")["bf16"]
    losses = {
        stage: [run_ranks(train_raw, 1, {**zero(stage), "bf16": block})[0]["losses"]
                for block in ({"enabled": True}, low)]
        for stage in (1, 2)
    }  # fmt: skip
    assert losses[1][0] == losses[1][1]
    assert losses[2][0] != losses[2][1]


def test_bf16_states_go_with_weights_in_fp32_too() -> None:
    bf16 = {**config({}, "zero2_bf16_states")["bf16"], "enabled": False}
    plain = run_ranks(train_raw, 1, config({"bf16": {"enabled": False}}))[0]
    rounded = run_ranks(train_raw, 1, config({"bf16": bf16}))[0]
    assert plain["dtype"] == rounded["dtype"] == "torch.float32"
    assert plain["losses"][0] == rounded["losses"][0] and plain["losses"] != rounded["losses"]


def test_batch_sizes_may_be_whole_floats() -> None:
    sizes = {"train_batch_size": 8.0, "train_micro_batch_size_per_gpu": 4.0}
    changed = config({**sizes, "gradient_accumulation_steps": None})
    assert not [finding for finding in lint(changed, world_size=1) if finding.level == "error"]
    plain = config({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4}) | {
        "gradient_accumulation_steps": 2
    }
    done = [run_ranks(train_raw, 1, each)[0]["losses"] for each in (changed, plain)]
    assert done[0] == done[1] and done[0][-1] < done[0][0]


def test_auto_of_accelerate_s_plugin_is_its_default() -> None:
    from accelerate import DeepSpeedPlugin

    zero: dict[str, Any] = {"stage": "auto", "stage3_gather_16bit_weights_on_model_save": "auto"}
    zero["offload_param"] = zero["offload_optimizer"] = {"device": "auto", "nvme_path": "auto"}
    auto = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    found = [finding for finding in lint(auto, hf=True) if finding.rule == "hf-auto"]
    filled = DeepSpeedPlugin(hf_ds_config=copy.deepcopy(auto)).deepspeed_config
    assert len(found) == 6
    for finding in found:
        value: Any = filled
        for name in finding.key.split("."):
            value = value[name]
        assert f"without them it is {str(value).lower()}," in finding.message


def test_accelerate_stops_at_auto_betas() -> None:
    auto = load_json(ROOT / "ds_configs" / "hf" / "zero1.json")
    auto["optimizer"] = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}}
    with pytest.raises(ValueError, match=r"optimizer\.params\.betas"):
        run_ranks(train_with_accelerate, 1, auto, "bf16")
