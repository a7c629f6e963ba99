"""What DeepSpeed refuses is an error of the linter; what it takes is none, but for named traps."""

import copy
from typing import Any

import pytest
from hypothesis import given, settings

from launch.ds_json.finding import Finding
from launch.ds_json.linter import lint
from tests.ds_configs.deepspeed_truth import refused
from tests.ds_configs.mutations import KNOWN, PLAUSIBLE, SEEDS, mutated, set_at

RANKS = 2
ANY = "*"
# Rule and key of errors about what DeepSpeed takes, and why they are errors all the same.
STRICTER: dict[tuple[str, str], str] = {
    ("unknown-key", ANY): "ignored without a word, where no model of DeepSpeed's forbids it",
    ("auto", ANY): "dropped in blocks that have a model, so that bf16.enabled trains in fp32",
    ("unchecked-value", ANY): 'read by truth or used later: "false" is true',
    ("no-effect", ANY): "the setting does nothing",
    ("old-form", "zero_optimization"): "stage 1 to DeepSpeed; Hugging Face and we read no stage",
    ("nvme-becomes-cpu", ANY): "the states are not where the config says",
    ("two-precisions", "bfloat16"): "ignored beside bf16",
    **{
        ("wrong-value", key): "refused alone; infinity beside infinity is taken"
        for key in ("train_batch_size", "train_micro_batch_size_per_gpu")
    },
    # Refused too, but by what the engine makes after the optimizer.
    ("forbidden", "zero_optimization.reduce_scatter"): "by Muon at ZeRO stage 3",
    ("forbidden", "zero_optimization.offload_param.nvme_path"): "by the swapper",
    ("forbidden", "zero_optimization.offload_optimizer.nvme_path"): "by the swapper",
    ("forbidden", "zero_optimization.compute_grad_norm"): "by the optimizer's wrapper",
    ("forbidden", "bf16.bf16_master_weights_and_grads"): "by the optimizer's wrapper",
    ("forbidden", "fp16.fp16_master_weights_and_grads"): "by the optimizer's wrapper",
    ("stage0-accumulation", "data_types.grad_accum_dtype"): "where the script brings an optimizer",
}


def too_strict(finding: Finding) -> bool:
    named = {(finding.rule, ANY), (finding.rule, finding.key)}
    return finding.level == "error" and not named & STRICTER.keys()


def disagreement(config: dict[str, Any]) -> str:
    """What the linter says otherwise than DeepSpeed; empty if they agree."""
    findings = lint(config, world_size=RANKS)
    reason = refused(config, RANKS)
    if reason:
        return "" if any(f.level == "error" for f in findings) else f"passes: {reason}"
    return "; ".join(finding.line() for finding in findings if too_strict(finding))


MICRO: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1}
STAGE_2 = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


def optimizer(kind: str, more: dict[str, Any] | None = None, **params: Any) -> dict[str, Any]:
    return {**MICRO, **(more or {}), "optimizer": {"type": kind, "params": params}}


def schedule(kind: str, **params: Any) -> dict[str, Any]:
    return {**MICRO, "scheduler": {"type": kind, "params": params}}


