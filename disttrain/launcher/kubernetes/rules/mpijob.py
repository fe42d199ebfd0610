"""MPIJob, of the MPI Operator."""

from __future__ import annotations

from collections.abc import Iterator

from disttrain.launcher.kubernetes.places import Fault, Place
from disttrain.launcher.kubernetes.rules import pods, ssh
from disttrain.launcher.kubernetes.words import Words

_ROLES = ("Launcher", "Worker")


def mpijob(root: Place) -> Iterator[Fault]:
    spec, roles = root["spec"], root["spec"]["mpiReplicaSpecs"]
    unknown = list(_role_names(roles, spec["runLauncherAsWorker"].value))
    yield from unknown
    yield from _roles(roles)
    if unknown:
        return
    workers, slots = roles["Worker"]["replicas"].value or 1, spec["slotsPerWorker"].value or 1
    launcher, worker = (roles[name]["template"]["spec"] for name in ("Launcher", "Worker"))
    yield from _run_policy(spec["runPolicy"], worker)
    yield from pods.host_name(root, f"{root.document.name}-worker-{workers - 1}")
    yield from ssh.ssh_mount(spec["sshAuthMountPath"], launcher, worker)
    if spec["launcherCreationPolicy"].value == "WaitForWorkersReady":
        yield from ssh.readiness(worker)
    uneven = list(ssh.slots(spec["slotsPerWorker"], slots, worker))
    yield from uneven
    workers += bool(spec["runLauncherAsWorker"].value)
    yield from _launcher(launcher, None if uneven else workers * slots, slots)
    if not spec["runLauncherAsWorker"].value:
        yield from ssh.small(launcher)
    yield from ssh.worker_variables(launcher["containers"][0], worker["containers"][0])


def _role_names(roles: Place, launcher_alone: bool | None) -> Iterator[Fault]:
    for role in roles:
        if role.key not in _ROLES:
            right = str(role.key).capitalize()
            mend = f"write {right}:" if right in _ROLES else "use Launcher: and Worker:"
            yield role.fault("role-name", f"the operator knows no role {role.key!r}", mend)
            return
    for name in _ROLES:
        if roles[name].value is None and not (name == "Worker" and launcher_alone):
            yield roles[name].fault("role-name", f"there is no {name}", f"add {name}:")


def _roles(roles: Place) -> Iterator[Fault]:
    replicas = roles["Launcher"]["replicas"]
    if replicas.value not in (None, 1):
        mend = "set replicas: 1; one launcher starts all ranks"
        yield replicas.fault("launcher-replicas", f"{replicas.value} launchers", mend)
    for role in roles:
        yield from pods.restart_policy(role["restartPolicy"])
        yield from pods.pod(role["template"]["spec"])


def _launcher(launcher: Place, ranks: int | None, slots: int) -> Iterator[Fault]:
    yield from ssh.first_container(launcher)
    container = launcher["containers"][0]
    line = Words.of(container["command"], container["args"])
    yield from ssh.entry_point(container["command"])
    yield from ssh.launch(line, container["env"], ranks, slots)


def _run_policy(policy: Place, worker: Place) -> Iterator[Fault]:
    clean = policy["cleanPodPolicy"]
    if clean.value not in (None, "None", "Running", "All"):
        yield clean.fault("clean-pod-policy", f"{clean.value!r} is no policy", "set cleanPodPolicy: Running")
    elif clean.value in (None, "None") and pods.gpus(worker):
        said = "cleanPodPolicy None, the default, lets workers keep their GPUs after the job has ended"
        yield clean.fault("clean-pod-policy", said, "set cleanPodPolicy: Running")
    yield from pods.deadline(policy["activeDeadlineSeconds"])
