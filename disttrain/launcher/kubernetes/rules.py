"""What the API server accepts, and what then hangs, fails, runs on the launcher alone, or keeps GPUs for nothing.

A rule looks at one thing and yields faults. Where one fault would make another rule complain too, that rule keeps silent:
one cause, one fault.
"""

from __future__ import annotations

from collections.abc import Iterator

from disttrain.launcher.kubernetes import words
from disttrain.launcher.kubernetes.places import Document, Fault, Place
from disttrain.launcher.kubernetes.words import Words

_HOST_NAME = 63  # characters
_LARGE = 2.0  # cores: more is no small launcher
_ANCESTOR = "trainer.kubeflow.org/trainjob-ancestor-step"


def check(document: Document, others: list[Document]) -> Iterator[Fault]:
    """The faults of a document that is sound. `others`: what stands in the same file."""
    root = document.root
    if document.kind == "MPIJob":
        yield from _mpijob(root)
    elif document.kind == "Job":
        yield from _job(root, others)
    elif document.kind == "JobSet":
        yield from _jobset(root)
    elif document.kind == "TrainJob":
        yield from _trainjob(root, others)
    elif document.kind in ("TrainingRuntime", "ClusterTrainingRuntime"):
        yield from _runtime(root)


# MPIJob -----------------------------------------------------------------------------------------------------------------


def _mpijob(root: Place) -> Iterator[Fault]:
    spec, roles = root["spec"], root["spec"]["mpiReplicaSpecs"]
    wrong = [role for role in roles if role.key not in ("Launcher", "Worker")]
    for role in wrong:
        right = str(role.key).capitalize()
        mend = f"write {right}:" if right in ("Launcher", "Worker") else "use Launcher: and Worker:"
        yield role.fault("role-name", f"the operator knows no role {role.key!r}", mend)
    for name in () if wrong else ("Launcher", "Worker"):
        if roles[name].value is None and not (name == "Worker" and spec["runLauncherAsWorker"].value):
            yield roles[name].fault("role-name", f"there is no {name}", f"add {name}:")
    launcher, worker = roles["Launcher"], roles["Worker"]
    if launcher["replicas"].value not in (None, 1):
        fault = f"{launcher['replicas'].value} launchers"
        yield launcher["replicas"].fault("launcher-replicas", fault, "set replicas: 1; one launcher starts all ranks")
    for role in (launcher, worker):
        yield from _restart_policy(role["restartPolicy"])
        yield from _pod(role["template"]["spec"])
    if wrong:
        return
    yield from _run_policy(spec, worker)
    workers = worker["replicas"].value or 1
    yield from _host_name(root, f"{root.document.name}-worker-{workers - 1}")
    yield from _ssh_mount(spec["sshAuthMountPath"], launcher, worker)
    if spec["launcherCreationPolicy"].value == "WaitForWorkersReady":
        yield from _readiness(worker["template"]["spec"])
    if not spec["runLauncherAsWorker"].value:
        yield from _small(launcher["template"]["spec"])
    slots = spec["slotsPerWorker"].value or 1
    uneven = list(_slots(spec["slotsPerWorker"], slots, worker["template"]["spec"]))
    yield from uneven
    yield from _first_container(launcher["template"]["spec"])
    container = launcher["template"]["spec"]["containers"][0]
    line = Words.of(container["command"], container["args"])
    yield from _entry_point(container["command"])
    ranks = None if uneven else (workers + bool(spec["runLauncherAsWorker"].value)) * slots
    yield from _launch(line, container, ranks, slots)
    yield from words.lost_variables(container, worker["template"]["spec"]["containers"][0], line)


def _run_policy(spec: Place, worker: Place) -> Iterator[Fault]:
    clean = spec["runPolicy"]["cleanPodPolicy"]
    if clean.value not in (None, "None", "Running", "All"):
        yield clean.fault("clean-pod-policy", f"{clean.value!r} is no policy", "set cleanPodPolicy: Running")
    elif clean.value in (None, "None") and _gpus(worker["template"]["spec"]):
        said = "cleanPodPolicy None, the default, lets workers keep their GPUs after the job has ended"
        yield clean.fault("clean-pod-policy", said, "set cleanPodPolicy: Running")
    yield from _deadline(spec["runPolicy"]["activeDeadlineSeconds"])


# Indexed Job and JobSet -------------------------------------------------------------------------------------------------


