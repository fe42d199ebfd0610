"""Starts a job, watches every rank, and says how it has ended and whose fault that was."""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from disttrain.errors import EXIT_FOLLOWED, EXIT_RESUME
from disttrain.interfaces import interfaces
from disttrain.launcher.agent import ADDRESS, TOKEN
from disttrain.launcher.command import Job, commands
from disttrain.launcher.facts import differences, facts
from disttrain.launcher.line import BEAT_SECONDS, LOST_SECONDS, Line
from disttrain.world import WORLD_SIZE

# How many of a rank's last lines are kept, to be shown if it fails.
_KEPT = 20
# After a rank has failed, the others may take so long to say what they know of it.
_AFTERTHOUGHT_SECONDS = 6.0
# After that, or after a signal, ranks are asked to end, and are killed so much later.
_KILL_SECONDS = 5.0
_LEAVING_SECONDS = 5.0
_INTERRUPTED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Outcome(NamedTuple):
    """How an attempt has ended.

    Attributes:
      code: 0 if every rank came to its end and rank 0 said so in this attempt; else what to exit with.
      reason: a sentence that names rank and host; empty if all went well.
      lines: the last lines of the rank that the reason names.
      interrupted: a signal to the launcher was the reason: not to be started again.
      hosts: names of the hosts on which ranks ran.
      ranks: how many there were at the end.
    """

    code: int
    reason: str
    lines: list[str]
    interrupted: bool
    hosts: list[str]
    ranks: int


class Show(Protocol):
    """Who is told what ranks say while the job runs."""

    def output(self, rank: int, stream: str, text: str) -> None:
        """A line of "stdout" or "stderr"."""

    def progress(self, rank: int, text: str) -> None:
        """JSON, as `disttrain.observe.progress` writes it."""

    def note(self, text: str) -> None:
        """What the launcher itself has to say."""


class Rank:
    """What is known of one rank."""

    def __init__(self, line: Line, hello: dict[str, Any]):
        self.line, self.hello = line, hello
        self.rank, self.host = hello["rank"], hello["host"]
        self.code: int | None = None
        self.lost = False
        self.lines: deque[str] = deque(maxlen=_KEPT)

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"

    @property
    def over(self) -> bool:
        return self.lost or self.code is not None

    def send(self, kind: str, **message: Any) -> None:
        with contextlib.suppress(OSError):
            self.line.send(kind, **message)


