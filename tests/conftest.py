"""Starts TensorFlow once for every test process: three logical CPU devices, one thread each."""

import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import pytest
import tensorflow as tf

import disttrain as dt
from disttrain.gradients import sparse

tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)
sparse.SMALL = 0  # the models of tests are small, and their IndexedSlices are to stay what they are
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


def pytest_configure(config):
    # Keras, of numpy 2 and mirrored variables.
    config.addinivalue_line("filterwarnings", "ignore:__array__ implementation:DeprecationWarning")