def _job(root: Place, others: list[Document]) -> Iterator[Fault]:
    spec, name = root["spec"], root.document.name
    pod = spec["template"]["spec"]
    yield from _restart_policy(pod["restartPolicy"], needed=True)
    yield from _pod(pod)
    if not _is_distributed(spec):
        return
    if spec["completionMode"].value != "Indexed":
        yield _not_indexed(spec["completionMode"])
    service = next((o for o in others if (o.kind, o.name) == ("Service", pod["subdomain"].value)), None)
    yield from _ranks_in_pods(spec, f"{name}-", service and service.name)
    if service is None:
        there = ", ".join(o.name for o in others if o.kind == "Service") or "none"
        said = f"{pod['subdomain'].value!r} is not the name of a Service (here: {there}), so that pods have no names"
        mend = "set it to the name of a headless Service in the same file"
        yield pod["subdomain"].fault("subdomain", said, mend)
    elif service.sound:
        yield from _service(service.root["spec"], name)


def _jobset(root: Place) -> Iterator[Fault]:
    network, name = root["spec"]["network"], root.document.name
    for job in root["spec"]["replicatedJobs"]:
        spec = job["template"]["spec"]
        yield from _restart_policy(spec["template"]["spec"]["restartPolicy"])
        yield from _pod(spec["template"]["spec"])
        if not _is_distributed(spec):
            continue
        if spec["completionMode"].value == "NonIndexed":
            yield _not_indexed(spec["completionMode"])
        if job["replicas"].value not in (None, 1):
            said = f"{job['replicas'].value} jobs, in each of which JOB_COMPLETION_INDEX begins at 0"
            yield job["replicas"].fault(
                "jobset-replicas", said, "set replicas: 1, and completions: to the number of ranks"
            )
        yield from _ranks_in_pods(spec, f"{name}-{job['name'].value}-0-", network["subdomain"].value or name)
    for field in ("enableDNSHostnames", "publishNotReadyAddresses"):
        if network[field].value is False:
            rule = "not-ready-addresses" if field.startswith("publish") else "host-names"
            yield network[field].fault(rule, "ranks cannot find each other before they are ready", f"set {field}: true")


def _is_distributed(spec: Place) -> bool:
    """Whether the pods of a Job are ranks that look for each other."""
    return spec["completionMode"].value == "Indexed" or _hosts(spec["template"]["spec"]["containers"][0]) is not None


def _not_indexed(place: Place) -> Fault:
    return place.fault("completion-mode", "pods have no numbers, and so no ranks", "set completionMode: Indexed")


def _ranks_in_pods(spec: Place, prefix: str, subdomain: str | None) -> Iterator[Fault]:
    """What Indexed Jobs have in common, by whatever they are made."""
    ranks, pod = spec["completions"].value, spec["template"]["spec"]
    container = pod["containers"][0]
    alike = ranks == (spec["parallelism"].value or 1)
    if not alike:
        said = f"{spec['parallelism'].value or 1} pods at a time of {ranks}: ranks wait for those that cannot start"
        yield spec["parallelism"].fault("parallelism", said, f"set parallelism: {ranks}, the same as completions")
    yield from _host_name(spec.document.root, f"{prefix}{(ranks or 1) - 1}")
    yield from _deadline(spec["activeDeadlineSeconds"])
    if _gpus(pod) > 1:
        said = f"{_gpus(pod)} GPUs for one rank, which takes one"
        yield _gpu_place(container).fault("slots", said, "ask for one, and for as many completions as GPUs")
    if alike:
        yield from _host_list(container, ranks, prefix, subdomain)


def _host_list(container: Place, ranks: int, prefix: str, subdomain: str | None) -> Iterator[Fault]:
    listed = _hosts(container)
    if listed is None:
        if not any(item["name"].value == "TF_CONFIG" for item in container["env"]):
            yield container["env"].fault("hosts", "ranks do not know each other", "set DISTTRAIN_HOSTS in env")
        return
    hosts = (listed.value or "").split(",")
    if len(hosts) != ranks:
        yield listed.fault(
            "hosts", f"{len(hosts)} addresses for {ranks} ranks", "list host:port of every rank, in order"
        )
        return
    for rank, host in enumerate(hosts):
        expected = f"{prefix}{rank}.{subdomain}"
        name, _, port = host.partition(":")
        if not port.isdecimal() or (subdomain and name != expected and not name.startswith(f"{expected}.")):
            yield listed.fault("hosts", f"rank {rank} is at {expected}, not {host}", f"write {expected}:2222")
            return


