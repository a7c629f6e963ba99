"""The three commands: what they write and say, and one line for a mistake."""

from pathlib import Path

import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from launch.paths import ROOT
from tests.cli.commands import Ended, run_forked
from tests.hf.peers import PEERS, logits, saved_peer
from tests.hf.runs import finished_run


def command(name: str, *words: str | Path) -> Ended:
    return run_forked([ROOT / "scripts" / f"{name}.py", *words])


def test_a_model_goes_round(tmp_path: Path) -> None:
    theirs = saved_peer(PEERS["mistral"], tmp_path / "theirs")
    imported, out = tmp_path / "imported", tmp_path / "out"
    done = command("import_hf", tmp_path / "theirs", imported)
    assert done.code == 0, done.output
    assert f"{imported}/model.yaml: the model block of a recipe" in done.output
    model = yaml.safe_load((imported / "model.yaml").read_text())["model"]
    run = finished_run(tmp_path / "runs" / "1", model, imported)
    done = command("export_hf", run.parent, out, "--family", "mistral", "--dtype", "fp32")
    assert done.code == 0, done.output
    assert logits(AutoModelForCausalLM.from_pretrained(out)).equal(logits(theirs))
    done = command("consolidate", run, tmp_path / "one.safetensors", "--dtype", "bf16")
    assert done.code == 0, done.output
    with safe_open(tmp_path / "one.safetensors", "pt") as one:
        assert one.get_slice("blocks.1.attention.qkv.weight").get_dtype() == "BF16"

    for done in (
        command("import_hf", tmp_path / "theirs", imported),
        command("export_hf", run, out),
        command("consolidate", tmp_path, tmp_path / "two.safetensors"),
    ):
        assert done.code == 2
        assert done.output.splitlines()[-1].startswith("error: "), done.output
        assert "Traceback" not in done.output
