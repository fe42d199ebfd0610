"""Manifests from a handful of options, with the reasons in comments. The text is in `templates/`."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, fields

import jinja2

from disttrain.errors import ConfigError
from disttrain.launcher.kubernetes import KINDS
from disttrain.launcher.kubernetes.words import TRAVELS

HOME = "/opt/disttrain/bin"  # where the image has its interpreter
PORT = 2222  # of the image's sshd; of the first worker's gRPC server, too
_MPI = ("mpijob", "trainjob")  # one launcher, ranks over ssh; the others have one rank in each pod
_WIDTH = 124  # of lines
_LABEL = 63  # characters in a host name, a label's value and the name of a Service

_environment = jinja2.Environment(
    loader=jinja2.PackageLoader("disttrain.launcher.kubernetes"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,
)


@dataclass(frozen=True)
class Options:
    """What people say about a job. See `disttrain k8s render --help`.

    Raises:
      ConfigError: a name that Kubernetes does not take, numbers that do not fit together, or an option that the kind
        has no use for.
    """

    kind: str
    name: str = "disttrain"
    workers: int = 2
    gpus: int = 0
    slots: int | None = None
    elastic: int | None = None
    image: str = "disttrain:0.1"
    namespace: str | None = None
    queue: str | None = None
    volcano: bool = False
    claim: str = "checkpoints"
    storage: str = "10Gi"
    cpus: str | None = None
    memory: str | None = None
    hours: int = 24
    restarts: int = 3
    env: tuple[str, ...] = ()
    command: tuple[str, ...] = ()

    def __post_init__(self):
        _check_names(self)
        _check_numbers(self)
        _check_kind(self)

    @property
    def ranks_per_worker(self) -> int:
        """As said, or one for each GPU, or one."""
        return self.slots or self.gpus or 1

    @property
    def ranks(self) -> int:
        return self.workers * self.ranks_per_worker

    @property
    def cpus_per_worker(self) -> str:
        return self.cpus or str((4 if self.gpus else 2) * self.ranks_per_worker)

    @property
    def memory_per_worker(self) -> str:
        return self.memory or f"{(16 if self.gpus else 4) * self.ranks_per_worker}Gi"

    @property
    def hosts(self) -> list[str]:
        """host:port of every rank, in their order, where each pod is a rank. `disttrain` reads these as DISTTRAIN_HOSTS."""
        between = "-workers-0" if self.kind == "jobset" else ""
        return [f"{self.name}{between}-{rank}.{self.name}:{PORT}" for rank in range(self.workers)]

    @property
    def launcher(self) -> list[str]:
        """What starts the ranks, up to what each of them runs."""
        slots, run = self.ranks_per_worker, [f"{HOME}/disttrain", "run", "-np", str(self.ranks)]
        # What `disttrain run` hands to ranks by itself has one of its known prefixes.
        run += [word for name in self.environment if not TRAVELS.fullmatch(name) for word in ("-x", name)]
        if not self.elastic:
            return [*run, "--hostfile", "/etc/mpi/hostfile"]
        run += ["--min-np", str(self.elastic * slots), "--max-np", str(self.ranks)]
        # The operator's script prints names alone.
        return [*run, "--host-discovery-script", "/etc/mpi/discover_hosts.sh", "--slots-per-host", str(slots)]

    @property
    def rank_environment(self) -> dict[str, str]:
        """`environment`, and what the launcher's entry point needs to know; not empty."""
        fewest = {"DISTTRAIN_WAIT_HOSTS": str(self.elastic)} if self.elastic else {}
        return {"TF_CPP_MIN_LOG_LEVEL": "1"} | fewest | self.environment

    @property
    def environment(self) -> dict[str, str]:
        """The ranks' variables by name."""
        return dict(item.split("=", 1) for item in self.env)

    @property
    def training(self) -> list[str]:
        """What each rank runs. The interpreter's path is absolute: a shell started by ssh has not the image's PATH."""
        command = self.command or (
            "disttrain",
            "train",
            "digits",
            "--resume",
            "auto",
            "--out",
            f"/checkpoints/{self.name}",
        )
        program = command[0]
        if re.fullmatch(r"disttrain|python3?", program):
            program = f"{HOME}/{program}"
        if not program.startswith("/"):
            raise ConfigError(
                f"{program!r}: ranks are started over ssh, where PATH is not the image's. Give the program's absolute path, "
                "or begin the command with python or disttrain"
            )
        return [program, *command[1:]]


def render(options: Options) -> str:
    """The manifest, in YAML; its first line is the command that makes it again."""
    template = _environment.get_template(f"{options.kind}.yaml.j2")
    text = template.render(o=options, port=PORT, command_line=command_line(options))
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines() if line.strip())  # parts that were left out


