"""TrainJob and its runtime, of Kubeflow Trainer."""

from __future__ import annotations

from collections.abc import Iterator

from disttrain.launcher.kubernetes.places import Document, Fault, Place
from disttrain.launcher.kubernetes.rules import pods, ssh
from disttrain.launcher.kubernetes.words import Words

_ANCESTOR = "trainer.kubeflow.org/trainjob-ancestor-step"


def runtime(root: Place) -> Iterator[Fault]:
    mpi, jobset = root["spec"]["mlPolicy"]["mpi"], root["spec"]["template"]["spec"]
    jobs = {job["name"].value: job for job in jobset["replicatedJobs"]}
    for job in jobs.values():
        yield from pods.restart_policy(_pod(job)["restartPolicy"])
        yield from pods.pod(_pod(job))
    missing = [name for name in ("launcher", "node") if name not in jobs]
    if mpi.value is None:
        return
    if missing:
        said = f"there is no job {missing[0]!r} (here: {', '.join(jobs)}), and the Trainer looks for it by that name"
        yield jobset["replicatedJobs"].fault("role-name", said, f"name a replicated job {missing[0]}")
        return
    yield from _jobset(jobset)
    yield from _launcher(jobs["launcher"])
    launcher, node = _pod(jobs["launcher"]), _pod(jobs["node"])
    yield from _container_names(launcher, node)
    yield from ssh.ssh_mount(mpi["sshAuthMountPath"], launcher, node)
    yield from ssh.slots(mpi["numProcPerNode"], mpi["numProcPerNode"].value or 1, node)
    yield from ssh.worker_variables(launcher["containers"][0], node["containers"][0])
    if any(item["status"].value == "Ready" for item in jobs["launcher"]["dependsOn"]):
        yield from ssh.readiness(node)
    if not mpi["runLauncherAsNode"].value:
        yield from ssh.small(launcher)


def _jobset(jobset: Place) -> Iterator[Fault]:
    if "launcher" not in (jobset["successPolicy"]["targetReplicatedJobs"].value or ()):
        said = "the job waits for the nodes' sshd, which never ends"
        yield jobset["successPolicy"].fault("success-policy", said, "set targetReplicatedJobs: [launcher]")
    not_ready = jobset["network"]["publishNotReadyAddresses"]
    if not_ready.value is False:
        said = "the launcher cannot find nodes before they are ready"
        yield not_ready.fault("not-ready-addresses", said, "set publishNotReadyAddresses: true")


def _launcher(job: Place) -> Iterator[Fault]:
    for field in (job["replicas"], job["template"]["spec"]["parallelism"]):
        if field.value not in (None, 1):
            mend = "set it to 1; one launcher starts all ranks"
            yield field.fault("launcher-replicas", f"{field.value} launchers", mend)
    label = job["template"]["metadata"]["labels"][_ANCESTOR]
    if label.value != "trainer":
        yield label.fault("ancestor", "the TrainJob's args do not reach the launcher", f"label it {_ANCESTOR}: trainer")
    yield from ssh.entry_point(_pod(job)["containers"][0]["command"])


def _container_names(*pods_of_jobs: Place) -> Iterator[Fault]:
    for pod in pods_of_jobs:
        name = pod["containers"][0]["name"]
        if name.value != "node":
            said = f"a container {name.value!r} gets no ssh keys and no host file"
            yield name.fault("container-name", said, "name it node")


def trainjob(root: Place, others: list[Document]) -> Iterator[Fault]:
    spec, trainer = root["spec"], root["spec"]["trainer"]
    yield from pods.deadline(spec["activeDeadlineSeconds"])
    yield from pods.limits(trainer["resourcesPerNode"])
    runtime = _runtime_of(spec["runtimeRef"], others)
    line = Words.of(trainer["command"], trainer["args"])
    if runtime:
        yield from _runtime_kind(spec["runtimeRef"]["kind"], runtime)
    # Of a runtime that is not in the file, only the command line tells whether it is one with MPI.
    if runtime["spec"]["mlPolicy"]["mpi"].value is not None if runtime else line.starts_ranks:
        yield from _with_mpi(root, trainer, line, runtime)


def _with_mpi(root: Place, trainer: Place, line: Words, runtime: Place | None) -> Iterator[Fault]:
    policy = runtime["spec"]["mlPolicy"] if runtime else root["none"]
    nodes = trainer["numNodes"].value or policy["numNodes"].value or 1
    slots = trainer["numProcPerNode"].value or policy["mpi"]["numProcPerNode"].value or 1
    yield from pods.host_name(root, f"{root.document.name}-node-0-{nodes - 1}")
    # What the runtime itself says of its nodes is looked at there.
    own = trainer["numProcPerNode"].value not in (None, policy["mpi"]["numProcPerNode"].value)
    gpus = pods.count(trainer["resourcesPerNode"]) or (pods.gpus(_node(runtime)) if runtime and own else 0)
    uneven = gpus not in (0, slots)
    if uneven:
        said = f"{slots} ranks on each node with {gpus} GPUs"
        yield trainer["numProcPerNode"].fault("slots", said, f"set numProcPerNode: {gpus}; a rank takes one GPU")
    yield from ssh.entry_point(trainer["command"])
    yield from ssh.launch(line, trainer["env"], None if uneven else nodes * slots, slots)


def _runtime_kind(reference: Place, runtime: Place) -> Iterator[Fault]:
    kind, looked_for = runtime.document.kind, reference.value or "ClusterTrainingRuntime"
    if kind != looked_for:
        said = f"{runtime.document.name} is a {kind}, and this looks for a {looked_for}"
        yield reference.fault("runtime-kind", said, f"set kind: {kind}")


def _runtime_of(reference: Place, others: list[Document]) -> Place | None:
    kinds = ("TrainingRuntime", "ClusterTrainingRuntime")
    found = (o.root for o in others if o.sound and o.kind in kinds and o.name == reference["name"].value)
    return next(found, None)


def _node(runtime: Place) -> Place:
    jobs = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    return _pod(next((job for job in jobs if job["name"].value == "node"), jobs[0]))


def _pod(job: Place) -> Place:
    return job["template"]["spec"]["template"]["spec"]
