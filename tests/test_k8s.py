"""Kubernetes: the manifests in k8s/, what the lint finds when they are broken, overlays, the entry point, the Dockerfile."""

import contextlib
import itertools
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jsonpatch
import pytest
import yaml
from click.testing import CliRunner

from disttrain.cli.main import cli
from disttrain.errors import ConfigError
from disttrain.launcher.kubernetes import KINDS
from disttrain.launcher.kubernetes.lint import lint, lint_text
from disttrain.launcher.kubernetes.render import Options, command_line, render

K8S = Path(__file__).parents[1] / "k8s"
MANIFESTS = {path.name: path for folder in (K8S, K8S / "base") for path in folder.glob("*.yaml")}
MANIFESTS.pop("kustomization.yaml")
LONG = "x" * 60


def _run(*words):
    return CliRunner().invoke(cli, ["k8s", *words])


# The manifests ----------------------------------------------------------------------------------------------------------


def test_the_manifests_are_what_render_writes():
    kinds = set()
    for path in MANIFESTS.values():
        text = path.read_text()
        words = shlex.split(text.splitlines()[0].removeprefix("# "))
        assert words[:3] == ["disttrain", "k8s", "render"]
        assert _run(*words[2:]).output == text, path
        kinds.add(words[words.index("--kind") + 1])
    assert kinds == set(KINDS)


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_manifests_pass_the_lint(name):
    assert lint(MANIFESTS[name]) == []


def test_what_render_writes_passes_the_lint_whatever_is_asked_for():
    places = [(None, None, False), ("training", "team", False), ("training", None, True)]
    for kind, gpus, (queue, namespace, volcano) in itertools.product(KINDS, (0, 1, 8), places):
        if (gpus == 8 and kind in ("indexed-job", "jobset")) or (volcano and kind not in ("mpijob", "trainjob")):
            continue
        env, command = (
            ("NCCL_DEBUG=INFO", "MINE=a: b"),
            ("python", "train.py", "--lr", "1e-3", "it's", "8", "no", "-1", "a#b"),
        )
        options = {
            "gpus": gpus,
            "queue": queue,
            "volcano": volcano,
            "namespace": namespace,
            "env": env,
            "command": command,
        }
        text = render(Options(kind, workers=3, **options))
        assert lint_text(text) == []
        documents = list(yaml.safe_load_all(text))
        assert {document["metadata"].get("namespace") for document in documents} == {namespace}
        if kind != "pvc":
            assert "/opt/disttrain/bin/python" in text
            assert list(command[1:]) == _strings(documents)[_strings(documents).index("train.py") :][: len(command) - 1]
            assert "a: b" in _strings(documents)
            assert ("training" in _strings(documents)) == (queue == "training")