def command_line(options: Options) -> str:
    """The shortest `disttrain k8s render …` for these options."""
    words = ["disttrain", "k8s", "render"]
    for field in fields(options):
        value = getattr(options, field.name)
        if value == field.default or field.name == "command":
            continue
        for item in value if field.name == "env" else (value,):
            words += [f"--{field.name}"] if item is True else [f"--{field.name}", str(item)]
    return shlex.join([*words, *(["--", *options.command] if options.command else [])])


# Checks -----------------------------------------------------------------------------------------------------------------

_NAME = "lower-case letters, digits and '-', a letter first, a letter or a digit last"
_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")


def _check_names(o: Options) -> None:
    for option in ("name", "namespace", "claim", "queue"):
        value = getattr(o, option)
        if value is None:
            continue
        if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", value):
            raise ConfigError(f"--{option} {value!r}: Kubernetes wants {_NAME}")
        if len(value) > _LABEL:
            raise ConfigError(f"--{option} {value!r} has {len(value)} characters, and Kubernetes takes {_LABEL}")
    if not re.fullmatch(r"[a-zA-Z0-9][\w./:@-]*", o.image):
        raise ConfigError(f"--image {o.image!r} is not the name of an image, such as disttrain:0.1")
    for option in ("storage", "cpus", "memory"):
        value = getattr(o, option)
        if value is not None and not _QUANTITY.fullmatch(value):
            raise ConfigError(f"--{option} {value!r} is not a quantity, such as 4, 500m or 16Gi")
    for item in o.env:
        if not re.fullmatch(r"[A-Za-z_]\w*=.*", item):
            raise ConfigError(f"--env {item!r}: say NAME=VALUE")
    for word in (*o.command, *o.env):
        if not word.isprintable():
            raise ConfigError(f"{word!r} has a line break or another control character in it; put it into a script")


def _check_numbers(o: Options) -> None:
    least = {"workers": 1, "gpus": 0, "slots": 1, "elastic": 1, "hours": 1, "restarts": 0}
    for option, limit in least.items():
        value = getattr(o, option)
        if value is not None and value < limit:
            raise ConfigError(f"--{option} {value}: at least {limit}")
    if o.gpus and o.slots not in (None, o.gpus):
        raise ConfigError(f"--slots {o.slots} with --gpus {o.gpus}: each rank takes one GPU; leave --slots out")
    if o.elastic and o.elastic > o.workers:
        raise ConfigError(
            f"--elastic {o.elastic} is more than --workers {o.workers}: it is the fewest workers to go on with"
        )


def _check_kind(o: Options) -> None:
    if o.kind not in KINDS:
        raise ConfigError(f"--kind {o.kind!r}: use one of {', '.join(KINDS)}")
    if o.elastic and o.kind != "mpijob":
        raise ConfigError(
            f"--elastic: the MPI Operator alone tells which workers there are; use --kind mpijob, not {o.kind}"
        )
    if o.volcano and o.kind not in _MPI:
        raise ConfigError(
            f"--volcano: of a {o.kind} Volcano makes no gang; use Kueue (--queue alone), or --kind mpijob"
        )
    if o.kind in ("indexed-job", "jobset") and o.ranks_per_worker > 1:
        raise ConfigError(
            f"{o.ranks_per_worker} ranks on each worker: a pod of a {o.kind} is one rank with at most one GPU. "
            f"Use --workers {o.ranks} --gpus {min(o.gpus, 1)}, or --kind mpijob"
        )
    longest = longest_host(o.kind, o.name, o.workers)
    if len(longest) > _LABEL:
        raise ConfigError(
            f"--name {o.name!r} is too long: the host name {longest!r} has {len(longest)} characters, "
            f"and a host name takes {_LABEL}"
        )


def longest_host(kind: str, name: str, workers: int) -> str:
    """The last pod's host name, as the kind's controller makes it."""
    between = {"mpijob": "-worker", "trainjob": "-node-0", "jobset": "-workers-0", "indexed-job": "", "pvc": ""}[kind]
    return f"{name}{between}-{workers - 1}"


# Filters ----------------------------------------------------------------------------------------------------------------


def _scalar(value: str) -> str:
    """The string in YAML: bare where nothing but a string can be meant, else between quotes."""
    plain = re.fullmatch(r"(?!-*\.?[0-9])[A-Za-z/.-][\w/.=+@-]*", value) and value not in ("-", "---", ".", "~")
    words = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}
    return value if plain and value.lower() not in words else json.dumps(value, ensure_ascii=False)


def _flow(words: list[str], indent: int = 0) -> str:
    """The items of a list in brackets, on as many lines as they need, all but the first indented."""
    lines = [""]
    for word in words:
        item = f"{_scalar(word)}, "
        if lines[-1] and indent + len(lines[-1]) + len(item) > _WIDTH:
            lines.append("")
        lines[-1] += item
    return f"\n{' ' * indent}".join(line.rstrip() for line in lines).removesuffix(",")


_environment.filters |= {"scalar": _scalar, "flow": _flow}
