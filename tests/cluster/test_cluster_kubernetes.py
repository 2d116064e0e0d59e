"""The Kubernetes manifest: what it starts, and what it does with the exit codes."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from dpo_keras.app.console import STOPPED, WRONG_INPUT
from dpo_keras.cluster import Watchdog, read_tf_config
from dpo_keras.errors import InputError

MANIFEST = Path(__file__).parents[2] / "scripts" / "kubernetes" / "train.yaml"


@pytest.fixture(scope="module")
def manifest():
    documents = list(yaml.safe_load_all(MANIFEST.read_text()))
    return {document["kind"]: document for document in documents}


@pytest.fixture(scope="module")
def container(manifest):
    (container,) = manifest["Job"]["spec"]["template"]["spec"]["containers"]
    return container


@pytest.mark.skipif(shutil.which("bash") is None, reason="the container's command is bash")
@pytest.mark.parametrize("index", [0, 1])
def test_each_pod_gets_its_place_in_the_cluster(manifest, container, index, tmp_path):
    told = tmp_path / "dpo-keras"
    told.write_text('#!/bin/sh\nprintf "%s\\n" "$TF_CONFIG" "$@"\n')
    told.chmod(0o755)
    variables = {entry["name"]: entry.get("value", "") for entry in container["env"]}
    done = subprocess.run(
        [*container["command"], *container["args"]],
        env={
            **variables,
            "JOB_COMPLETION_INDEX": str(index),
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    text, *arguments = done.stdout.splitlines()
    cluster = read_tf_config(text)
    job, service = manifest["Job"], manifest["Service"]
    port = service["spec"]["ports"][0]["port"]
    # https://kubernetes.io/docs/concepts/workloads/controllers/job/#completion-mode
    names = [f"{job['metadata']['name']}-{n}" for n in range(job["spec"]["completions"])]
    subdomain = job["spec"]["template"]["spec"]["subdomain"]
    assert [task.address for task in cluster.in_step] == [f"{n}.{subdomain}:{port}" for n in names]
    assert cluster.this.index == index and json.loads(text)["task"]["type"] == "worker"
    assert arguments[:2] == ["train", variables["CONFIG"]] and "--resume" in arguments


def test_the_service_names_the_pods_of_the_job(manifest, container):
    job, service = manifest["Job"]["spec"], manifest["Service"]
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["metadata"]["name"] == job["template"]["spec"]["subdomain"]
    assert service["spec"]["selector"].items() <= job["template"]["metadata"]["labels"].items()
    assert container["ports"][0]["containerPort"] == service["spec"]["ports"][0]["port"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in job["template"]["spec"]["volumes"]}


def test_exit_codes_mean_in_the_manifest_what_they_mean_here(manifest):
    job = manifest["Job"]["spec"]
    rules = {
        code: rule["action"]
        for rule in job["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert rules == {WRONG_INPUT: "FailJob", STOPPED: "Ignore"}
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 60


def test_the_pods_share_a_secret_that_has_to_be_filled_in(manifest, container, monkeypatch):
    (source,) = (
        e["valueFrom"] for e in container["env"] if e["name"] == "DPO_KERAS_CLUSTER_SECRET"
    )
    reference, secret = source["secretKeyRef"], manifest["Secret"]
    assert reference["name"] == secret["metadata"]["name"]
    monkeypatch.setenv("DPO_KERAS_CLUSTER_SECRET", secret["stringData"][reference["key"]])
    two = {"cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2"]}}
    cluster = read_tf_config(json.dumps({**two, "task": {"type": "worker", "index": 1}}))
    with pytest.raises(InputError, match="DPO_KERAS_CLUSTER_SECRET must have at least 32"):
        Watchdog(cluster).meet(timeout=1.0)


def test_only_the_pods_of_the_job_reach_one_another(manifest):
    pods = manifest["Job"]["spec"]["template"]["metadata"]["labels"]
    policy = manifest["NetworkPolicy"]["spec"]
    (ingress,) = policy["ingress"]
    assert policy["podSelector"]["matchLabels"] == pods and "Ingress" in policy["policyTypes"]
    assert ingress == {"from": [{"podSelector": {"matchLabels": pods}}]}


def test_the_container_has_no_rights_that_training_does_not_need(manifest, container):
    pod = manifest["Job"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    rights = container["securityContext"]
    assert rights["allowPrivilegeEscalation"] is False and rights["readOnlyRootFilesystem"]
    assert rights["capabilities"] == {"drop": ["ALL"]}
    writable = {mount["mountPath"] for mount in container["volumeMounts"]}
    (home,) = (entry["value"] for entry in container["env"] if entry["name"] == "HOME")
    assert {home, "/training"} <= writable
