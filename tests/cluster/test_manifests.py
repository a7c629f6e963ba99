"""What Kubernetes, Kubeflow and SkyPilot would get: schema-checked, not run."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from launch.cluster.backend import MODULES, backend_of
from launch.cluster.backends.containers import NAME_LENGTH, name_of
from launch.cluster.backends.slurm import check_save_fits
from launch.cluster.job import Job, make_job, write_files
from launch.cluster.job_store import Record
from launch.cluster.site import Kubernetes, Site, SkyPilot, Slurm, load_site
from launch.config.load import load_recipe
from launch.errors import UserError
from launch.paths import ROOT
from tests.cluster.jobs import AWKWARD

KUBERNETES_VERSION = "1.31"
RECIPE = "recipes/gpt_tiny_zero2.yaml"
# The fields of SkyPilot's task file, from its reference (docs.skypilot.co, reference/yaml-spec).
SKY_FIELDS = {
    "": {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "volumes", "file_mounts",
         "setup", "run", "config"},
    "resources": {"infra", "accelerators", "cpus", "memory", "instance_type", "use_spot",
                  "disk_size", "disk_tier", "network_tier", "image_id", "ports", "labels",
                  "autostop", "any_of", "ordered", "job_recovery"},
    "mount": {"source", "name", "store", "mode", "persistent"},
}  # fmt: skip
SITE = Site(
    environment={"NOTE": AWKWARD + " $(HOME)"},
    kubernetes=Kubernetes(
        image="registry.example/train:1", claim="runs", node_selector={"gpu": "h100"}
    ),
    skypilot=SkyPilot(accelerators="H100", infra="aws", image="docker:x", bucket="s3://runs"),
)


def job_for(cluster: str, site: Site = SITE) -> Job:
    prompt = "run.sample_prompt='" + AWKWARD.replace("'", "''").replace("${", "\\${") + " $(HOME)'"
    return make_job(cluster, RECIPE, [prompt], 2, 1, site, shared_disk=False)


def documents(cluster: str) -> list[dict[str, Any]]:
    (text,) = backend_of(cluster).files(job_for(cluster)).values()
    return list(yaml.safe_load_all(text))


def as_the_pod_sees(text: str) -> str:
    """Kubernetes' rule for $(NAME) in variables and commands: $$ is a $, and an unknown name stays."""
    return text.replace("$$(", "$(")


def check_kubernetes(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)


def check_trainjob(document: dict[str, Any]) -> None:
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob  # a second, in each worker

    # The models ignore what they do not know; it is missing when they are asked back.
    found = TrainerV1alpha1TrainJob.from_dict(document)
    assert found is not None
    assert found.to_dict() == document


def check_sky(document: dict[str, Any]) -> None:
    assert set(document) <= SKY_FIELDS[""]
    assert set(document["resources"]) <= SKY_FIELDS["resources"]
    for mount in document["file_mounts"].values():
        assert isinstance(mount, str) or set(mount) <= SKY_FIELDS["mount"]
    assert all(isinstance(value, str) for value in document["envs"].values())


def test_kubernetes_manifests_have_kubernetes_schema() -> None:
    found = documents("k8s")
    assert [document["kind"] for document in found] == ["ConfigMap", "Service", "Job"]
    for document in found:
        check_kubernetes(document)
    found[2]["spec"]["template"]["spec"]["containers"][0]["imagee"] = "typing error"
    with pytest.raises(kubernetes_validate.ValidationError):
        check_kubernetes(found[2])


def test_the_trainjob_has_kubeflow_schema() -> None:
    (found,) = documents("kubeflow")
    check_trainjob(found)
    found["spec"]["trainer"]["numNode"] = 2
    with pytest.raises(AssertionError):
        check_trainjob(found)


def test_the_sky_task_has_known_fields() -> None:
    (found,) = documents("skypilot")
    check_sky(found)
    found["resources"]["acelerators"] = "H100:8"
    with pytest.raises(AssertionError):
        check_sky(found)


