"""Every JSON below ds_configs/ works as it is: raw DeepSpeed, or the real Trainer and Accelerator."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark import ParameterSet

from launch.ds_json.linter import lint
from launch.ds_json.strict_json import load_json
from launch.paths import ROOT
from tests.ds_configs.training import train_raw, train_with_accelerate, train_with_trainer
from tests.ranks import run_ranks
from tests.selection import representatives

FOLDER = ROOT / "ds_configs"
# Found, not listed: a new file cannot be forgotten.
HF = sorted(FOLDER.glob("**/hf/**/*.json"))
SMALL_BUFFERS = 1_000_000
COMPLETE = sorted(set(FOLDER.glob("**/*.json")) - set(HF))


def name(path: Path) -> str:
    return str(path.relative_to(FOLDER))


def read(path: Path, tmp_path: Path, buffers: int | None = None) -> dict[str, Any]:
    """The file's own config; only the swap folder is one of this test's.

    `buffers`: elements of a buffer for swapped weights, where the file's own take 3 GB of memory.
    """
    config = load_json(path)
    if buffers and "buffer_size" in config["zero_optimization"].get("offload_param", {}):
        config["zero_optimization"]["offload_param"]["buffer_size"] = buffers
    for key in ("offload_param", "offload_optimizer"):
        block = config["zero_optimization"].get(key, {})
        if "nvme_path" in block:
            block["nvme_path"] = str(tmp_path / "nvme")
    return config


def in_turn(first: int) -> list[ParameterSet]:
    """All twins; in `make test` Trainer and Accelerator take turns, so that each twin trains."""
    return representatives(HF, lambda path: {path} & set(HF[first::2]))


def precision(path: Path) -> str:
    """What a user of an hf/ file must ask Trainer for, by what its twin trains in."""
    twin = load_json(FOLDER / path.name)
    enabled = [p for p in ("bf16", "fp16") if twin.get(p, {}).get("enabled")]
    return enabled[0] if enabled else "no"


def test_there_are_the_promised_files() -> None:
    stems = {path.stem for path in COMPLETE}
    assert stems >= {
        "zero0", "zero1", "zero2", "zero3",
        "zero2_offload_cpu", "zero3_offload_cpu", "zero3_offload_nvme",
    }  # fmt: skip


@pytest.mark.parametrize("path", COMPLETE + HF, ids=name)
def test_is_strict_json_without_findings(path: Path) -> None:
    config = load_json(path)
    assert lint(config, hf=path in HF, world_size=2) == []


@pytest.mark.parametrize("path", COMPLETE, ids=name)
def test_says_what_deepspeed_would_imply(path: Path) -> None:
    config = load_json(path)
    params = config["optimizer"]["params"]
    assert {"lr", "betas", "eps", "weight_decay", "adam_w_mode"} <= params.keys()
    assert {"train_micro_batch_size_per_gpu", "gradient_clipping"} <= config.keys()
    assert "scheduler" not in config
    if config["zero_optimization"]["stage"] == 3:
        assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


def test_all_files_describe_the_same_update() -> None:
    """Switching offload on, or the stage, must not change the training."""
    described = []
    for path in COMPLETE:
        config = load_json(path)
        params = config["optimizer"]["params"]
        update = {k: v for k, v in params.items() if k not in ("torch_adam", "fused")}
        described.append((config["optimizer"]["type"], update, config["gradient_clipping"]))
    assert all(item == described[0] for item in described)


@pytest.mark.usefixtures("built_ops")
@pytest.mark.parametrize("path", COMPLETE, ids=name)
def test_trains_under_raw_deepspeed(path: Path, tmp_path: Path) -> None:
    config = read(path, tmp_path)
    results = run_ranks(train_raw, 2, config)
    losses = [sum(pair) / 2 for pair in zip(*(r["losses"] for r in results), strict=True)]
    assert losses[-1] < losses[0] - 0.05, losses
    assert results[0]["weights"] == results[1]["weights"]
    assert results[0]["clipping"] == config["gradient_clipping"]
    offloaded = "offload_optimizer" in config["zero_optimization"]
    assert results[0]["adam"] == ("DeepSpeedCPUAdam" if offloaded else "AdamW")
    expected = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}
    enabled = [p for p in expected if config.get(p, {}).get("enabled")]
    assert results[0]["dtype"] == (expected[enabled[0]] if enabled else "torch.float32")


@pytest.mark.usefixtures("built_ops")
def test_all_stages_and_offloads_train_alike_in_fp32(tmp_path: Path) -> None:
    stems = ["zero0_fp32", "zero1", "zero3", "zero2_offload_cpu", "zero3_offload_nvme"]
    losses = {}
    for stem in stems:
        config = read(FOLDER / f"{stem}.json", tmp_path, SMALL_BUFFERS)
        config["bf16"] = {"enabled": False}
        losses[stem] = run_ranks(train_raw, 1, config)[0]["losses"]
    for stem in stems:
        assert losses[stem] == pytest.approx(losses["zero0_fp32"], rel=1e-5), stem


@pytest.mark.usefixtures("built_ops")
@pytest.mark.parametrize("path", in_turn(0), ids=name)
def test_trains_under_the_real_trainer(path: Path, tmp_path: Path) -> None:
    config, wanted = read(path, tmp_path, SMALL_BUFFERS), precision(path)
    result = run_ranks(train_with_trainer, 1, config, str(tmp_path), wanted)[0]
    assert result["losses"][-1] < result["losses"][0]
    # What Trainer's arguments say is what the engine does: nothing of the JSON stood in the way.
    assert result["clipping"] == 0.5 and result["accumulation"] == 2
    assert result["betas"] == [0.9, 0.95] and result["weight_decay"] == 0.2
    check_engine(result, config, wanted)


@pytest.mark.usefixtures("built_ops")
@pytest.mark.parametrize("path", in_turn(1), ids=name)
def test_trains_under_the_real_accelerator(path: Path, tmp_path: Path) -> None:
    config, wanted = read(path, tmp_path, SMALL_BUFFERS), precision(path)
    result = run_ranks(train_with_accelerate, 1, config, wanted)[0]
    assert result["losses"][-1] < result["losses"][0]
    assert result["betas"] == [0.9, 0.95] and result["weight_decay"] == 0.2
    check_engine(result, config, wanted)


def check_engine(result: dict[str, Any], config: dict[str, Any], wanted: str) -> None:
    dtypes = {"bf16": "torch.bfloat16", "fp16": "torch.float16", "no": "torch.float32"}
    assert result["dtype"] == dtypes[wanted]
    assert result["stage"] == config["zero_optimization"]["stage"]
    offloaded = "offload_optimizer" in config["zero_optimization"]
    assert result["adam"] == ("DeepSpeedCPUAdam" if offloaded else "AdamW")


def make_hf(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "scripts" / "make_hf_configs.py"
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_hf_twins_are_up_to_date() -> None:
    done = make_hf("--check")
    assert done.returncode == 0, done.stdout


def test_drift_is_found_and_mended(tmp_path: Path) -> None:
    folder = tmp_path / "ds_configs"
    shutil.copytree(FOLDER, folder)
    here = ("--folder", str(folder))
    changed = folder / "hf" / "zero1.json"
    changed.write_text(json.dumps({**load_json(changed), "gradient_clipping": 1.0}))
    (folder / "hf" / "left_over.json").write_text("{}")
    (folder / "hf" / "zero2.json").unlink()
    done = make_hf("--check", *here)
    assert done.returncode == 1
    for file in ("zero1.json", "left_over.json", "zero2.json"):
        assert file in done.stdout
    assert make_hf(*here).returncode == 0
    assert make_hf("--check", *here).returncode == 0
    assert not (folder / "hf" / "left_over.json").exists()
