"""TensorFlow and Keras as they import here, the GPUs that they see, and the CUDA that the driver can do."""

import contextlib
import ctypes
import json
import sys

import tensorflow as tf


def keras_facts():
    """Its version and the backend that it runs on."""
    try:
        import keras
    except Exception as error:  # of the backend that it runs on, too
        return {"error": f"{type(error).__name__}: {error}"}
    return {"version": keras.__version__, "backend": keras.backend.backend()}


def driver_cuda():
    """The newest CUDA that the driver can do, as 12040; 0 without a driver."""
    version = ctypes.c_int(0)
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


build = tf.sysconfig.get_build_info()
found = {
    "version": tf.__version__,
    "cuda": build.get("cuda_version"),
    "gpus": len(tf.config.list_physical_devices("GPU")),
    "driver_cuda": driver_cuda(),
    "keras": keras_facts(),
}
sys.stdout.write(json.dumps(found) + "\n")
