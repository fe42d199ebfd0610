"""A process on another host, or on this one, that answers the doctor's requests until it is closed."""

from __future__ import annotations

import json
import queue
import subprocess
import tempfile
import threading
import time
from typing import Any

from disttrain.launcher.doctor.command import ProbeError, end, last_line, script
from disttrain.launcher.hosts import ssh_command

_START_SECONDS = 10.0
_ANSWER_SECONDS = 10.0

# What ssh says -> what to do about it.
_MENDS = {
    "Could not resolve": "correct the name, or add it to DNS or /etc/hosts",
    "Permission denied": "let a key of yours in: ssh-copy-id {host} (key without a passphrase, or ssh-agent)",
    "Host key verification failed": "ssh-keyscan {host} >> ~/.ssh/known_hosts, if you trust it",
    "Connection refused": "start sshd on {host}, or name its port in ~/.ssh/config",
    "timed out": "is {host} up, and its ssh port open to this host?",
    "No route to host": "is {host} up and in a network that this host reaches?",
    "not found": "install the same Python at the same path on {host}",
    "No such file": "install the same Python at the same path on {host}",
}


class Agent:
    """`inside/agent.py` on a host, its functions called by name.

    Raises:
      ProbeError: it cannot be started there, with what ssh said.
    """

    def __init__(self, host: str, local: bool):
        self.host, self.local = host, local
        command = script("agent")
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115, closed in `close`
        try:
            self._process = subprocess.Popen(
                command if local else ssh_command(host, *command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            raise ProbeError(f"ssh cannot be run: {error.strerror}", "apt-get install openssh-client") from None
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._calls = 0
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.call("clock", seconds=_START_SECONDS)
        except ProbeError:
            self.close()
            raise

    def call(self, name: str, *arguments: Any, seconds: float = _ANSWER_SECONDS) -> Any:
        """Calls a function of the agent.

        Raises:
          ProbeError: it raised, or the host did not answer in time.
        """
        self._calls += 1
        try:
            self._process.stdin.write(json.dumps([self._calls, name, *arguments]) + "\n")
            self._process.stdin.flush()
            answer = self._answer(seconds)
        except BrokenPipeError:
            answer = None
        except queue.Empty:
            raise ProbeError(
                f"{self.host} did not answer within {seconds:g} s", f"is {self.host} up and not overloaded?"
            ) from None
        if answer is None:
            raise self._why()
        if "error" in answer:
            raise ProbeError(f"{self.host}: {answer['error']}")
        return answer["answer"]

    def skew(self) -> tuple[float, float]:
        """By how many seconds its clock is ahead of this one's, and how far that may be off: half of the quickest answer."""
        measured = []
        for _ in range(5):
            begun = time.time()
            theirs = self.call("clock")
            over = time.time()
            measured.append(((over - begun) / 2, theirs - (begun + over) / 2))
        off, skew = min(measured)
        return skew, off

    def close(self) -> None:
        """Lets it end: its input is closed."""
        try:
            self._process.stdin.close()
            self._process.wait(1.0)
        except (OSError, subprocess.TimeoutExpired):
            pass
        end(self._process)
        self._process.stdout.close()
        self._errors.close()

    def _answer(self, seconds: float) -> dict | None:
        """The answer to the last call; those to calls that were given up may still come before it."""
        until = time.monotonic() + seconds
        while line := self._answers.get(timeout=max(0.0, until - time.monotonic())):
            answer = json.loads(line)
            if answer["call"] == self._calls:
                return answer
        return None

    def _read(self) -> None:
        """Lines that are not answers are the greetings of somebody's shell."""
        for line in self._process.stdout:
            if line.startswith("doctor "):
                self._answers.put(line.removeprefix("doctor "))
        self._answers.put(None)

    def _why(self) -> ProbeError:
        end(self._process)
        self._errors.seek(0)
        said = last_line(self._errors.read()) or f"the connection ended ({self._process.returncode})"
        mend = next((mend for words, mend in _MENDS.items() if words in said), "try it by hand: ssh {host} true")
        return ProbeError(said, mend.format(host=self.host))
