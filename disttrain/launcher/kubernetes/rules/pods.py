"""What all pods have in common."""

from __future__ import annotations

from collections.abc import Iterator

from disttrain.launcher.kubernetes.places import Fault, Place

_HOST_NAME = 63  # characters


def pod(pod: Place) -> Iterator[Fault]:
    volumes = {item["name"].value for item in pod["volumes"]}
    for container in [*pod["containers"], *pod["initContainers"]]:
        for mount in container["volumeMounts"]:
            if mount["name"].value not in volumes:
                said = f"there is no volume {mount['name'].value!r}"
                yield mount["name"].fault(
                    "mount-without-volume", said, "add it to the pod's volumes, or correct the name"
                )
        yield from limits(container["resources"])


def limits(resources: Place) -> Iterator[Fault]:
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


def restart_policy(policy: Place, needed: bool = False) -> Iterator[Fault]:
    if policy.value in ("Never", "OnFailure") or (policy.value is None and not needed):
        return
    said = f"{policy.value or 'Always, the default,'} does not work for a job"
    yield policy.fault("restart-policy", said, "set restartPolicy: Never, or OnFailure")


def deadline(seconds: Place) -> Iterator[Fault]:
    if seconds.value is None:
        said = "a job of which a pod finds no room would wait, and hold what its other pods have, for ever"
        yield seconds.fault("deadline", said, "set activeDeadlineSeconds")


def host_name(root: Place, longest: str) -> Iterator[Fault]:
    if len(longest) > _HOST_NAME:
        said = f"the host name {longest} has {len(longest)} characters, and {_HOST_NAME} are possible"
        yield root["metadata"]["name"].fault("host-name", said, f"shorten the name by {len(longest) - _HOST_NAME}")


def gpus(pod: Place) -> int:
    return count(pod["containers"][0]["resources"])


def count(resources: Place) -> int:
    return sum(int(cores(item.value)) for item in resources["limits"] if _is_gpu(item))


def gpu_place(container: Place) -> Place:
    return next(item for item in container["resources"]["limits"] if _is_gpu(item))


def _is_gpu(item: Place) -> bool:
    return str(item.key).endswith("/gpu")


def cores(quantity: int | float | str) -> float:
    """Also GPUs. What is neither a number nor thousandths of one counts as none."""
    text = str(quantity)
    try:
        return float(text[:-1]) / 1000 if text.endswith("m") else float(text)
    except ValueError:
        return 0.0