# What DeepSpeed refuses, and the key of the error.
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("communication_data_type", {**MICRO, "communication_data_type": "float16"}),
    ("seq_parallel_communication_data_type",
     {**MICRO, "seq_parallel_communication_data_type": "half"}),
    ("wall_clock_breakdown", {**MICRO, "wall_clock_breakdown": None}),
    ("vocabulary_size", {**MICRO, "vocabulary_size": "50k"}),
    ("torch_autocast.dtype", {**MICRO, "torch_autocast": {"enabled": True, "dtype": "half-float"}}),
    ("torch_autocast.lower_precision_safe_modules",
     {**MICRO, "torch_autocast": {"lower_precision_safe_modules": [1]}}),
    ("checkpoint.tag_validation", {**MICRO, "checkpoint": {"tag_validation": "Panic"}}),
    ("checkpoint.tag_validation", {**MICRO, "checkpoint": {"tag_validation": None}}),
    ("checkpoint.parallel_write.pipeline_stage",
     {**MICRO, "checkpoint": {"parallel_write": {"pipeline_stage": "yes"}}}),
    ("checkpoint.writer", {**MICRO, "checkpoint": {"writer": "fast"}}),
    ("checkpoint.writer.type", {**MICRO, "checkpoint": {"writer": {"type": "quick"}}}),
    ("checkpoint.writer.data_parallel", {**MICRO, "checkpoint": {"writer": {"data_parallel": "all"}}}),
    ("flops_profiler.enabled", {**MICRO, "flops_profiler": {"enabled": "yes"}}),
    ("flops_profiler", {**MICRO, "flops_profiler": True}),
    ("timers", {**MICRO, "timers": None}),
    ("timers.throughput", {**MICRO, "timers": {"throughput": True}}),
    ("timers.throughput.synchronized", {**MICRO, "timers": {"throughput": {"synchronized": 5}}}),
    ("data_efficiency", {**MICRO, "data_efficiency": {
        "data_sampling": {"curriculum_learning": {"enabled": True}}}}),
    ("autotuning.results_dir", {**MICRO, "autotuning": {"results_dir": ""}}),
    ("compile", {**MICRO, "compile": None}),
    ("data_types", {**MICRO, "data_types": "bf16"}),
    ("data_types.buffer_dtype", {**MICRO, "data_types": {"buffer_dtype": "single"}}),
    ("data_types.keep_in_fp32_modules", {**MICRO, "data_types": {"keep_in_fp32_modules": "norm"}}),
    ("data_types.grad_accum_dtype",
     {**optimizer("AdamW"), "data_types": {"grad_accum_dtype": "bf16"}}),
    ("zero_optimization.stage", {**MICRO, "zero_optimization": {"stage": None}}),
    ("zero_optimization.leaf_module", {**MICRO, "zero_optimization": {"leaf_module": ["Block"]}}),
    ("zero_optimization.reduce_bucket_size",
     {**MICRO, "zero_optimization": {"reduce_bucket_size": float("inf")}}),
    ("", {**MICRO, "gradient_allreduce_op": "sum", "compile": {"deepcompile": True}}),
    ("zero_optimization.overlap_comm", {**MICRO, "managed_gradient_accumulation": False,
                                        "zero_optimization": {"stage": 1, "overlap_comm": True}}),
    ("compile.deepcompile", {**MICRO, "managed_gradient_accumulation": False,
                             "compile": {"deepcompile": True}}),
    ("optimizer", {**MICRO, "optimizer": None}),
    ("optimizer.type", optimizer("sgd", lr=0.1)),
    ("optimizer.type", optimizer("lr_scheduler")),
    ("optimizer.params.eps", optimizer("Lion", lr=1e-4, eps=1e-8)),
    ("optimizer.params.eps", optimizer("Lion", OFFLOAD, lr=1e-4, eps=1e-8)),
    ("optimizer.params.set_grad_none",
     optimizer("Lion", {"zero_optimization": {"stage": 2, "cpu_offload": True}}, set_grad_none=True)),
    ("optimizer.params.momentum", optimizer("Lamb", momentum=0.9)),
    ("optimizer.params.betas", optimizer("Adagrad", betas=[0.9, 0.95])),
    ("optimizer.params.lr_decay", optimizer("Adagrad", OFFLOAD, lr_decay=0.1)),
    ("optimizer.params.ns_method", optimizer("Muon", ns_method="newton")),
    ("optimizer.params.amsgrad", optimizer("AdamW", amsgrad=True)),
    ("optimizer.params", optimizer("SGD", lr=-1)),
    ("optimizer.params", optimizer("AdamW", torch_adam=True, betas=[0.9, 1.5])),
    ("optimizer.params", optimizer("SGD", lr=0.1, nesterov=True)),
    ("optimizer.params", {**MICRO, "optimizer": {"type": "AdamW", "params": []}}),
    ("zero_allow_untested_optimizer", optimizer("SGD", {"zero_optimization": {"stage": 1}}, lr=0.1)),
    ("fp16.loss_scale", optimizer("Lamb", {"fp16": {"enabled": True, "loss_scale": 128}})),
    ("scheduler.type", schedule("cosine")),
    ("scheduler.type", schedule("math")),
    ("scheduler.params", {**MICRO, "scheduler": {"type": "WarmupLR"}}),
    ("scheduler.params", schedule("WarmupDecayLR", warmup_num_steps=10)),
    ("scheduler.params", schedule("WarmupLR", warmup_num_steps=0)),
    ("scheduler.params", schedule("WarmupLR", warmup_num_steps=10.0)),
    ("scheduler.params", schedule("OneCycle", cycle_min_lr=0)),
    ("scheduler.params", schedule("StepLR", gamma=0.5)),
    ("scheduler.params.warmup_num_step", schedule("WarmupLR", warmup_num_step=10)),
    ("scheduler.params.T_maximum", schedule("CosineAnnealingLR", T_max=10, T_maximum=10)),
    ("train_batch_size", {"train_batch_size": 8.5, "train_micro_batch_size_per_gpu": 2}),
    ("train_batch_size", {"train_batch_size": "8"}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "config"), REFUSED)
def test_what_deepspeed_refuses_is_an_error_at_its_key(key: str, config: dict[str, Any]) -> None:
    assert refused(config, RANKS)
    errors = [finding for finding in lint(config, world_size=RANKS) if finding.level == "error"]
    assert key in {finding.key for finding in errors}
    assert all("Traceback" not in finding.message for finding in errors)