def test_a_variable_of_any_name_reaches_the_ranks():
    text = render(Options("mpijob", env=("NCCL_DEBUG=INFO", "TOKEN=1")))
    launcher = yaml.safe_load(text)["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0]
    assert launcher["args"][4:6] == ["-x", "TOKEN"]
    assert {"name": "TOKEN", "value": "1"} in launcher["env"]


def test_hosts_are_in_the_order_of_ranks():
    service, job = yaml.safe_load_all(render(Options("indexed-job", name="a", workers=3)))
    (hosts,) = job["spec"]["template"]["spec"]["containers"][0]["env"]
    assert hosts == {"name": "DISTTRAIN_HOSTS", "value": "a-0.a:2222,a-1.a:2222,a-2.a:2222"}
    assert service["metadata"]["name"] == job["spec"]["template"]["spec"]["subdomain"] == "a"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "mpijob", "name": "Digits"}, "--name 'Digits'"),
        ({"kind": "mpijob", "name": "8bit"}, "a letter first"),
        ({"kind": "mpijob", "name": "x" * 55}, "a host name takes 63"),
        ({"kind": "jobset", "name": "x" * 52}, "a host name takes 63"),
        ({"kind": "pvc", "namespace": "a" * 64}, "64 characters"),
        ({"kind": "pvc", "claim": "a_b"}, "--claim 'a_b'"),
        ({"kind": "mpijob", "queue": "Q"}, "--queue 'Q'"),
        ({"kind": "mpijob", "workers": 0}, "--workers 0: at least 1"),
        ({"kind": "mpijob", "gpus": -1}, "--gpus -1"),
        ({"kind": "mpijob", "restarts": -1}, "--restarts -1"),
        ({"kind": "mpijob", "gpus": 8, "slots": 4}, "leave --slots out"),
        ({"kind": "mpijob", "workers": 2, "elastic": 3}, "--elastic 3 is more than --workers 2"),
        ({"kind": "trainjob", "elastic": 1}, "use --kind mpijob"),
        ({"kind": "jobset", "volcano": True}, "--volcano"),
        ({"kind": "indexed-job", "workers": 2, "gpus": 8}, "Use --workers 16 --gpus 1"),
        ({"kind": "mpijob", "image": "a b"}, "--image 'a b'"),
        ({"kind": "mpijob", "memory": "16GB"}, "--memory '16GB'"),
        ({"kind": "mpijob", "env": ("A",)}, "say NAME=VALUE"),
        ({"kind": "mpijob", "command": ("a\nb",)}, "line break"),
        ({"kind": "job"}, "--kind 'job'"),
    ],
)
def test_options_that_do_not_fit(options, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        Options(**options)


def test_a_program_that_ranks_would_not_find():
    with pytest.raises(ConfigError, match="absolute path"):
        render(Options("mpijob", command=("train.sh",)))


def test_the_command_line_makes_the_same_options():
    words = [
        "render",
        "--kind",
        "mpijob",
        "--workers",
        "4",
        "--volcano",
        "--env",
        "A=1 2",
        "--env",
        "B=3",
        "--",
        "python",
        "a b",
    ]
    written = _run(*words).output.splitlines()[0].removeprefix("# ")
    assert _run(*shlex.split(written)[2:]).output == _run(*words).output
    assert command_line(Options("pvc")) == "disttrain k8s render --kind pvc"


# The lint ---------------------------------------------------------------------------------------------------------------

# Each manifest broken in one way: the file, what is replaced (a regular expression) by what, the rule that has to say so,
# and what ends on the line that it has to name.
BROKEN = [
    # roles
    ("mpijob.yaml", r"    Worker:", "    worker:", "role-name", r" worker:"),
    ("mpijob.yaml", r"    Launcher:", "    Master:", "role-name", r" Master:"),
    ("mpijob.yaml", r"replicas: 1", "replicas: 2", "launcher-replicas", r"Launcher:\n +replicas:"),
    ("mpijob.yaml", r"restartPolicy: Never", "restartPolicy: ExitCode", "restart-policy", r"ExitCode"),
    ("mpijob.yaml", r"restartPolicy: OnFailure", "restartPolicy: Always", "restart-policy", r"Always"),
    ("mpijob.yaml", r"cleanPodPolicy: Running", "cleanPodPolicy: Runing", "clean-pod-policy", r"Runing"),
    ("mpijob-gpu.yaml", r"cleanPodPolicy: Running", "cleanPodPolicy: None", "clean-pod-policy", r"cleanPodPolicy"),
    ("mpijob-gpu.yaml", r" +cleanPodPolicy: .*\n", "", "clean-pod-policy", r"runPolicy:"),
    ("mpijob.yaml", r"name: digits\n", f"name: {LONG}\n", "host-name", rf"name: {LONG}"),
    ("mpijob.yaml", r"{name: checkpoints, m", "{name: checkpoint, m", "mount-without-volume", r"name: checkpoint,"),
    ("mpijob.yaml", r"- name: shm", "- name: shared", "mount-without-volume", r"name: shm,"),
    # GPUs and ranks
    ("mpijob-gpu.yaml", r"(requests: .*gpu: )8", r"\g<1>4", "gpu-limit", r"gpu: 4"),
    ("mpijob-gpu.yaml", r"(limits: .*), nvidia.com/gpu: 8", r"\1", "gpu-limit", r"requests: .*gpu: 8"),
    ("mpijob-gpu.yaml", r"slotsPerWorker: 8", "slotsPerWorker: 4", "slots", r"slotsPerWorker"),
    ("mpijob-gpu.yaml", r" +slotsPerWorker: .*\n", "", "slots", r"\nspec:"),
    ("mpijob-gpu.yaml", r'-np, "32"', '-np, "8"', "ranks", r'-np, "8"'),
    ("mpijob.yaml", r"replicas: 2", "replicas: 3", "ranks", r'-np, "2"'),
    ("mpijob-elastic.yaml", r'--max-np, "4"', '--max-np, "8"', "ranks", r'--max-np, "8"'),
    ("mpijob-elastic.yaml", r'-np, "4", --min-np', '-np, "5", --min-np', "ranks", r'-np, "5"'),
    # how ranks are started
    ("mpijob.yaml", r", --hostfile, /etc/mpi/hostfile", "", "hostfile", r"disttrain, run"),
    ("mpijob-elastic.yaml", r" --host-discovery-script,\s+/etc/mpi/discover_hosts.sh,", "", "hostfile", r"disttrain, run"),
    ("mpijob.yaml", r" +sshAuthMountPath: .*\n", "", "ssh-mount", r"\nspec:"),
    ("mpijob.yaml", r"/home/mpiuser/.ssh", "/root/.ssh", "ssh-mount", r"sshAuthMountPath"),
    ("mpijob.yaml", r"(?s)runAsNonRoot: true\n( +)runAsUser: 1000(.*)runAsNonRoot: true\n +runAsUser: 1000",
     r"runAsUser: 0\n\1runAsNonRoot: false\2runAsUser: 0", "ssh-mount", r"sshAuthMountPath"),
    ("mpijob.yaml", r"args:\n", "command:\n", "entry-point", r"  command:"),
    ("mpijob.yaml", r"/opt/disttrain/bin/disttrain, train, digits", "python, train.py", "absolute-path", r"python,"),
    ("mpijob.yaml", r"/opt/disttrain/bin/disttrain, train, digits", "./train", "absolute-path", r"\./train"),
    ("mpijob.yaml", r"/opt/disttrain/bin/disttrain, run", "disttrain, run", "absolute-path", r"disttrain, run"),
    ("mpijob.yaml", r"args: \[sshd\]", "args: [sshd]\n            env: [{name: NCCL_DEBUG, value: INFO}]",
     "worker-env", r"NCCL_DEBUG"),
    ("mpijob.yaml", r"/opt/disttrain/bin/disttrain, run", "/opt/disttrain/bin/mpirun", "not-passed", r"TF_CPP_MIN"),
    ("mpijob.yaml", r"name: TF_CPP_MIN_LOG_LEVEL", "name: TOKEN", "not-passed", r"TOKEN"),
    ("mpijob.yaml", r" +readinessProbe:\n.*\n.*\n", "", "readiness", r"- name: worker"),
    ("mpijob.yaml", r" +activeDeadlineSeconds: .*\n", "", "deadline", r"runPolicy:"),
    ("mpijob.yaml", r" +resources: .*\n.*\n.*\n", "", "launcher-resources", r"- name: launcher"),
    ("mpijob.yaml", r"cpu: 250m", 'cpu: "8"', "launcher-resources", r'cpu: "8"'),
    ("mpijob-gpu.yaml", r'cpu: "1", memory: 1Gi', "nvidia.com/gpu: 1", "launcher-resources", r"gpu: 1}"),
    ("mpijob.yaml", r" +- name: launcher", "          - {name: log, image: log, resources: {requests: {cpu: 1m}}}\n\\g<0>",
     "first-container", r"- name: launcher"),
    # Indexed Job
    ("indexed-job.yaml", r" +completionMode: .*\n", "", "completion-mode", r"kind: Job\n(.*\n)+?spec:"),
    ("indexed-job.yaml", r"completionMode: Indexed", "completionMode: NonIndexed", "completion-mode", r"completionMode"),
    ("indexed-job.yaml", r"parallelism: 4", "parallelism: 2", "parallelism", r"parallelism: 2"),
    ("indexed-job.yaml", r" +parallelism: .*\n", "", "parallelism", r"kind: Job\n(.*\n)+?spec:"),
    ("indexed-job.yaml", r"subdomain: digits-indexed", "subdomain: digits", "subdomain", r"subdomain"),
    ("indexed-job.yaml", r" +subdomain: .*\n", "", "subdomain", r"template:\n +spec:"),
    ("indexed-job.yaml", r"(?s)apiVersion: v1.*---\n", "", "subdomain", r"subdomain"),
    ("indexed-job.yaml", r"(publishNotReadyAddresses): true", r"\1: false", "not-ready-addresses", r"Addresses: false"),
    ("indexed-job.yaml", r" +publishNotReadyAddresses: .*\n", "", "not-ready-addresses", r"\nspec:"),
    ("indexed-job.yaml", r" +clusterIP: .*\n", "", "headless", r"\nspec:"),
    ("indexed-job.yaml", r"job-name: digits-indexed", "job-name: digits", "selector", r"selector"),
    ("indexed-job.yaml", r"completions: 4(.*\n +)parallelism: 4", r"completions: 3\1parallelism: 3", "hosts", r"value:"),
    ("indexed-job.yaml", r"-1\.digits-indexed", "-1.digits", "hosts", r"value:"),
    ("indexed-job.yaml", r"-1\.digits-indexed:2222", "-1.digits-indexed", "hosts", r"value:"),
    ("indexed-job.yaml", r" +env:\n.*\n( +value: .*\n)(.*\\\n)*.*\"\n", "", "hosts", r"- name: rank"),
    ("indexed-job.yaml", r"digits-indexed", f"{LONG}xx", "host-name", r"kind: Job\nmetadata:\n  name"),
    ("indexed-job.yaml", r"memory: 4Gi", "memory: 4Gi, nvidia.com/gpu: 2", "slots", r"limits: .*gpu"),
    ("indexed-job.yaml", r"restartPolicy: Never", "restartPolicy: Always", "restart-policy", r"Always"),
    ("indexed-job.yaml", r" +restartPolicy: .*\n", "", "restart-policy", r"template:\n +spec:"),
    ("indexed-job.yaml", r" +activeDeadlineSeconds: .*\n", "", "deadline", r"kind: Job\n(.*\n)+?spec:"),
    ("indexed-job.yaml", r"{name: shm, m", "{name: smh, m", "mount-without-volume", r"smh"),
    # JobSet
    ("jobset.yaml", r"enableDNSHostnames: true", "enableDNSHostnames: false", "host-names", r"enableDNS"),
    ("jobset.yaml", r"(publishNotReadyAddresses): true", r"\1: false", "not-ready-addresses", r"Addresses: false"),
    ("jobset.yaml", r"replicas: 1", "replicas: 2", "jobset-replicas", r"replicas: 2"),
    ("jobset.yaml", r"completionMode: Indexed", "completionMode: NonIndexed", "completion-mode", r"completionMode"),
    ("jobset.yaml", r"parallelism: 4", "parallelism: 1", "parallelism", r"parallelism"),
    ("jobset.yaml", r"subdomain: digits-set", "subdomain: digits", "hosts", r"value:"),
    ("jobset.yaml", r"- name: workers", "- name: ranks", "hosts", r"value:"),
    ("jobset.yaml", r"gpu: 1", "gpu: 2", "slots", r"limits: .*gpu"),
    ("jobset.yaml", r"restartPolicy: Never", "restartPolicy: Always", "restart-policy", r"Always"),
    ("jobset.yaml", r" +activeDeadlineSeconds: .*\n", "", "deadline", r"template:\n +spec:"),
    ("jobset.yaml", r"digits-set(?!.*yaml)", f"{LONG[:52]}", "host-name", r"\n  name"),
    ("jobset.yaml", r"- name: checkpoints", "- name: checkpoint", "mount-without-volume", r"name: checkpoints,"),
    # TrainJob and its runtime
    ("trainjob.yaml", r"- name: node\n        t", "- name: nodes\n        t", "role-name", r"replicatedJobs:"),
    ("trainjob.yaml", r"- name: node  # by", "- name: worker  # by", "container-name", r"worker"),
    ("trainjob.yaml", r"ancestor-step: trainer", "ancestor-step: training", "ancestor", r"ancestor-step"),
    ("trainjob.yaml", r" +successPolicy:\n.*\n.*\n", "", "success-policy", r"template:\n +spec:"),
    ("trainjob.yaml", r"\[launcher\]", "[node]", "success-policy", r"successPolicy:"),
    ("trainjob.yaml", r"(publishNotReadyAddresses): true", r"\1: false", "not-ready-addresses", r"Addresses: false"),
    ("trainjob.yaml", r" +sshAuthMountPath: .*\n", "", "ssh-mount", r" mpi:"),
    ("trainjob.yaml", r" +readinessProbe:\n.*\n.*\n", "", "readiness", r"- name: node  # by"),
    ("trainjob.yaml", r"cpu: 250m", "cpu: 4000m", "launcher-resources", r"4000m"),
    ("trainjob.yaml", r"restartPolicy: Never", "restartPolicy: Always", "restart-policy", r"Always"),
    ("trainjob.yaml", r"        dependsOn", "        replicas: 2\n        dependsOn", "launcher-replicas", r"replicas: 2"),
    ("trainjob.yaml", r"memory: 4Gi", "memory: 4Gi, nvidia.com/gpu: 2", "slots", r"numProcPerNode"),
    ("trainjob.yaml", r"requests: {cpu: \"2\"", '\\g<0>, nvidia.com/gpu: 1', "gpu-limit", r"gpu: 1"),
    ("trainjob.yaml", r" +kind: TrainingRuntime  .*\n", "", "runtime-kind", r"runtimeRef:"),
    ("trainjob.yaml", r" +activeDeadlineSeconds: .*\n", "", "deadline", r"kind: TrainJob\n(.*\n)+?spec:"),
    ("trainjob.yaml", r'-np, "4"', '-np, "2"', "ranks", r'-np, "2"'),
    ("trainjob.yaml", r", --hostfile, /etc/mpi/hostfile", "", "hostfile", r"disttrain, run"),
    ("trainjob.yaml", r"    args:\n", "    command:\n", "entry-point", r"  command:"),
    ("trainjob.yaml", r"/opt/disttrain/bin/disttrain, train", "disttrain, train", "absolute-path", r"disttrain, train"),
    ("trainjob.yaml", r"name: TF_CPP_MIN_LOG_LEVEL", "name: TOKEN", "not-passed", r"TOKEN"),
    ("trainjob.yaml", r"digits-train\n", f"{LONG}\n", "host-name", r"kind: TrainJob\nmetadata:\n  name"),
    ("trainjob.yaml", r"args: \[sshd\]", "args: [sshd]\n                  env: [{name: NCCL_DEBUG, value: INFO}]",
     "worker-env", r"NCCL_DEBUG"),
    # shape
    ("mpijob.yaml", r"replicas: 2", "replica: 2", "unknown-field", r"replica:"),
    ("mpijob.yaml", r"slotsPerWorker", "slotsperWorker", "unknown-field", r"slotsperWorker"),
    ("mpijob.yaml", r"replicas: 2", 'replicas: "2"', "type", r'replicas: "2"'),
    ("mpijob.yaml", r'value: "1"', "value: 1", "type", r"TF_CPP"),
    ("mpijob.yaml", r'-np, "2"', "-np, 2", "type", r"-np"),
    ("mpijob.yaml", r"runAsNonRoot: true", 'runAsNonRoot: "true"', "type", r"runAsNonRoot"),
    ("mpijob.yaml", r"args: \[sshd\]", "args: sshd", "type", r"args: sshd"),
    ("mpijob.yaml", r"memory: 4Gi}\n", "memory: 4GiB}\n", "type", r"requests: .*GiB"),
    ("mpijob.yaml", r"WaitForWorkersReady", "WaitForWorkers", "value", r"launcherCreationPolicy"),
    ("mpijob.yaml", r"- name: worker\n( +)", r"- ", "missing-field", r"- image"),
    ("mpijob.yaml", r"kubeflow.org/v2beta1", "kubeflow.org/v1", "kind", r"kind"),
    ("mpijob.yaml", r"replicas: 2", "replicas: 2\n      replicas: 3", "repeated-key", r"replicas: 3"),
    ("mpijob.yaml", r"spec:", "spec: [", "yaml", r"sshAuthMountPath"),
    ("indexed-job.yaml", r"completions: 4", "completion: 4", "unknown-field", r"completion:"),
    ("indexed-job.yaml", r"clusterIP: None", "clusterIP: null", "type", r"clusterIP"),
    ("indexed-job.yaml", r"clusterIP", "clusterIp", "unknown-field", r"clusterIp"),
    ("jobset.yaml", r"maxRestarts: 3", "maxRestart: 3", "unknown-field", r"maxRestart"),
    ("jobset.yaml", r"- name: workers\n +", "- ", "missing-field", r"- replicas"),
    ("trainjob.yaml", r"numNodes: 4", "numNodes: four", "type", r"four"),
    ("trainjob.yaml", r"  trainer:\n", "  trainers:\n", "unknown-field", r"trainers"),
    ("pvc.yaml", r"\[ReadWriteMany\]", "ReadWriteMany", "type", r"accessModes"),
    ("pvc.yaml", r"ReadWriteMany", "ReadWriteAll", "value", r"accessModes"),
    ("pvc.yaml", r"storage: 10Gi", "storage: ten", "type", r"storage"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "rule", "ends"), BROKEN)
def test_the_lint_names_the_fault_and_its_line(name, old, new, rule, ends):
    text = MANIFESTS[name].read_text().split("\n", 1)[1]
    every = name == "jobset.yaml" or "digits-" in old or "memory" in old
    broken, changed = re.subn(old, new, text, count=0 if every else 1)
    assert changed
    line = broken.count("\n", 0, re.search(ends, broken).end()) + 1
    faults = lint_text(broken, name)
    assert [(fault.rule, fault.line) for fault in faults] == [(rule, line)], faults
    assert faults[0].message
    assert faults[0].mend


def test_what_a_shell_is_told_is_looked_into():
    text = MANIFESTS["mpijob.yaml"].read_text()
    script = "mpirun -np 8 -x TF_CPP_MIN_LOG_LEVEL python train.py"
    text = re.sub(r"args:\n( +).*\n.*\]", rf"args: [bash, -c, {script}]", text, count=1)
    line = text[: text.index("bash")].count("\n") + 1
    found = {(fault.rule, fault.line) for fault in lint_text(text)}
    assert found == {("hostfile", line), ("absolute-path", line), ("ranks", line)}


def test_mpirun_that_passes_its_variables_on_is_right():
    text = MANIFESTS["mpijob.yaml"].read_text()
    text = text.replace("/disttrain, run,", "/mpirun, -x, TF_CPP_MIN_LOG_LEVEL=1,")
    assert "mpirun" in text
    assert lint_text(text) == []


def test_discovery_without_slots():
    text = render(Options("mpijob", workers=4, slots=2, elastic=2))
    assert lint_text(text) == []
    (fault,) = lint_text(text.replace(', --slots-per-host, "2"', ""))
    assert fault.rule == "discovery-slots"
    assert "discover_hosts.sh" in text.splitlines()[fault.line - 1]


def test_an_ordinary_job_is_left_alone():
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "prepare"}}
    pod = {"restartPolicy": "Never", "containers": [{"name": "main", "command": ["python", "prepare.py"]}]}
    for spec in ({}, {"completionMode": "Indexed", "completions": 100, "parallelism": 10}):
        assert lint_text(yaml.safe_dump(job | {"spec": spec | {"template": {"spec": pod}}})) == []


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("- a\n- b", "kind"),
        ("kind: []\napiVersion: {}", "kind"),
        ("kind: Deployment\napiVersion: apps/v1", "kind"),
        ("a: &b [*b]", "yaml"),
        ("? [a]\n: b", "yaml"),
        ("a: 'b", "yaml"),
    ],
)
def test_what_is_no_manifest_is_a_fault_and_no_traceback(text, rule):
    assert [fault.rule for fault in lint_text(text)] == [rule]


