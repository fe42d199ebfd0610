"""Work that several test processes need the result of, done by one of them."""

import fcntl
import os
import pickle


def once(tmp_path_factory, name, work):
    """What `work` returns, for every test and in every process of pytest-xdist; only the first that asks does it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    path = folder / f"{name}.pickle"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            path.write_bytes(pickle.dumps(work()))
    return pickle.loads(path.read_bytes())
