"""Starts TensorFlow once for every test process: three logical CPU devices, one thread each."""

import faulthandler
import os
import signal

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import pytest
import tensorflow as tf

import disttrain as dt
from disttrain.gradients import sparse

# What a shell has started in the background ignores Ctrl-C, and so would the jobs of tests that send it.
signal.signal(signal.SIGINT, signal.default_int_handler)
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)
sparse.SMALL = 0  # the models of tests are small, and their IndexedSlices are to stay what they are
_STDERR = os.dup(2)  # pytest puts a file in its place while a test runs
_COMMS = {"mirrored3": dt.init("mirrored", replicas=3)}
_COMMS |= {"mirrored2": dt.init("mirrored", replicas=2), "local": dt.init("local")}


@pytest.fixture(scope="session")
def comms():
    """Communicators by name: "local", "mirrored2", "mirrored3"; made once."""
    return _COMMS


@pytest.fixture
def local(comms):
    return comms["local"]


@pytest.fixture
def two(comms):
    return comms["mirrored2"]


@pytest.fixture
def three(comms):
    return comms["mirrored3"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown():
    """Ends the process where a teardown hangs, most likely after a test that failed: pytest's own timeouts strike once."""
    faulthandler.dump_traceback_later(120, exit=True, file=_STDERR)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_configure(config):
    # Keras, of numpy 2 and mirrored variables.
    config.addinivalue_line("filterwarnings", "ignore:__array__ implementation:DeprecationWarning")
