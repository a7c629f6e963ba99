"""Each rule of the linter: a config that triggers it, and one that does not."""

import copy
from collections import defaultdict
from typing import Any

import pytest

from launch.config.resolve import merge
from launch.ds_json import keys as ds_keys
from launch.ds_json.linter import lint
from launch.ds_json.strict_json import load_json
from launch.paths import ROOT

CLEAN: dict[str, Any] = load_json(ROOT / "ds_configs" / "zero2.json")
STAGE = {stage: {"zero_optimization": {"stage": stage}} for stage in range(4)}
CPU, NVME = {"device": "cpu"}, {"device": "nvme", "nvme_path": "/tmp/x"}


def config(changes: dict[str, Any], stem: str = "zero2") -> dict[str, Any]:
    return merge(load_json(ROOT / "ds_configs" / f"{stem}.json"), changes)


def zero(stage: int, **keys: Any) -> dict[str, Any]:
    """A complete config whose zero_optimization holds only `stage` and `keys`."""
    return {**copy.deepcopy(CLEAN), "zero_optimization": {"stage": stage, **keys}}


def params(**changes: Any) -> dict[str, Any]:
    return config({"optimizer": {"params": changes}})


LOW_STATES = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
MUON = {"type": "Muon", "params": {"lr": 0.02}}
# rule, key it is found at, a config that triggers it, one that does not
CASES: list[tuple[str, str, Any, Any]] = [
    ("not-an-object", "", [], CLEAN),
    ("unknown-key", "gradient_cliping", config({"gradient_cliping": 1.0}), CLEAN),
    ("unknown-key", "bf16.enable", config({"bf16": {"enable": True}}), CLEAN),
    ("unknown-key", "zero_optimization.offload_optimizer.devise",
     zero(2, offload_optimizer={"devise": "cpu"}), zero(2, overlap_comm=True)),
    ("unknown-key", "aio.block", config({"aio": {"block": 1}}, "zero3_offload_nvme"),
     config({}, "zero3_offload_nvme")),
    ("unknown-key", "timers.throughput.enable",
     config({"timers": {"throughput": {"enable": True}}}),
     config({"timers": {"throughput": {"enabled": True}}})),
    ("unknown-key", "optimizer.params.fused", params(torch_adam=None), params()),
    ("unknown-key", "optimizer.params.beta", params(beta=0.9), params(amsgrad=False)),
    ("unknown-key", "bf16._comment", config({"bf16": {"_comment": "why"}}),
     config({"_comment": "why", "//": "why", "aio": {"_comment": "why"}})),
    ("unknown-key", "optimizer.params.eps", config({"optimizer": {"type": "Lion"}}),
     {**CLEAN, "optimizer": {"type": "Lion", "params": {"lr": 1e-4}}}),
    ("unknown-key", "scheduler.params.warmup_num_step",
     config({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_step": 9}}}),
     config({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}})),
    ("no-effect", "optimizer.type", {**CLEAN, "optimizer": {"params": {}}}, CLEAN),
    ("no-effect", "scheduler.type", config({"scheduler": {"params": {}}}), CLEAN),
    ("forbidden", "zero_allow_untested_optimizer",
     {**CLEAN, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}, CLEAN),
    ("removed", "elasticity", config({"elasticity": {"enabled": False}}), CLEAN),
    ("removed", "zero_optimization.mics_shard_size", zero(3, mics_shard_size=2), zero(3)),
    ("removed", "optimizer.type", config({"optimizer": {"type": "OneBitAdam"}}), CLEAN),
    ("wrong-value", "zero_optimization.stage", zero(4), zero(3)),
    ("wrong-value", "zero_optimization.reduce_bucket_size",
     zero(2, reduce_bucket_size="big"), zero(2, reduce_bucket_size=5e8)),
    ("wrong-value", "zero_optimization.offload_optimizer.device",
     zero(2, offload_optimizer={"device": "gpu"}), zero(2, offload_optimizer=CPU)),
    ("old-form", "zero_optimization", config({"zero_optimization": None})
     | {"zero_optimization": True}, zero(1)),
    ("wrong-value", "bf16", config({"bf16": None}) | {"bf16": True}, CLEAN),
    ("unchecked-value", "gradient_clipping", config({"gradient_clipping": -1}),
     config({"gradient_clipping": 0})),
    ("unchecked-value", "train_micro_batch_size_per_gpu",
     config({"train_micro_batch_size_per_gpu": True}), CLEAN),
    ("wrong-value", "data_types.grad_accum_dtype",
     config({"data_types": {"grad_accum_dtype": "single"}}), CLEAN),
    ("wrong-value", "optimizer.type", config({"optimizer": {"type": "AdamX"}}),
     config({"optimizer": {"type": "SGD", "params": {"lr": 0.1}}})),
    ("wrong-value", "scheduler.type", config({"scheduler": {"type": "WarmupLr"}}),
     config({"scheduler": {"type": "WarmupLR"}})),
    ("wrong-value", "gradient_allreduce_op", config({"gradient_allreduce_op": "max"}),
     config({"gradient_allreduce_op": "sum"})),
    ("auto", "bf16.enabled", config({"bf16": {"enabled": "auto"}}),
     config({"data_types": {"keep_in_fp32_modules": "auto"}})),
    ("two-precisions", "fp16.enabled", config({"fp16": {"enabled": True}}),
     config({"fp16": {"enabled": False}})),
    ("two-precisions", "bfloat16", config({"bfloat16": {"enabled": True}}), CLEAN),
    ("two-precisions", "torch_autocast.enabled",
     config({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}), config({}, "zero0")),
    ("two-precisions", "data_types.param_dtype",
     config({"data_types": {"param_dtype": "fp16"}}),
     config({"data_types": {"param_dtype": "bf16"}})),
    ("stage0-accumulation", "data_types.grad_accum_dtype", zero(0), zero(1)),
    ("stage0-low-precision", "bf16.enabled", zero(0), config({}, "zero0")),
    ("stage0-fp16-scale", "fp16.enabled",
     config({"zero_optimization": {"stage": 0}}, "zero1_fp16"), config({}, "zero1_fp16")),
    ("muon-fp16-scale", "optimizer.type", {**config({}, "zero1_fp16"), "optimizer": MUON},
     {**zero(1), "optimizer": MUON}),
    ("forbidden", "bf16.bf16_master_weights_and_grads",
     {**zero(0), "bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
     config({}, "zero2_bf16_states")),
    ("forbidden", "bf16.bf16_master_weights_and_grads",
     config({"bf16": {"bf16_master_weights_and_grads": True}}),
     config({"bf16": {"bf16_master_weights_and_grads": True}}, "zero2_offload_cpu")),
    ("forbidden", "bf16.bf16_master_weights_and_grads",
     config({"zero_optimization": {"offload_optimizer": CPU}}, "zero2_bf16_states"),
     config({"bf16": LOW_STATES}, "zero2_offload_cpu")),
    ("no-effect", "bf16.bf16_master_weights_and_grads",
     config({"zero_optimization": {"stage": 1}}, "zero2_bf16_states"),
     config({"zero_optimization": {"stage": 1}, "data_types": None}, "zero2_bf16_states")),
    ("unchecked-value", "bf16.bf16_master_weights_and_grads",
     config({"bf16": {"enabled": False}}, "zero2_bf16_states"), config({}, "zero2_bf16_states")),
    ("forbidden", "bf16.bf16_optimizer_states", config({"bf16": {"bf16_optimizer_states": True}}),
     config({"bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}})),
    ("implied-clipping", "gradient_clipping", config({"gradient_clipping": None}), CLEAN),
    ("forbidden", "zero_optimization.compute_grad_norm", zero(2, compute_grad_norm=False),
     {**zero(2, compute_grad_norm=False), "gradient_clipping": 0.0}),
    ("forbidden", "zero_optimization.compute_grad_norm",
     {**zero(1, compute_grad_norm=False), "gradient_clipping": 0.0},
     {**zero(1, compute_grad_norm=True), "gradient_clipping": 0.0}),
    ("batch-size", "train_micro_batch_size_per_gpu",
     config({"train_micro_batch_size_per_gpu": None}), CLEAN),
    ("batch-size", "train_batch_size",
     config({"train_batch_size": 7, "train_micro_batch_size_per_gpu": 2}),
     config({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2,
             "gradient_accumulation_steps": None})),
    ("batch-size", "train_batch_size", config({"train_batch_size": 8}), CLEAN),
    ("forbidden", "optimizer.params.max_grad_norm", params(max_grad_norm=1.0), CLEAN),
    ("forbidden", "zero_optimization.reduce_scatter", {**zero(3), "optimizer": MUON},
     {**zero(3, reduce_scatter=False), "optimizer": MUON}),
    ("adam-is-adamw", "optimizer.type", config({"optimizer": {
        "type": "Adam", "params": {"adam_w_mode": None}}}), config({"optimizer": {"type": "Adam"}})),
    ("no-effect", "optimizer.params.adam_w_mode", params(adam_w_mode=False), CLEAN),
    ("implied-optimizer", "optimizer.params", params(weight_decay=None), CLEAN),
    ("offload-torch-adam", "optimizer.params.torch_adam", zero(2, offload_optimizer=CPU),
     config({}, "zero2_offload_cpu")),
    ("forbidden", "gradient_allreduce_op", {**zero(3), "gradient_allreduce_op": "sum"},
     {**zero(2), "gradient_allreduce_op": "sum"}),
    ("no-effect", "zero_optimization.overlap_comm", zero(0, overlap_comm=True),
     zero(2, overlap_comm=True)),
    ("no-effect", "zero_optimization.overlap_comm", zero(1, overlap_comm=True),
     {**zero(1, overlap_comm=True), "data_types": {"grad_accum_dtype": "bf16"}}),
    ("no-effect", "zero_optimization.stage3_prefetch_bucket_size",
     zero(2, stage3_prefetch_bucket_size=1), zero(3, stage3_prefetch_bucket_size=1)),
    ("no-effect", "zero_optimization.sub_group_size", zero(2, sub_group_size=1000),
     zero(3, sub_group_size=1000)),
    ("no-effect", "zero_optimization.round_robin_gradients", zero(3, round_robin_gradients=True),
     zero(2, round_robin_gradients=True)),
    ("no-effect", "zero_optimization.allgather_partitions", zero(2, allgather_partitions=True),
     zero(2, allgather_bucket_size=1000)),
    ("no-effect", "zero_optimization.offload_param", zero(2, offload_param=CPU),
     zero(3, offload_param=CPU)),
    ("no-effect", "zero_optimization.offload_optimizer", zero(0, offload_optimizer=CPU),
     zero(1, offload_optimizer=CPU)),
    ("nvme-becomes-cpu", "zero_optimization.offload_optimizer.device",
     zero(1, offload_optimizer=NVME), zero(3, offload_optimizer=NVME)),
    ("no-effect", "zero_optimization.offload_optimizer.super_offload",
     zero(2, offload_optimizer={**CPU, "super_offload": True}),
     zero(3, offload_optimizer={**CPU, "super_offload": True})),
    ("forbidden", "zero_optimization.offload_param.nvme_path",
     zero(3, offload_param={"device": "nvme"}), zero(3, offload_param=NVME)),
    ("no-effect", "aio", config({"aio": {"block_size": 1}}), config({}, "zero3_offload_nvme")),
    ("deprecated", "zero_optimization.cpu_offload", zero(2, cpu_offload=True),
     zero(2, offload_optimizer=CPU)),
    ("no-effect", "activation_checkpointing",
     config({"activation_checkpointing": {"partition_activations": True}}), CLEAN),
    ("no-effect", "pipeline", config({"pipeline": {"use_reentrant": False}}),
     {**zero(1), "pipeline": {"use_reentrant": False}}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "key", "bad", "good"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES]
)
def test_rule_fires_where_it_should_and_nowhere_else(
    rule: str, key: str, bad: Any, good: Any
) -> None:
    assert (rule, key) in {(f.rule, f.key) for f in lint(bad)}
    assert (rule, key) not in {(f.rule, f.key) for f in lint(good)}


HF_CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("auto", "steps_per_print", {"steps_per_print": "auto"}, {"gradient_clipping": "auto"}),
    ("hf-auto", "zero_optimization.stage", {"zero_optimization": {"stage": "auto"}}, {}),
    ("hf-scheduler", "scheduler", {"scheduler": {"type": "WarmupLR", "params": {}}}, {}),
    ("hf-literal", "scheduler.params.warmup_num_steps",
     {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}},
     {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}}),
    ("hf-missing", "zero_optimization", {"zero_optimization": None}, {}),
    ("hf-literal", "gradient_clipping", {}, {"gradient_clipping": "auto"}),
    ("hf-literal", "optimizer.params.lr", {}, {"optimizer": None}),
    ("hf-optimizer", "optimizer.params.betas", {"optimizer": {"params": {"betas": "auto"}}}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "key", "bad", "good"), HF_CASES)
def test_rules_for_hugging_face(
    rule: str, key: str, bad: dict[str, Any], good: dict[str, Any]
) -> None:
    assert (rule, key) in {(f.rule, f.key) for f in lint(config(bad), hf=True)}
    assert (rule, key) not in {(f.rule, f.key) for f in lint(config(good), hf=True)}
    assert not [f for f in lint(config(bad)) if f.rule.startswith("hf-")]


@pytest.mark.parametrize(
    ("keys", "ranks", "fits"),
    [
        ((8, 2, 2), 2, True), ((8, 2, 2), 4, False), ((8, 2, None), 4, True),
        ((8, 3, None), 2, False), ((8, None, None), 8, True), ((8, None, None), 3, False),
        ((None, 2, 3), 5, True),
    ],
)  # fmt: skip
def test_batch_arithmetic_agrees_with_deepspeed(
    keys: tuple[int | None, ...], ranks: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed import comm
    from deepspeed.runtime.config import DeepSpeedConfig

    names = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
    changed = config(dict(zip(names, keys, strict=True)))
    found = [f for f in lint(changed, world_size=ranks) if f.rule == "batch-size"]
    assert (not found) == fits
    monkeypatch.setattr(comm, "get_rank", lambda: 0)
    monkeypatch.setattr(comm, "get_world_size", lambda: ranks)
    if fits:
        DeepSpeedConfig(changed)
    else:
        with pytest.raises(AssertionError):
            DeepSpeedConfig(changed)


def test_a_misspelt_key_names_the_nearest_and_a_misplaced_one_its_home() -> None:
    assert "'gradient_clipping'" in lint(config({"gradient_cliping": 1.0}))[0].message
    assert "'offload_optimizer'" in lint(zero(2, offload_optimiser=CPU))[0].message
    misplaced = lint(config({"overlap_comm": True}))[0]
    assert "belongs in zero_optimization" in misplaced.message


class Recorder(dict[str, Any]):
    """A config that writes down which keys it is asked for, block by block."""

    def __init__(self, asked: dict[str, set[str]], path: str, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.asked, self.path = asked, path

    def get(self, key: str, default: Any = None) -> Any:
        self.asked[self.path].add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked[self.path].add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked[self.path].add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> "Recorder":
        return self


def test_the_key_lists_are_what_deepspeed_asks_for() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    asked: dict[str, set[str]] = defaultdict(set)
    recorded = Recorder(asked, "", {"train_batch_size": 1})
    for name, below in ds_keys.PLAIN_BLOCKS.items():
        if below is not None:
            block = Recorder(asked, name, {})
            for child, grandchildren in below.items():
                if grandchildren:
                    dict.__setitem__(block, child, Recorder(asked, f"{name}.{child}", {}))
            dict.__setitem__(recorded, name, block)
    DeepSpeedConfig(recorded)
    removed = {key for key in ds_keys.removed() if "." not in key}
    # Read elsewhere: deepspeed.initialize and the Ulysses path.
    elsewhere = {"sequence_parallel_size", "data_parallel_size"}
    assert asked[""] - removed - {"timers"} | elsewhere | {"timers"} == set(ds_keys.tree())
    for name in ("activation_checkpointing", "aio", "autotuning", "checkpoint", "checkpoint.writer",
                 "data_types", "flops_profiler", "torch_autocast", "data_efficiency"):  # fmt: skip
        listed = ds_keys.PLAIN_BLOCKS
        for part in name.split("."):
            listed = listed[part]
        assert asked[name] == set(listed), name


def test_pipeline_keys_are_those_of_deepspeed() -> None:
    from deepspeed.runtime.config import get_pipeline_config

    # use_reentrant is read by the pipeline engine alone.
    assert {*get_pipeline_config({}), "use_reentrant"} == set(ds_keys.PLAIN_BLOCKS["pipeline"])