def scripts_and_environments(cluster: str) -> tuple[str, dict[str, str], str]:
    """The shell script, the variables and the recipe that a container gets."""
    found = documents(cluster)
    if cluster == "skypilot":
        envs = dict(found[0]["envs"])
        return found[0]["run"], envs, envs["RECIPE_YAML"]
    if cluster == "kubeflow":
        trainer = found[0]["spec"]["trainer"]
        variables = {e["name"]: as_the_pod_sees(e["value"]) for e in trainer["env"]}
        return as_the_pod_sees(trainer["command"][2]), variables, variables["RECIPE_YAML"]
    pod = found[2]["spec"]["template"]["spec"]["containers"][0]
    variables = {e["name"]: as_the_pod_sees(e["value"]) for e in pod["env"] if "value" in e}
    return as_the_pod_sees(pod["command"][2]), variables, found[0]["data"]["gpt_tiny_zero2.yaml"]


@pytest.mark.parametrize("cluster", ["k8s", "kubeflow", "skypilot"])
def test_what_a_container_gets_is_unharmed_and_starts_the_launcher(
    cluster: str, tmp_path: Path
) -> None:
    script, variables, recipe = scripts_and_environments(cluster)
    assert variables["NOTE"] == AWKWARD + " $(HOME)"
    file = tmp_path / "gpt_tiny_zero2.yaml"
    file.write_text(recipe)
    assert load_recipe(file).run.sample_prompt == AWKWARD + " $(HOME)"

    # Run the script itself, with a python that only tells how it was called.
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin/python"
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/called\n')
    fake.chmod(0o755)
    (tmp_path / "workspace").mkdir()
    text = script.replace("/workspace", f"{tmp_path}/workspace").replace(
        "/runs/", f"{tmp_path}/runs/"
    )
    text = text.replace("/tmp/job", f"{tmp_path}/job")
    names = {
        "k8s": {"NODE_RANK": "1", "MASTER_ADDR": "first"},
        "kubeflow": {"PET_NODE_RANK": "1", "PET_MASTER_ADDR": "first"},
        "skypilot": {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "first\nsecond"},
    }[cluster]
    done = subprocess.run(
        ["bash", "-c", text], capture_output=True, text=True, check=False, timeout=600,
        env={**names, "RECIPE_YAML": recipe, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 75, "saved and stopped is not finished" + done.stderr
    called = (tmp_path / "called").read_text().splitlines()
    assert called[:3] == ["-u", "-m", "deepspeed.launcher.launch"]
    assert "--node_rank=1" in called
    assert "--master_addr=first" in called
    assert "launch/train.py" in called
    if cluster != "k8s":  # there the ConfigMap is mounted
        assert Path(called[called.index("--config") + 1]).read_text().strip() == recipe.strip()


def test_names_are_what_kubernetes_takes() -> None:
    job = job_for("k8s")
    name = name_of(job)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= NAME_LENGTH


@pytest.mark.parametrize(
    ("cluster", "key"),
    [("k8s", "kubernetes.image"), ("kubeflow", "kubernetes.image"),
     ("skypilot", "skypilot.accelerators")],
)  # fmt: skip
def test_what_nobody_can_guess_is_asked_for(cluster: str, key: str) -> None:
    with pytest.raises(UserError, match=f"{key}: not given"):
        backend_of(cluster).files(job_for(cluster, Site()))


def test_without_the_cluster_s_command_a_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for cluster, words in (
        ("k8s", "no kubectl"),
        ("kubeflow", "no kubectl"),
        ("skypilot", "no sky"),
    ):
        with pytest.raises(UserError, match=words):
            backend_of(cluster).check(job_for(cluster))


STAND_IN = """#!/bin/sh
echo "$(basename "$0") $@" >>{folder}/calls
case "$*" in *--output*) cat {folder}/answer ;; queue*) cat {folder}/answer ;; esac
"""


@pytest.mark.parametrize("cluster", ["k8s", "kubeflow", "skypilot"])
def test_the_commands_that_a_job_s_life_takes(
    cluster: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A stand-in for kubectl and sky, which records how it was called and gives planted answers."""
    for program in ("kubectl", "sky"):
        file = tmp_path / program
        file.write_text(STAND_IN.format(folder=tmp_path))
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    made = job_for(cluster)
    job = Job(**{**vars(made), "folder": tmp_path / "job"})
    backend = backend_of(cluster)
    backend.check(job)
    write_files(job, backend.files(job))
    name, details = backend.submit(job)
    record = Record(name, cluster, "x", 1, str(job.run), str(job.folder), details)
    kubernetes: dict[str, dict[str, Any]] = {
        "completed": {"conditions": [{"type": "Complete", "status": "True"}]},
        "failed": {"conditions": [{"type": "Failed", "status": "True", "message": "BackoffLimit"}]},
        "running": {"active": 2, "ready": 1},
        "pending": {},
    }
    sky = {"completed": "SUCCEEDED", "failed": "FAILED", "running": "RUNNING", "pending": "PENDING"}
    for kind in kubernetes:
        row = f"ID NAME SUBMITTED STATUS LOG\n1 {name} 1 min ago {sky[kind]} ~/sky_logs"
        status: dict[str, Any] = kubernetes[kind]
        if cluster == "kubeflow" and kind == "running":
            status = {"jobsStatus": [{"name": "node", **status}]}
        answer = row if cluster == "skypilot" else json.dumps({"status": status})
        (tmp_path / "answer").write_text(answer)
        assert backend.state(record).kind == kind
    backend.cancel(record)
    calls = (tmp_path / "calls").read_text()
    started, ended = {
        "k8s": ("kubectl apply --filename", "kubectl delete --filename"),
        "kubeflow": ("kubectl apply --filename", "kubectl delete --filename"),
        "skypilot": ("sky launch --yes --detach-run", f"sky down --yes {name}"),
    }[cluster]
    assert started in calls
    assert ended in calls


def test_the_example_site_explains_every_key() -> None:
    file = ROOT / "launch/cluster/site.example.yaml"
    site, values = load_site(file), yaml.safe_load(file.read_text())
    assert set(values) == set(Site.model_fields)
    for block in ("slurm", "hosts", "kubernetes", "skypilot"):
        assert set(values[block]) == set(type(getattr(site, block)).model_fields)


def test_the_image_holds_what_a_job_needs() -> None:
    lines = (ROOT / "launch/cluster/Dockerfile").read_text().splitlines()
    copied = [line.split()[1] for line in lines if line.startswith("COPY ")]
    assert all((ROOT / source).exists() for source in copied)
    assert {"launch", "models", "recipes", "ds_configs", "scripts", "requirements.txt"} <= set(
        copied
    )
    assert any("--requirement requirements.txt" in line for line in lines)
    assert "WORKDIR /workspace" in lines


def test_every_cluster_has_a_page() -> None:
    pages = {"k8s": "kubernetes", "kubeflow": "kubernetes"}
    for cluster in MODULES:
        page = ROOT / f"launch/cluster/backends/{pages.get(cluster, cluster)}.md"
        assert page.is_file()
        if cluster in ("k8s", "kubeflow", "skypilot"):
            assert "chema-checked, not run" in page.read_text()


def test_a_job_whose_save_takes_longer_than_its_warning_is_rejected() -> None:
    slow, fast = (
        Site(slurm=Slurm(time="1:00:00", save_seconds=30, save_mb_per_second=speed))
        for speed in (100, 5000)
    )
    big = make_job(
        "slurm", "recipes/llama3_70b_pp4_tp8_zero1.yaml", [], 8, 8, slow,
        shared_disk=False,
    )  # fmt: skip
    # 70.55 billion parameters of 12 bytes: 105.8 GB for each of 8 nodes, 1,059 s at 100 MB/s.
    with pytest.raises(UserError, match=r"106 GB .* in 1059 s at 100 MB/s .* set at least 1119"):
        check_save_fits(big)
    check_save_fits(job_for("slurm", slow))
    check_save_fits(
        make_job(
            "slurm", "recipes/llama3_70b_pp4_tp8_zero1.yaml", [], 8, 8, fast, shared_disk=False
        )
    )