TAKEN: list[dict[str, Any]] = [
    {**MICRO, "_comment": "why", "//": "why", "_gradient_clipping": "auto"},
    {**MICRO, "aio": {"_comment": "why", "block_size": 1048576}},
    {"train_batch_size": 8.0, "train_micro_batch_size_per_gpu": 2},
    {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2.0, "gradient_accumulation_steps": 2},
    {"train_batch_size": 8, "gradient_accumulation_steps": None},
    {**MICRO, "communication_data_type": "BF16", "gradient_allreduce_op": "Mean"},
    {**MICRO, "communication_data_type": None, "steps_per_print": None, "bf16": None, "aio": None},
    {**MICRO, "checkpoint": {"tag_validation": "fail", "writer": {"type": "fast"}}},
    {**MICRO, "checkpoint": {"tag_validation": "IGNORE", "writer": None}},
    {**MICRO, "torch_autocast": {"enabled": True, "dtype": "torch.bfloat16"}},
    {**MICRO, "data_types": {"grad_accum_dtype": "torch.float32", "keep_in_fp32_modules": "auto"}},
    {**MICRO, "bf16": {"enabled": "true"}, "fp16": {"enabled": "off"}},
    {**MICRO, "zero_optimization": {"stage": "3", "reduce_bucket_size": 5e8, "leaf_module": None}},
    {**MICRO, "zero_optimization": {"stage": 3, "offload_optimizer": None}},
    {**MICRO, "scheduler": {"type": None}, "optimizer": {"type": "AdamW", "params": None}}
    | {"scheduler": {"type": "WarmupLR", "params": {}}},
    {**MICRO, "datastates_ckpt": {"host_cache_size": 16}, "steps_per_print": float("inf")},
    {**optimizer("SGD", STAGE_2, lr=0.1, momentum=0.9, nesterov=True)},
    {**optimizer("Lion", OFFLOAD, lr=1e-4, betas=[0.9, 0.99], fp32_optimizer_states=False)},
    {**optimizer("Lamb", lr=1e-3, bias_correction=False, max_coeff=0.3)},
    {**optimizer("Muon", lr=0.02, adam_lr=3e-4, momentum=0.95, ns_method="standard")},
    {**optimizer("Adagrad", lr=0.01, lr_decay=0.1)},
    {**optimizer("Adam", adam_w_mode=False, torch_adam=True, amsgrad=True, fused=True)},
    {**optimizer("RAdam", lr=1e-3)},
    schedule("WarmupCosineLR", total_num_steps=100, warmup_num_steps=10),
    schedule("OneCycle", cycle_min_lr=0.0, cycle_max_lr=1e-3, cycle_first_step_size=10),
    schedule("LRRangeTest", lr_range_test_step_size=5),
    schedule("WarmupLR", warmup_max_lr=[1e-3, 1e-4], warmup_type="linear"),
    schedule("CosineAnnealingLR", T_max=10),
    schedule("MultiStepLR", milestones=[3, 6], gamma=0.5),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(TAKEN)))
def test_what_deepspeed_takes_is_no_error(number: int) -> None:
    config = TAKEN[number]
    assert not refused(config, RANKS)
    assert [f.line() for f in lint(config, world_size=RANKS) if f.level == "error"] == []


# What has no placeholders for Hugging Face, and so reaches DeepSpeed's own checks.
COMPLETE = [
    *(seed for seed in SEEDS if seed.get("train_batch_size") != "auto"),
    *TAKEN,
    *(config for _, config in REFUSED),
]


@given(mutated(COMPLETE))
@settings(max_examples=100, derandomize=True, deadline=None)
def test_they_agree_on_changed_configs(config: dict[str, Any]) -> None:
    assert disagreement(config) == ""


@pytest.mark.matrix
@given(mutated(COMPLETE))
@settings(max_examples=5000, derandomize=True, deadline=None)
def test_they_agree_on_many_changed_configs(config: dict[str, Any]) -> None:
    assert disagreement(config) == ""


@pytest.mark.matrix
@pytest.mark.parametrize("base", [MICRO, optimizer("AdamW", STAGE_2), optimizer("Lion", OFFLOAD)])
def test_they_agree_on_every_key(base: dict[str, Any]) -> None:
    for path in KNOWN:
        for value in PLAUSIBLE:
            config = copy.deepcopy(base)
            set_at(config, path, copy.deepcopy(value))
            assert disagreement(config) == "", (path, value)


def test_a_disagreement_in_either_direction_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Finding] = []
    monkeypatch.setattr(f"{__name__}.lint", lambda config, world_size: said)
    _, wrong = REFUSED[0]
    assert disagreement(wrong).startswith("passes: ValueError: Invalid communication_data_type")
    said.append(Finding("bf16", "warning", "two-precisions", ""))
    assert disagreement(wrong) and not disagreement(TAKEN[0])
    said.append(Finding("bf16", "error", "two-precisions", ""))
    assert not disagreement(wrong) and "bf16" in disagreement(TAKEN[0])
    assert {"refused", "removed"}.isdisjoint(rule for rule, _ in STRICTER)