def _hosts(container: Place) -> Place | None:
    """Where DISTTRAIN_HOSTS has its value."""
    return next((item["value"] for item in container["env"] if item["name"].value == "DISTTRAIN_HOSTS"), None)


def _service(service: Place, job: str) -> Iterator[Fault]:
    if service["publishNotReadyAddresses"].value is not True:
        said = "pods get their names when they are ready, and ranks look for each other before"
        yield service["publishNotReadyAddresses"].fault(
            "not-ready-addresses", said, "set publishNotReadyAddresses: true"
        )
    if service["clusterIP"].value != "None":
        said = "one address for all pods, not a name for each"
        yield service["clusterIP"].fault("headless", said, "set clusterIP: None")
    if any(str(label.key).endswith("job-name") and label.value != job for label in service["selector"]):
        yield service["selector"].fault(
            "selector", f"the Service selects no pod of Job {job}", f"select job-name: {job}"
        )


# Kubeflow Trainer -------------------------------------------------------------------------------------------------------


def _runtime(root: Place) -> Iterator[Fault]:
    mpi, jobset = root["spec"]["mlPolicy"]["mpi"], root["spec"]["template"]["spec"]
    jobs = {job["name"].value: job for job in jobset["replicatedJobs"]}
    for job in jobs.values():
        pod = job["template"]["spec"]["template"]["spec"]
        yield from _restart_policy(pod["restartPolicy"])
        yield from _pod(pod)
    if mpi.value is None:
        return
    for name in ("launcher", "node"):
        if name not in jobs:
            said = f"there is no job {name!r} (here: {', '.join(jobs)}), and the Trainer looks for it by that name"
            yield jobset["replicatedJobs"].fault("role-name", said, f"name a replicated job {name}")
            return
    launcher, node = jobs["launcher"], jobs["node"]
    for job in (launcher, node):
        container = job["template"]["spec"]["template"]["spec"]["containers"][0]
        if container["name"].value != "node":
            said = f"a container {container['name'].value!r} gets no ssh keys and no host file"
            yield container["name"].fault("container-name", said, "name it node")
    for field in (launcher["replicas"], launcher["template"]["spec"]["parallelism"]):
        if field.value not in (None, 1):
            yield field.fault(
                "launcher-replicas", f"{field.value} launchers", "set it to 1; one launcher starts all ranks"
            )
    labels = launcher["template"]["metadata"]["labels"]
    if labels[_ANCESTOR].value != "trainer":
        yield labels[_ANCESTOR].fault(
            "ancestor", "the TrainJob's args do not reach the launcher", f"label it {_ANCESTOR}: trainer"
        )
    if "launcher" not in (jobset["successPolicy"]["targetReplicatedJobs"].value or ()):
        said = "the job waits for the nodes' sshd, which never ends"
        yield jobset["successPolicy"].fault("success-policy", said, "set targetReplicatedJobs: [launcher]")
    if jobset["network"]["publishNotReadyAddresses"].value is False:
        place = jobset["network"]["publishNotReadyAddresses"]
        yield place.fault("not-ready-addresses", "the launcher cannot find nodes", "set publishNotReadyAddresses: true")
    launcher, node = launcher["template"]["spec"], node["template"]["spec"]
    yield from _ssh_mount(mpi["sshAuthMountPath"], launcher, node)
    if any(item["status"].value == "Ready" for item in jobs["launcher"]["dependsOn"]):
        yield from _readiness(node["template"]["spec"])
    if not mpi["runLauncherAsNode"].value:
        yield from _small(launcher["template"]["spec"])
    yield from _slots(mpi["numProcPerNode"], mpi["numProcPerNode"].value or 1, node["template"]["spec"])
    container = launcher["template"]["spec"]["containers"][0]
    yield from _entry_point(container["command"])
    line = Words.of(container["command"], container["args"])
    yield from words.lost_variables(container, node["template"]["spec"]["containers"][0], line)


