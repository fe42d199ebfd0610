"""What a launcher needs that starts ranks over ssh, by whatever operator."""

from __future__ import annotations

from collections.abc import Iterator

from disttrain.launcher.kubernetes.places import Fault, Place
from disttrain.launcher.kubernetes.rules import pods
from disttrain.launcher.kubernetes.words import DISCOVERY, HOST_FILE, HOSTS, NOT_FOR_RANKS, TRAVELS, Words

_LARGE = 2.0  # cores: more is no small launcher


def launch(line: Words, env: Place, ranks: int | None, slots: int) -> Iterator[Fault]:
    """What is wrong with the command line that starts ranks. `ranks`: how many there should be; None: not known."""
    if not line.starts_ranks:
        return
    yield from line.relative_programs()
    yield from _not_passed(line, env)
    in_env = any(item["name"].value == "PRTE_MCA_prte_default_hostfile" for item in env)
    if not in_env and not line.has(*HOST_FILE, *HOSTS, *DISCOVERY):
        said = "no host file, and Open MPI 5 does not see the operator's: every rank would run on the launcher"
        yield line.words[0][1].fault("hostfile", said, "add --hostfile /etc/mpi/hostfile")
    for name in ("-np", "--max-np"):
        number = line.number(name)
        if number and ranks and number[0] != ranks:
            said = f"{name} {number[0]}, and the workers have {ranks} slots"
            yield number[1].fault("ranks", said, f"write {name} {ranks}")
    if line.has(*DISCOVERY) and not line.has("--slots-per-host") and slots > 1:
        place = line.option(*DISCOVERY)[1]
        said = f"discover_hosts.sh prints names without slots: one rank on each worker, not {slots}"
        yield place.fault("discovery-slots", said, f"add --slots-per-host {slots}")


def entry_point(command: Place) -> Iterator[Fault]:
    if command.value and not command.value[0].endswith("entrypoint.sh"):
        said = "command: takes the place of the image's entry point, which waits until workers can be reached by name"
        yield command.fault("entry-point", said, "write args: instead")


def first_container(pod: Place) -> Iterator[Fault]:
    for container in list(pod["containers"])[1:]:
        if Words.of(container["command"], container["args"]).starts_ranks:
            said = "the operator gives ssh keys and host file to the first container only"
            yield container.fault("first-container", said, "put this container first")


def ssh_mount(mount: Place, *pods_of_roles: Place) -> Iterator[Fault]:
    folder = mount.value or "/root/.ssh"
    users = {_user(pod) for pod in pods_of_roles} - {None}
    if users - {0} and folder.startswith("/root"):
        said = f"the ssh keys are in {folder}, which is closed to users that are not root"
        yield mount.fault(
            "ssh-mount", said, "set sshAuthMountPath: to .ssh in that user's home, such as /home/mpiuser/.ssh"
        )
    elif users == {0} and not folder.startswith("/root"):
        said = f"root looks for its ssh keys in /root/.ssh, not in {folder}"
        yield mount.fault("ssh-mount", said, "leave sshAuthMountPath out, or set runAsUser")


def _user(pod: Place) -> int | None:
    """Who runs the first container, as far as the manifest says; -1: somebody who is not root."""
    own, shared = pod["containers"][0]["securityContext"], pod["securityContext"]
    for field in (own["runAsUser"], shared["runAsUser"]):
        if field.value is not None:
            return field.value
    return -1 if own["runAsNonRoot"].value or shared["runAsNonRoot"].value else None


def readiness(pod: Place) -> Iterator[Fault]:
    if pod["containers"][0]["readinessProbe"].value is None:
        said = "without a probe a worker counts as ready before its sshd answers"
        yield pod["containers"][0].fault("readiness", said, "add readinessProbe: {tcpSocket: {port: 2222}}")


def small(pod: Place) -> Iterator[Fault]:
    """The launcher beside workers that take all they can get."""
    container = pod["containers"][0]
    resources = container["resources"]
    cores = resources["requests"]["cpu"].value
    if pods.gpus(pod):
        said = "a launcher computes nothing, and would hold a GPU"
        yield pods.gpu_place(container).fault("launcher-resources", said, "take the GPUs out")
    elif resources["requests"].value is None and resources["limits"].value is None:
        said = "a launcher that requests nothing is the first to be evicted"
        yield resources.fault("launcher-resources", said, "add resources: {requests: {cpu: 250m, memory: 512Mi}}")
    elif cores is not None and pods.cores(cores) > _LARGE:
        said = f"{cores} cores for a launcher, which only waits: it may find no room beside the workers"
        yield resources["requests"]["cpu"].fault("launcher-resources", said, "request 250m")


def slots(place: Place, slots: int, pod: Place) -> Iterator[Fault]:
    gpus = pods.gpus(pod)
    if gpus and slots != gpus:
        yield place.fault(
            "slots", f"{slots} ranks on each worker with {gpus} GPUs", f"set it to {gpus}; a rank takes one GPU"
        )


def worker_variables(launcher: Place, worker: Place) -> Iterator[Fault]:
    on_launcher = {item["name"].value for item in launcher["env"]}
    for item in worker["env"]:
        name = item["name"].value
        if name not in on_launcher and not NOT_FOR_RANKS.fullmatch(name):
            said = f"{name} is set on the workers alone, and what sshd starts there does not see it"
            yield item.fault("worker-env", said, "set it on the launcher, which hands it to the ranks")


def _not_passed(line: Words, env: Place) -> Iterator[Fault]:
    for item in env if line.is_bare_mpirun or line.program == "disttrain run" else ():
        name = item["name"].value
        by_itself = line.program == "disttrain run" and TRAVELS.fullmatch(name)
        if name not in line.passed() and not by_itself and not NOT_FOR_RANKS.fullmatch(name):
            yield item.fault("not-passed", f"{name} stays on the launcher", f"pass it to the ranks by -x {name}")