def test_lint_on_the_command_line(tmp_path):
    good, bad = MANIFESTS["mpijob.yaml"], tmp_path / "bad.yaml"
    bad.write_text(good.read_text().replace("    Worker:", "    worker:"))
    result = _run("lint", str(good), str(bad))
    assert result.exit_code == 1
    (line,) = result.stdout.splitlines()
    expected = r"bad.yaml:\d+: MPIJob digits, spec.mpiReplicaSpecs.worker: .*'worker'; write Worker: \[role-name\]"
    assert re.search(expected, line)
    assert "1 fault in 2 files" in result.stderr
    assert _run("lint", str(good)).exit_code == 0
    assert CliRunner().invoke(cli, ["k8s", "lint", "-"], input=bad.read_text()).stdout.startswith("<stdin>:")
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read"):
        lint("nowhere.yaml")


# Overlays ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overlay", "ranks", "image"),
    [("gpu", 16, "disttrain:0.1-gpu"), ("team", 8, "registry.example/team/disttrain:0.1")],
)
def test_the_overlays_apply_and_pass_the_lint(overlay, ranks, image):
    folder = K8S / "overlays" / overlay
    overlay = yaml.safe_load((folder / "kustomization.yaml").read_text())
    (base,) = ((folder / resource).resolve() for resource in overlay["resources"])
    documents = [
        document
        for name in yaml.safe_load((base / "kustomization.yaml").read_text())["resources"]
        for document in yaml.safe_load_all((base / name).read_text())
    ]
    for patch in overlay["patches"]:
        chosen = [d for d in documents if (d["kind"], d["metadata"]["name"]) == tuple(patch["target"].values())]
        assert len(chosen) == 1
        jsonpatch.apply_patch(chosen[0], yaml.safe_load(patch["patch"]), in_place=True)
    assert lint_text(yaml.safe_dump_all(documents)) == []
    job = next(document for document in documents if document["kind"] == "MPIJob")["spec"]
    assert job["slotsPerWorker"] * job["mpiReplicaSpecs"]["Worker"]["replicas"] == ranks
    (tag,) = overlay["images"]
    assert f"{tag.get('newName', tag['name'])}:{tag['newTag']}" == image
    assert {c["image"].split(":")[0] for c in _containers(job)} == {tag["name"]}


