"""Pods that are ranks by their number: Indexed Job with its Service, and JobSet."""

from __future__ import annotations

from collections.abc import Iterator

from disttrain.launcher.kubernetes.places import Document, Fault, Place
from disttrain.launcher.kubernetes.rules import pods


def job(root: Place, others: list[Document]) -> Iterator[Fault]:
    spec, name = root["spec"], root.document.name
    pod = spec["template"]["spec"]
    yield from pods.restart_policy(pod["restartPolicy"], needed=True)
    yield from pods.pod(pod)
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


def jobset(root: Place) -> Iterator[Fault]:
    network, name = root["spec"]["network"], root.document.name
    for job in root["spec"]["replicatedJobs"]:
        spec = job["template"]["spec"]
        yield from pods.restart_policy(spec["template"]["spec"]["restartPolicy"])
        yield from pods.pod(spec["template"]["spec"])
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
    """Whether the pods of a Job are ranks that look for each other; an Indexed Job may also share out other work."""
    pod = spec["template"]["spec"]
    named = spec["completionMode"].value == "Indexed" and pod["subdomain"].value is not None
    return named or _hosts(pod["containers"][0]) is not None


def _not_indexed(place: Place) -> Fault:
    return place.fault("completion-mode", "pods have no numbers, and so no ranks", "set completionMode: Indexed")


def _ranks_in_pods(spec: Place, prefix: str, subdomain: str | None) -> Iterator[Fault]:
    """What Indexed Jobs have in common, by whatever they are made."""
    ranks, pod = spec["completions"].value or 1, spec["template"]["spec"]
    container = pod["containers"][0]
    alike = ranks == (spec["parallelism"].value or 1)
    if not alike:
        said = f"{spec['parallelism'].value or 1} pods at a time of {ranks}: ranks wait for those that cannot start"
        yield spec["parallelism"].fault("parallelism", said, f"set parallelism: {ranks}, the same as completions")
    yield from pods.host_name(spec.document.root, f"{prefix}{ranks - 1}")
    yield from pods.deadline(spec["activeDeadlineSeconds"])
    if pods.gpus(pod) > 1:
        said = f"{pods.gpus(pod)} GPUs for one rank, which takes one"
        yield pods.gpu_place(container).fault("slots", said, "ask for one, and for as many completions as GPUs")
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