def _trainjob(root: Place, others: list[Document]) -> Iterator[Fault]:
    spec, trainer = root["spec"], root["spec"]["trainer"]
    runtime = _runtime_of(spec["runtimeRef"], others)
    reference = spec["runtimeRef"]["kind"]
    if runtime and runtime.document.kind != (reference.value or "ClusterTrainingRuntime"):
        said = f"{runtime.document.name} is a {runtime.document.kind}, and this looks for a ClusterTrainingRuntime"
        yield reference.fault("runtime-kind", said, f"set kind: {runtime.document.kind}")
    yield from _deadline(spec["activeDeadlineSeconds"])
    yield from _limits(trainer["resourcesPerNode"])
    policy = runtime["spec"]["mlPolicy"] if runtime else Place(Document("", {}), ())
    if runtime and policy["mpi"].value is None:
        return
    nodes = trainer["numNodes"].value or policy["numNodes"].value or 1
    slots = trainer["numProcPerNode"].value or policy["mpi"]["numProcPerNode"].value or 1
    yield from _host_name(root, f"{root.document.name}-node-0-{nodes - 1}")
    # What the runtime itself says of its nodes is looked at there.
    own = trainer["numProcPerNode"].value not in (None, policy["mpi"]["numProcPerNode"].value)
    gpus = _count(trainer["resourcesPerNode"]) or (_gpus(_node_pod(runtime)) if runtime and own else 0)
    uneven = gpus not in (0, slots)
    if uneven:
        said = f"{slots} ranks on each node with {gpus} GPUs"
        yield trainer["numProcPerNode"].fault("slots", said, f"set numProcPerNode: {gpus}; a rank takes one GPU")
    yield from _entry_point(trainer["command"])
    line = Words.of(trainer["command"], trainer["args"])
    yield from _launch(line, trainer, None if uneven else nodes * slots, slots)
    yield from words.not_passed(trainer, line)


def _runtime_of(reference: Place, others: list[Document]) -> Place | None:
    kinds = ("TrainingRuntime", "ClusterTrainingRuntime")
    found = (o.root for o in others if o.sound and o.kind in kinds and o.name == reference["name"].value)
    return next(found, None)


def _node_pod(runtime: Place) -> Place:
    jobs = list(runtime["spec"]["template"]["spec"]["replicatedJobs"])
    job = next((job for job in jobs if job["name"].value == "node"), jobs[0])
    return job["template"]["spec"]["template"]["spec"]


# What starts ranks over ssh ---------------------------------------------------------------------------------------------


def _launch(line: Words, container: Place, ranks: int | None, slots: int) -> Iterator[Fault]:
    """`ranks`: how many there should be; None: not known."""
    if not line.starts_ranks:
        return
    yield from line.relative_programs()
    set_here = any(item["name"].value == "PRTE_MCA_prte_default_hostfile" for item in container["env"])
    if not set_here and not line.has(*words.HOST_FILE, *words.HOSTS, *words.DISCOVERY):
        said = "no host file, and Open MPI 5 does not see the operator's: every rank would run on the launcher"
        yield line.words[0][1].fault("hostfile", said, "add --hostfile /etc/mpi/hostfile")
    number = line.number_of_ranks
    if number and ranks and number[0] != ranks:
        yield number[1].fault("ranks", f"-np {number[0]}, and the workers have {ranks} slots", f"write -np {ranks}")
    most = line.option("--max-np")
    if most and ranks and most[0] != str(ranks):
        yield most[1].fault(
            "ranks", f"--max-np {most[0]}, and the workers have {ranks} slots", f"write --max-np {ranks}"
        )
    if line.has(*words.DISCOVERY) and not line.has("--slots-per-host") and slots > 1:
        place = line.option(*words.DISCOVERY)[1]
        said = f"discover_hosts.sh prints names without slots: one rank on each worker, not {slots}"
        yield place.fault("discovery-slots", said, f"add --slots-per-host {slots}")


def _entry_point(command: Place) -> Iterator[Fault]:
    if command.value and not command.value[0].endswith("entrypoint.sh"):
        said = "command: takes the place of the image's entry point, which waits until workers can be reached by name"
        yield command.fault("entry-point", said, "write args: instead")


def _first_container(pod: Place) -> Iterator[Fault]:
    for container in list(pod["containers"])[1:]:
        if Words.of(container["command"], container["args"]).starts_ranks:
            said = "the operator gives ssh keys and host file to the first container only"
            yield container.fault("first-container", said, "put this container first")


def _ssh_mount(mount: Place, *roles: Place) -> Iterator[Fault]:
    folder = mount.value or "/root/.ssh"
    users = {_user(role["template"]["spec"]) for role in roles} - {None}
    if users - {0} and folder.startswith("/root"):
        said = f"the ssh keys are in {folder}, closed to user {max(users)}"
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


