"""JSONs in the style of well-known repositories: what the linter says, and how the command ends."""

import re

import pytest

from launch.ds_json.linter import lint
from launch.ds_json.strict_json import load_json
from launch.paths import ROOT
from tests.ds_configs.test_check_config import check

FOLDER = ROOT / "tests" / "ds_configs" / "published"
# Rules of the errors and of the warnings: for raw DeepSpeed, and with --hf.
Rules = tuple[set[str], set[str]]
EXPECTED: dict[str, tuple[Rules, Rules]] = {
    "axolotl_zero3_bf16": (({"auto"}, set()), (set(), set())),
    "dolly_z3_bf16": (
        ({"auto", "unknown-key"}, set()),
        ({"auto", "unknown-key"}, {"hf-optimizer", "hf-scheduler"}),
    ),
    "examples_bert_lamb": (
        ({"removed"}, {"stage0-low-precision", "stage0-fp16-scale"}),
        ({"removed", "hf-missing"}, {"hf-literal", "stage0-low-precision", "stage0-fp16-scale"}),
    ),
    "examples_cifar": (
        (set(), {"adam-is-adamw", "deprecated", "no-effect", "stage0-low-precision", "stage0-fp16-scale"}),
        (set(), {"adam-is-adamw", "deprecated", "no-effect", "stage0-low-precision",
                 "stage0-fp16-scale", "hf-literal", "hf-scheduler"}),
    ),
    "fastchat_z3_mixed": (
        ({"auto"}, set()),
        ({"auto"}, {"hf-auto", "hf-literal", "hf-scheduler"}),
    ),
    "internvl_zero1": (({"auto"}, {"no-effect"}), (set(), {"hf-literal", "no-effect"})),
    "llama_factory_z2": (({"auto"}, set()), (set(), set())),
    "llava_zero3_offload": (({"auto"}, set()), (set(), {"hf-optimizer", "hf-scheduler"})),
    "megatron_gpt_z1": (({"removed"}, set()), ({"removed"}, {"hf-literal"})),
    "much_wrong": (
        ({"unchecked-value", "unknown-key", "wrong-value"}, {"batch-size", "deprecated"}),
        ({"unchecked-value", "unknown-key", "wrong-value"},
         {"batch-size", "deprecated", "hf-literal"}),
    ),
    "qwen_finetune_zero2": (
        ({"auto"}, {"no-effect"}),
        (set(), {"hf-optimizer", "hf-scheduler", "no-effect"}),
    ),
}  # fmt: skip


def rules(name: str, hf: bool) -> Rules:
    findings = lint(load_json(FOLDER / f"{name}.json"), hf=hf)
    errors = {finding.rule for finding in findings if finding.level == "error"}
    return errors, {finding.rule for finding in findings if finding.level == "warning"}


def test_every_file_has_its_line() -> None:
    assert {file.stem for file in FOLDER.glob("*.json")} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_what_the_linter_says(name: str) -> None:
    raw, with_hf = EXPECTED[name]
    assert rules(name, hf=False) == raw
    assert rules(name, hf=True) == with_hf


def test_all_of_much_wrong_is_reported_at_once() -> None:
    """One wrong value hides no other."""
    keys = {finding.key for finding in lint(load_json(FOLDER / "much_wrong.json"))}
    assert keys >= {
        "gradient_clipping", "zero_optimization.stage", "zero_optimization.leaf_module",
        "data_types", "communication_data_type", "torch_autocast.dtype",
        "checkpoint.tag_validation", "checkpoint.writer", "flops_profiler.enabled",
        "timers.throughput", "optimizer.params.eps", "zero_optimization.cpu_offload",
    }  # fmt: skip


@pytest.mark.parametrize("hf", [False, True])
def test_the_command_prints_a_line_for_each_finding(hf: bool) -> None:
    done = check(FOLDER, *(["--hf"] if hf else []))
    *lines, summary = done.stdout.splitlines()
    for line in lines:
        assert re.fullmatch(r"\S+\.json: (error|warning): \S+: .+ \[[a-z0-9-]+\]", line), line
    errors = sum(": error: " in line for line in lines)
    assert summary == f"{len(EXPECTED)} files, {errors} errors, {len(lines) - errors} warnings"
    assert done.returncode == 1 and "Traceback" not in done.stderr


def test_files_for_hugging_face_pass_with_hf() -> None:
    clean = [FOLDER / f"{name}.json" for name, (_, (errors, _)) in EXPECTED.items() if not errors]
    assert check(*clean, "--hf").returncode == 0
    assert check(*clean, "--hf", "--strict").returncode == 1