def _containers(job):
    return [role["template"]["spec"]["containers"][0] for role in job["mpiReplicaSpecs"].values()]


def _strings(value):
    if isinstance(value, dict | list):
        return [s for item in (value.values() if isinstance(value, dict) else value) for s in _strings(item)]
    return [value] if isinstance(value, str) else []


# The image --------------------------------------------------------------------------------------------------------------


def _tool(name, *arguments):
    run = subprocess.run([Path(sys.executable).with_name(name), *arguments], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_dockerfile_and_the_entry_point_are_in_order():
    _tool("hadolint", K8S / "Dockerfile")
    _tool("shellcheck", K8S / "entrypoint.sh")
    assert os.access(K8S / "entrypoint.sh", os.X_OK)
    copied = re.findall(r"^COPY (?!--from)(?:--\S+ )?(.*) \S+$", (K8S / "Dockerfile").read_text(), re.MULTILINE)
    sources = [source for line in copied for source in line.split()]
    assert "k8s/entrypoint.sh" in sources
    assert [source for source in sources if not (K8S.parent / source).exists()] == []
    ignored = (K8S.parent / ".dockerignore").read_text().splitlines()
    assert {source.split("/")[0] for source in sources} <= {line[1:] for line in ignored if line.startswith("!")}


@pytest.fixture
def entrypoint(tmp_path):
    """Starts k8s/entrypoint.sh with a host file of these lines."""
    started = []

    def start(*command, hosts=None, **environment):
        file = tmp_path / "hostfile"
        if hosts is not None:
            file.write_text("".join(f"{line}\n" for line in hosts))
        own = {"DISTTRAIN_HOSTFILE": str(file), "DISTTRAIN_WAIT_SECONDS": "20"}
        process = subprocess.Popen(
            [K8S / "entrypoint.sh", *command],
            env=os.environ | own | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        # What it has started holds its pipes open.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)


def _port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_the_entry_point_waits_until_hosts_answer(entrypoint):
    port = _port()
    lines = ["# from the operator", "localhost slots=2", "127.0.0.1:1  # twice, by another name", ""]
    process = entrypoint("echo", "all", "there", hosts=lines, DISTTRAIN_SSH_PORT=str(port))
    time.sleep(0.8)
    assert process.poll() is None
    with socket.create_server(("127.0.0.1", port)):
        out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "all there\n")


def test_the_entry_point_names_the_host_that_it_gave_up_on(entrypoint):
    begin = time.monotonic()
    port = str(_port())
    hosts = ["nobody.invalid slots=2", "localhost"]
    process = entrypoint("echo", "ran", hosts=hosts, DISTTRAIN_SSH_PORT=port, DISTTRAIN_WAIT_SECONDS="1")
    out, error = process.communicate(timeout=30)
    assert process.returncode == 1
    assert out == ""
    assert "nobody.invalid has no address" in error
    assert f"localhost does not answer on port {port}" in error
    assert time.monotonic() - begin < 15


def test_the_entry_point_waits_for_some_hosts_of_an_elastic_job(entrypoint):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        hosts = ["nobody.invalid", "localhost"]
        process = entrypoint("echo", "one", hosts=hosts, DISTTRAIN_SSH_PORT=port, DISTTRAIN_WAIT_HOSTS="1")
        assert process.communicate(timeout=20)[0] == "one\n"


def test_without_a_host_file_the_command_runs_at_once_and_keeps_its_exit_code(entrypoint):
    process = entrypoint("bash", "-c", "echo $0; exit 75", "now")
    assert process.communicate(timeout=30)[0] == "now\n"
    assert process.returncode == 75


@pytest.mark.parametrize("soon", [False, True])
def test_the_end_of_a_worker_reaches_its_ranks_first(entrypoint, tmp_path, soon):
    """Whether it comes while the worker waits for ranks, or just as its server starts; there on a very slow machine."""
    said, variable, slow = tmp_path / "said", f"RANK_OF_{os.getpid()}", tmp_path / "slow"
    slow.write_text("unset BASH_ENV\nset -o functrace\ntrap 'sleep 0.2' DEBUG\n" if soon else "")
    server, rank = tmp_path / "sshd", tmp_path / "rank"
    script = "#!/bin/bash\ntrap 'sleep {delay}; echo {name} >> {said}; exit' TERM\n"
    script += "echo up >> {said}\n{first}\nwhile :; do sleep 0.1; done\n"
    for path, delay, first in ((server, 0, "kill -TERM $PPID" if soon else ":"), (rank, 0.5, ":")):
        path.write_text(script.format(name=path.name, said=said, delay=delay, first=first))
        path.chmod(0o755)
    training = subprocess.Popen([rank], env=os.environ | {variable: "0"})
    try:
        _until(lambda: said.exists() and said.read_text() == "up\n")
        own = {"DISTTRAIN_SSHD": str(server), "DISTTRAIN_RANK_VARIABLES": variable, "BASH_ENV": str(slow)}
        process = entrypoint("sshd", **own)
        _until(lambda: said.read_text().startswith("up\nup\n"))
        if not soon:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        assert process.returncode == 0
        assert training.wait(timeout=30) == 0
        _until(lambda: said.read_text() == "up\nup\nrank\nsshd\n")
    finally:
        training.kill()
        training.wait()


def _until(holds):
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)