def _readiness(pod: Place) -> Iterator[Fault]:
    if pod["containers"][0]["readinessProbe"].value is None:
        said = "without a probe a worker counts as ready before its sshd answers"
        yield pod["containers"][0].fault("readiness", said, "add readinessProbe: {tcpSocket: {port: 2222}}")


def _small(pod: Place) -> Iterator[Fault]:
    """The launcher beside workers that take all they can get."""
    container = pod["containers"][0]
    resources = container["resources"]
    cores = resources["requests"]["cpu"].value
    if _gpus(pod):
        said = "a launcher computes nothing, and would hold a GPU"
        yield _gpu_place(container).fault("launcher-resources", said, "take the GPUs out")
    elif resources["requests"].value is None and resources["limits"].value is None:
        said = "a launcher that requests nothing is the first to be evicted"
        yield resources.fault("launcher-resources", said, "add resources: {requests: {cpu: 250m, memory: 512Mi}}")
    elif cores is not None and _cores(cores) > _LARGE:
        said = f"{cores} cores for a launcher, which only waits: it may find no room beside the workers"
        yield resources["requests"]["cpu"].fault("launcher-resources", said, "request 250m")


def _cores(quantity: int | float | str) -> float:
    """Also GPUs. What is neither a number nor thousandths of one counts as none."""
    text = str(quantity)
    try:
        return float(text[:-1]) / 1000 if text.endswith("m") else float(text)
    except ValueError:
        return 0.0


# What all pods have in common -------------------------------------------------------------------------------------------


def _pod(pod: Place) -> Iterator[Fault]:
    volumes = {item["name"].value for item in pod["volumes"]}
    for container in [*pod["containers"], *pod["initContainers"]]:
        for mount in container["volumeMounts"]:
            if mount["name"].value not in volumes:
                said = f"there is no volume {mount['name'].value!r}"
                yield mount["name"].fault(
                    "mount-without-volume", said, "add it to the pod's volumes, or correct the name"
                )
        yield from _limits(container["resources"])


def _limits(resources: Place) -> Iterator[Fault]:
    names = {str(item.key) for part in ("requests", "limits") for item in resources[part] if _is_gpu(item)}
    for name in sorted(names):
        request, limit = resources["requests"][name], resources["limits"][name]
        if limit.value is None:
            yield request.fault(
                "gpu-limit", f"{name} is requested without a limit", f"add limits: {{{name}: {request.value}}}"
            )
        elif request.value is not None and str(request.value) != str(limit.value):
            said = f"{request.value} requested, and the limit is {limit.value}: for {name} they have to be the same"
            yield request.fault("gpu-limit", said, f"write {limit.value} in both")


def _is_gpu(item: Place) -> bool:
    return str(item.key).endswith("/gpu")


def _count(resources: Place) -> int:
    return sum(int(_cores(item.value)) for item in resources["limits"] if _is_gpu(item))


def _gpus(pod: Place) -> int:
    return _count(pod["containers"][0]["resources"])


def _gpu_place(container: Place) -> Place:
    return next(item for item in container["resources"]["limits"] if _is_gpu(item))


def _slots(place: Place, slots: int, pod: Place) -> Iterator[Fault]:
    gpus = _gpus(pod)
    if gpus and slots != gpus:
        yield place.fault(
            "slots", f"{slots} ranks on each worker with {gpus} GPUs", f"set it to {gpus}; a rank takes one GPU"
        )


def _restart_policy(policy: Place, needed: bool = False) -> Iterator[Fault]:
    if policy.value in ("Never", "OnFailure") or (policy.value is None and not needed):
        return
    said = f"{policy.value or 'Always, the default,'} does not work for a job"
    yield policy.fault("restart-policy", said, "set restartPolicy: Never, or OnFailure")


def _deadline(seconds: Place) -> Iterator[Fault]:
    if seconds.value is None:
        said = "a job of which a pod finds no room would wait, and hold what its other pods have, for ever"
        yield seconds.fault("deadline", said, "set activeDeadlineSeconds")


def _host_name(root: Place, longest: str) -> Iterator[Fault]:
    if len(longest) > _HOST_NAME:
        said = f"the host name {longest} has {len(longest)} characters, and {_HOST_NAME} are possible"
        yield root["metadata"]["name"].fault("host-name", said, f"shorten the name by {len(longest) - _HOST_NAME}")
