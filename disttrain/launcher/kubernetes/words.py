"""What a container runs, word by word, and what of it the lint needs to know."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from disttrain.launcher.kubernetes.places import Fault, Place

HOST_FILE = ("--hostfile", "-hostfile", "--machinefile", "-machinefile")
HOSTS = ("-H", "--host", "-host", "--hosts")
DISCOVERY = ("--host-discovery-script",)
_NUMBER = ("-np", "--np", "-n", "-c")
_SHELLS = ("sh", "bash")
_MPIRUN = ("mpirun", "mpiexec", "prterun")
_INTERPRETER = re.compile(r"python[0-9.]*")
# What the operator's sshd, the entry point and the container runtime read by themselves; ranks need none of it.
NOT_FOR_RANKS = re.compile(r"(DISTTRAIN_(WAIT|SSH|HOSTFILE)|OMPI_|PRTE_|PMIX_|NVIDIA_)\w*|PATH|HOME|USER")
# What `disttrain run` hands to ranks without being told.
TRAVELS = re.compile(r"(NCCL_|TF_|HOROVOD_|KERAS_|XLA_|CUDA_|OMP_|DISTTRAIN_|PYTHON)\w*")


@dataclass(frozen=True)
class Words:
    """A command line in a manifest: its words, each with the place that it stands in."""

    words: list[tuple[str, Place]]

    @classmethod
    def of(cls, *lists: Place) -> Words:
        """Of `command` and `args`. What a shell is given by -c is taken apart."""
        words = [(item.value, item) for place in lists for item in place]
        texts = [text for text, _ in words]
        if len(words) > 2 and texts[0].rpartition("/")[2] in _SHELLS and re.fullmatch(r"-\w*c", texts[1]):
            script, place = words[2]
            words = [(word, place) for word in _split(script)]
        return cls(words)

    @property
    def program(self) -> str:
        """Without its folder; "disttrain run" counts as one."""
        names = [text.rpartition("/")[2] for text, _ in self.words[:4]]
        if names and _INTERPRETER.fullmatch(names[0]) and names[1:3] == ["-m", "disttrain"]:
            names = names[2:]
        return " ".join(names[:2]) if names[:2] == ["disttrain", "run"] else names[0] if names else ""

    @property
    def starts_ranks(self) -> bool:
        return self.program in ("disttrain run", "horovodrun", *_MPIRUN)

    @property
    def is_bare_mpirun(self) -> bool:
        return self.program in _MPIRUN

    def number(self, name: str) -> tuple[int, Place] | None:
        """The value of an option that takes a number, such as -np, and where it stands."""
        found = self.option(*(_NUMBER if name in _NUMBER else (name,)))
        return (int(found[0]), found[1]) if found and found[0].isdecimal() else None

    def has(self, *names: str) -> bool:
        return self.option(*names) is not None

    def option(self, *names: str) -> tuple[str, Place] | None:
        """The launcher's option of one of these names: its value, and where that stands."""
        own = self._own()
        for index, (text, place) in enumerate(own):
            name, equals, value = text.partition("=")
            if name in names:
                return (value, place) if equals else own[index + 1] if index + 1 < len(own) else ("", place)
        return None

    def passed(self) -> set[str]:
        """The variables that the launcher hands to ranks by -x."""
        own = self._own()
        return {own[i + 1][0].partition("=")[0] for i, (text, _) in enumerate(own[:-1]) if text == "-x"}

    def relative_programs(self) -> Iterator[Fault]:
        """Programs that are to be looked for on PATH: the launcher, and what ranks run."""
        starts = [0, *(i + 1 for i, (text, _) in enumerate(self.words) if text == "--")][:2]
        for index, (text, place) in enumerate(self.words):
            if text.startswith("/") or not (index in starts or _INTERPRETER.fullmatch(text)):
                continue
            yield place.fault(
                "absolute-path",
                f"{text!r} is looked for on PATH, and over ssh PATH is not the image's",
                f"give its absolute path, such as /opt/disttrain/bin/{text.rpartition('/')[2]}",
            )

    def _own(self) -> list[tuple[str, Place]]:
        """Up to what the ranks run, where a -- says where that begins."""
        texts = [text for text, _ in self.words]
        return self.words[: texts.index("--")] if "--" in texts else self.words


def _split(script: str) -> list[str]:
    try:
        return [word for word in shlex.split(script, comments=True) if word != "exec"]
    except ValueError:
        return script.split()