class Supervisor:
    """Of a job that is whole or nothing: a rank that fails ends it. See `attempt` for the arguments."""

    def __init__(
        self,
        job: Job,
        number: int,
        show: Show,
        start_seconds: float,
        grace_seconds: float,
        resize: Callable[[], bool],
    ):
        self._job, self._number, self._show, self._grace = job, number, show, grace_seconds
        self._resize, self._resized = resize, False
        self._ranks: dict[int, Rank] = {}
        self._failure: tuple[int, str, Rank | None] | None = None
        self._interrupted, self._signals_taken = False, 0
        self._start_until = time.monotonic() + start_seconds
        self._stop_at = self._over_at = float("inf")
        self._went, self._looked = False, time.monotonic()
        self._said_by_launcher: deque[str] = deque(maxlen=_KEPT)
        self._token = secrets.token_hex(16)
        self._selector = selectors.DefaultSelector()

    def run(self) -> Outcome:
        with self._selector, self._listening() as address, self._signals():
            processes = self._start(address)
            try:
                while not self._is_over(processes):
                    for key, _ in self._selector.select(BEAT_SECONDS / 2):
                        key.data()
                    self._look(processes)
            finally:
                self._clean_up(processes)
        return self._outcome()

    # Starting ----------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _listening(self):
        addresses = ["127.0.0.1"]
        if self._job.others or self._job.elastic or self._job.launcher == "srun":
            addresses = [x.address for x in interfaces() if not x.address.startswith("127.")] + addresses
        with socket.create_server(("" if len(addresses) > 1 else addresses[0], 0), backlog=1024) as server:
            self._selector.register(server, selectors.EVENT_READ, lambda: self._accept(server))
            yield f"{','.join(addresses)}:{server.getsockname()[1]}"

    def _start(self, address: str) -> list[subprocess.Popen]:
        environment = {ADDRESS: address, TOKEN: self._token} | self._world()
        processes = []
        for words, more in commands(self._job, environment):
            process = subprocess.Popen(
                words,
                env=os.environ | more,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._selector.register(process.stdout, selectors.EVENT_READ, self._launcher_reader(process))
            processes.append(process)
        return processes

    def _world(self) -> dict[str, str]:
        """What ranks are told to make sure of."""
        return {WORLD_SIZE: str(self._job.ranks)}

    def _launcher_reader(self, process: subprocess.Popen) -> Callable[[], None]:
        def read() -> None:
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                self._selector.unregister(process.stdout)
            self._said_by_launcher.extend(filter(None, data.decode(errors="replace").splitlines()))

        return read

    def _accept(self, server: socket.socket) -> None:
        connection, _ = server.accept()
        line = Line(connection)
        self._selector.register(line, selectors.EVENT_READ, lambda: self._hear_stranger(line))

    def _hear_stranger(self, line: Line) -> None:
        """The first message must be a rank's hello, with the secret of this attempt."""
        try:
            messages = line.read()
            if messages == []:  # a part of it
                return
            messages = messages or [{}]
            hello = messages[0] if secrets.compare_digest(messages[0].get("token", ""), self._token) else None
        except (OSError, ValueError, KeyError, TypeError):
            hello = None
        self._selector.unregister(line)
        if hello is None:
            line.close()
            return
        rank = Rank(line, hello)
        self._selector.register(line, selectors.EVENT_READ, lambda: self._hear(rank))
        self._welcome(rank)

    def _welcome(self, rank: Rank) -> None:
        size, other = rank.hello["size"], self._ranks.get(rank.rank)
        if size != self._job.ranks:
            self._fail(
                EXIT_FOLLOWED,
                f"{rank} was started as one of {size}, not of {self._job.ranks}: {self._job.launcher} does not see the hosts or "
                "slots that were asked for",
            )
        elif other:
            self._fail(EXIT_FOLLOWED, f"there are two of rank {rank.rank}, on {other.host} and on {rank.host}")
        different = differences(facts(), rank.hello["facts"], rank.host)
        if different:
            self._fail(EXIT_FOLLOWED, f"{'; '.join(different)}: install the same versions on all hosts")
        self._ranks[rank.rank] = rank
        if len(self._ranks) == self._job.ranks and not self._failure:
            self._check_hosts()
        if len(self._ranks) == self._job.ranks and not self._failure:
            self._went = True
            for each in self._ranks.values():
                each.send("go", environment={"DISTTRAIN_ATTEMPT": str(self._number)})

    def _check_hosts(self) -> None:
        """mpirun that cannot read its list of hosts starts everything here, and calls that a success."""
        wanted, slots = 0, 0
        for host in self._job.hosts:
            wanted += slots < self._job.ranks
            slots += host.slots
        found = sorted({rank.host for rank in self._ranks.values()})
        if self._job.hosts and len(found) != wanted:
            self._fail(
                EXIT_FOLLOWED,
                f"ranks run on {len(found)} hosts ({', '.join(found)}), and {wanted} were asked for "
                f"({', '.join(host.name for host in self._job.hosts)})",
            )

    # Watching ----------------------------------------------------------------------------------------------------------

    def _hear(self, rank: Rank) -> None:
        try:
            messages = rank.line.read()
        except (OSError, ValueError):
            messages = None
        for message in messages or ():
            if message["kind"] == "output":
                self._take_output(rank, message["stream"], message["text"])
            elif message["kind"] == "exit":
                self._take_exit(rank, message["code"])
            elif message["kind"] == "signal" and self._job.launcher == "srun":
                self._take_signal(message["number"])
        if messages is None:
            self._selector.unregister(rank.line)
            if not rank.over:
                self._lose(rank, "is gone: its host or what started it there was lost")

    def _take_output(self, rank: Rank, stream: str, text: str) -> None:
        if stream == "progress":
            self._show.progress(rank.rank, text)
            return
        rank.lines.append(text)
        self._show.output(rank.rank, stream, text)

    def _take_exit(self, rank: Rank, code: int) -> None:
        rank.code = code
        if code != 0:
            exit_code = code if code > 0 else 128 - code
            how = how_it_ended(code)
            if self._failure and self._failure[0] == EXIT_FOLLOWED and self._failure[2] and code != EXIT_FOLLOWED:
                self._failure = None  # that one only followed this one
            self._fail(exit_code, f"{rank} {how}", rank)

    def _take_signal(self, number: int) -> None:
        """Slurm signals ranks before their time is over; mpirun where one has failed, which says nothing new."""
        if self._failure and self._failure[2] and self._failure[2].code in (EXIT_RESUME, -number):
            self._failure = None  # it has heard of it sooner than this process
        if not self._failure:
            self._interrupted = True
            self._wind_up(128 + number, f"interrupted by {_name_of(number)} from Slurm", self._grace)

    def _lose(self, rank: Rank, how: str) -> None:
        rank.lost = True
        self._fail(EXIT_RESUME, f"{rank} {how}", rank)

    def _look(self, processes: list[subprocess.Popen]) -> None:
        """What no message tells: silence, and time that has passed."""
        now = time.monotonic()
        # This process itself may have stood still, before a reader that does not read: what it has heard is old.
        stood_still, self._looked = now - self._looked > LOST_SECONDS / 3, now
        for rank in self._ranks.values():
            if rank.over:
                continue
            if stood_still:
                rank.line.heard = now
            if rank.line.silent():
                self._lose(rank, f"has not answered for {LOST_SECONDS:g} s: its host is down, or the network is cut")
            else:
                with contextlib.suppress(OSError):
                    rank.line.beat()
        if not self._went and not self._failure:
            self._look_at_start(processes, now)
        elif all(process.poll() is not None for process in processes) and any(not r.over for r in self._ranks.values()):
            missing = [str(rank) for rank in self._ranks.values() if not rank.over]
            self._fail(
                EXIT_RESUME, f"{self._job.launcher} has ended before {', '.join(missing)}: {self._launchers_words()}"
            )
        if self._went and not self._failure and self._resize():
            self._resized = True
            self._tell_all(signal.SIGTERM)
            self._wind_up(EXIT_RESUME, "there is room for more ranks", self._grace)
        if self._failure and now > self._stop_at:
            self._stop_at = float("inf")
            self._stop(_KILL_SECONDS)

    def _look_at_start(self, processes: list[subprocess.Popen], now: float) -> None:
        missing = sorted(set(range(self._job.ranks)) - set(self._ranks))
        ended = [process.returncode for process in processes if process.poll() is not None]
        if ended and not self._interrupted:
            self._fail(
                next(filter(None, map(abs, ended)), EXIT_RESUME),
                f"{self._job.launcher} ended with {ended[0]} before all ranks were there: {self._launchers_words()}",
            )
        elif now > self._start_until:
            self._fail(
                EXIT_RESUME,
                f"rank {', '.join(map(str, missing))} of {self._job.ranks} did not come up in time; "
                f"{self._job.launcher} says: {self._launchers_words()}",
            )

    def _launchers_words(self) -> str:
        return " | ".join(line.strip() for line in self._said_by_launcher if set(line.strip()) - set("-=")) or "nothing"

    # Ending ------------------------------------------------------------------------------------------------------------

    def _fail(self, code: int, reason: str, rank: Rank | None = None) -> None:
        """The first failure counts; the others are given time to say what they know, and are then stopped."""
        if self._failure is None:
            self._failure = (code, reason, rank)
        if self._stop_at == self._over_at == float("inf"):
            wait = _AFTERTHOUGHT_SECONDS if self._went and not self._interrupted else 0.0
            self._stop_at = time.monotonic() + wait
            self._over_at = self._stop_at + _KILL_SECONDS + _LEAVING_SECONDS

    def _stop(self, grace: float) -> None:
        for rank in self._ranks.values():
            rank.send("stop", grace=grace)

    @contextlib.contextmanager
    def _signals(self):
        read, write = os.pipe()
        os.set_blocking(write, False)
        # What was ignored stays so: nohup means it.
        heard = [number for number in _INTERRUPTED if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, lambda *_: None) for number in heard}
        old = signal.set_wakeup_fd(write)
        self._selector.register(read, selectors.EVENT_READ, lambda: self._interrupt(os.read(read, 64)))
        try:
            yield
        finally:
            signal.set_wakeup_fd(old)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(read)
            os.close(write)

    def _interrupt(self, numbers: bytes) -> None:
        """The first signal goes to every rank, which may save and end; the second ends all at once."""
        for number in numbers:
            if number not in _INTERRUPTED:
                continue
            self._signals_taken += 1
            self._interrupted = True
            if self._signals_taken == 1:
                # A terminal that was closed is no reason to end without saving.
                self._tell_all(signal.SIGTERM if number == signal.SIGHUP else number)
            grace = self._grace if self._signals_taken == 1 and self._went else 0.0
            self._wind_up(128 + number, f"interrupted by {_name_of(number)}", grace)

    def _tell_all(self, number: int) -> None:
        for rank in self._ranks.values():
            rank.send("signal", number=number)

    def _wind_up(self, code: int, reason: str, grace: float) -> None:
        """Ranks have been asked to save and end, and are given time."""
        self._failure = self._failure or (code, reason, None)
        self._stop_at = time.monotonic() + grace
        self._over_at = self._stop_at + _KILL_SECONDS + _LEAVING_SECONDS

    def _is_over(self, processes: list[subprocess.Popen]) -> bool:
        if time.monotonic() > self._over_at:
            return True
        if self._failure and not self._went and time.monotonic() > self._stop_at:
            return True
        if len(self._ranks) == self._job.ranks:
            return all(rank.over for rank in self._ranks.values())
        return bool(self._failure) and all(process.poll() is not None for process in processes)

    def _clean_up(self, processes: list[subprocess.Popen]) -> None:
        for rank in self._ranks.values():
            rank.send("bye" if rank.over else "stop", **({} if rank.over else {"grace": 0.0}))
        self._wait(processes, _LEAVING_SECONDS)
        for rank in self._ranks.values():
            rank.line.close()
        for number, seconds in ((signal.SIGTERM, _LEAVING_SECONDS), (signal.SIGKILL, _LEAVING_SECONDS)):
            for process in processes:
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, number)
            self._wait(processes, seconds)
        for process in processes:
            process.stdout.close()

    def _wait(self, processes: list[subprocess.Popen], seconds: float) -> None:
        """Goes on reading meanwhile, or one that has much to say would never end."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and any(process.poll() is None for process in processes):
            for key, _ in self._selector.select(0.05):
                key.data()

    def _outcome(self) -> Outcome:
        hosts = sorted({rank.host for rank in self._ranks.values()})
        code, reason, rank = self._failure or (0, "", None)
        codes = [each.code for each in self._ranks.values()]
        if (self._interrupted or self._resized) and codes and set(codes) <= {0, EXIT_RESUME}:
            # All have saved, or were done anyway.
            code = max(codes)
            reason = f"{reason}; all ranks have saved and can go on from there" if code else ""
        return Outcome(code, reason, list(rank.lines) if rank else [], self._interrupted, hosts, len(self._ranks))


def how_it_ended(code: int) -> str:
    """An exit code that is not 0 in words, a signal as its negative number."""
    return f"ended with exit code {code}" if code > 0 else f"was killed by {_name_of(-code)}"


def _name_of(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"
