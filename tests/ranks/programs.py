"""Small programs for ranks that `disttrain run` starts: python programs.py NAME [ARGUMENTS]. No TensorFlow in most of them."""

import os
import signal
import socket
import sys
import time
from pathlib import Path

from disttrain.world import world

me = world()


def hello():
    print(f"rank {me.rank} of {me.size} by {me.launcher}, attempt {os.environ['DISTTRAIN_ATTEMPT']}")
    print("a word on stderr", file=sys.stderr)


def fail():
    """Rank 1 raises after a word; the others would go on for long."""
    print(f"here is rank {me.rank}")
    if me.rank == 1:
        time.sleep(0.5)
        raise ValueError("a mistake in the program")
    time.sleep(300)


def wait():
    """For whatever the test has in mind. A child of its own must not outlive it."""
    if os.fork() == 0:
        time.sleep(300)
        os._exit(0)
    print("waiting", flush=True)
    time.sleep(300)


def save_on_term():
    """As a training that saves, and can go on from there."""

    def save(*_):
        print(f"rank {me.rank} saves")
        sys.exit(75)

    signal.signal(signal.SIGTERM, save)
    print("waiting", flush=True)
    time.sleep(300)


def count(folder):
    """As a training that saves on SIGTERM, and goes on from there when it starts again, until FOLDER/enough is there."""
    state = Path(folder) / f"state-{me.rank}"
    step = int(state.read_text()) if state.exists() else 0
    print(f"rank {me.rank} of {me.size} on {socket.gethostname()} begins at step {step}")
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    while not Path(folder, "enough").exists():
        time.sleep(0.1)
        step += 1
        if told:
            state.write_text(str(step))
            print(f"rank {me.rank} has saved step {step}")
            sys.exit(75)
    print(f"rank {me.rank} has done {step} steps")


def fail_on(host, code):
    """The rank on that host fails; the others would go on for long."""
    if socket.gethostname() == host:
        print(f"a mistake on {host}")
        sys.exit(int(code))
    time.sleep(300)


def deaf():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("waiting", flush=True)
    time.sleep(300)


def daemon():
    """Leaves a process of a session of its own behind, which holds its output open."""
    import subprocess

    subprocess.Popen(["sleep", "314"], start_new_session=True)
    print("that is all, \N{CHECK MARK}", flush=True)


def fail_once(folder):
    """Rank 0 fails in its first attempt, and is told which one this is."""
    attempts = Path(folder) / f"attempts-{me.rank}"
    with attempts.open("a") as file:
        file.write(os.environ["DISTTRAIN_ATTEMPT"])
    if me.rank == 0 and attempts.read_text() == "0":
        sys.exit(7)


def other_version():
    """Never comes to run: the hosts differ."""
    sys.exit("should not have been started")


def who():
    """Each rank says who is there, as its engine has it from the others."""
    import disttrain as dt

    comm = dt.init()
    found = comm.all_gather_object((comm.rank, comm.size, comm.local_rank, socket.gethostname()))
    print(f"{comm.name} {me.launcher} {found}")
    comm.close()


def ring(engine, enough):
    """Seconds for an all-reduce of 64 MiB, the slowest rank's, best of six, or as soon as `enough` are."""
    import tensorflow as tf

    import disttrain as dt

    comm = dt.init(engine)
    reduce = tf.function(comm.all_reduce, autograph=False)
    x = [tf.ones([1 << 22]) * (comm.rank + 1) for _ in range(4)]
    reduce([x[0][:1024]])
    times = []
    while len(times) < 6 and min(times, default=float("inf")) > float(enough):
        comm.barrier()
        start = time.perf_counter()
        total = reduce(x)
        assert float(total[3][-1]) == comm.size * (comm.size + 1) / 2
        times.append(max(comm.all_gather_object(time.perf_counter() - start)))
    if comm.is_chief:
        print(f"ring {min(times):.3f} s over {len(set(comm.all_gather_object(socket.gethostname())))} hosts")
    else:
        comm.all_gather_object(socket.gethostname())
    comm.close()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
