"""Jobs for clusters: the files are valid, and their commands start one process per GPU with a config we accept."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import parse_args

from qlora_train.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes" / "cluster"
LLAMA_70B = "configs/llama70b.yaml"


def check_torchrun(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Assert that torchrun and the command line accept the words; return torchrun's arguments."""
    assert words[0] == "torchrun"
    arguments = parse_args(words[1:])
    assert arguments.no_python
    assert arguments.training_script == "qlora-train"
    monkeypatch.chdir(ROOT)
    assert main(["check", *arguments.training_script_args]) == 0
    return arguments


@pytest.fixture
def job() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the service and the job of the Kubernetes recipe."""
    service, job = yaml.safe_load_all((RECIPES / "kubernetes.yaml").read_text(encoding="utf-8"))
    return service, job


def test_kubernetes_pods_find_pod_0_by_name(job: Any) -> None:
    service, job = job
    assert (service["kind"], service["spec"]["clusterIP"]) == ("Service", "None")
    assert service["spec"]["publishNotReadyAddresses"], "pods meet before they are ready"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    address = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert f"--master-addr={address}" in container["command"]


def test_kubernetes_job_starts_one_process_per_gpu(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = job[1]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    values = {"CONFIG": LLAMA_70B, "NODE_RANK": "1"}
    assert values.keys() <= {variable["name"] for variable in container["env"]}
    command = [re.sub(r"\$\((\w+)\)", lambda name: values[name[1]], word) for word in container["command"]]
    arguments = check_torchrun(command, monkeypatch)
    assert spec["completionMode"] == "Indexed", "the index is the node rank"
    assert int(arguments.nnodes) == spec["completions"] == spec["parallelism"]
    assert int(arguments.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert int(arguments.node_rank) == 1


def test_kubernetes_mounts_what_it_claims(job: Any) -> None:
    pod = job[1]["spec"]["template"]["spec"]
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert pod["restartPolicy"] == "Never", "podFailurePolicy needs it"


def test_skypilot_task_starts_one_process_per_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = yaml.safe_load((RECIPES / "skypilot.yaml").read_text(encoding="utf-8"))
    torchrun = tmp_path / "torchrun"
    torchrun.write_text('#!/bin/sh\nprintf "%s\\n" torchrun "$@"\n', encoding="utf-8")
    torchrun.chmod(0o755)
    of_sky = {
        "SKYPILOT_NUM_NODES": str(task["num_nodes"]), "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }  # fmt: skip
    words = subprocess.check_output(["bash", "-euc", task["run"]], text=True, env=task["envs"] | of_sky).split("\n")
    arguments = check_torchrun(words[:-1], monkeypatch)
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", 1)
    assert arguments.master_addr == "10.0.0.1"
    assert task["resources"]["accelerators"].endswith(":8")
    (volume,) = task["volumes"]
    assert f"run.output_dir={volume}/llama70b" in arguments.training_script_args


def test_scripts_have_no_syntax_errors() -> None:
    script = RECIPES / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)
