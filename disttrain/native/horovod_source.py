"""Horovod's source package: where it comes from, and what is changed in it."""

from __future__ import annotations

import hashlib
import os
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from disttrain.errors import BackendError
from disttrain.native import process, toolchain
from disttrain.native.log import last_error

VERSION = "0.28.1"
SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"

# Stand-ins for two headers that TensorFlow no longer ships; the files say why.
HEADERS = Path(__file__).with_name("horovod_headers")


@dataclass(frozen=True)
class Patch:
    """The replacement of a text that occurs once in a file of the source."""

    file: str
    old: str
    new: str

    def apply(self, source: Path) -> None:
        """Changes the file, or raises where it is not what the patch was written for."""
        path = source / self.file
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text.count(self.old) != 1:
            raise BackendError(
                f"a patch does not fit {self.file} of Horovod's source: {self.old.splitlines()[0]!r} and what follows "
                f"occurs {text.count(self.old)} times there, not once. Please report it."
            )
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


PATCHES = (
    # CMake would write this environment's absolute paths into the library; from the cache it would then load the MPI of the
    # environment that it was built in, into every other one.
    Patch(
        "horovod/tensorflow/CMakeLists.txt",
        'set_target_properties(${TF_TARGET_LIB} PROPERTIES OUTPUT_NAME "mpi_lib")',
        'set_target_properties(${TF_TARGET_LIB} PROPERTIES OUTPUT_NAME "mpi_lib")\n'
        "set_target_properties(${TF_TARGET_LIB} PROPERTIES\n"
        '    BUILD_WITH_INSTALL_RPATH TRUE INSTALL_RPATH "$ENV{DISTTRAIN_RPATH}")',
    ),
    # TensorFlow no longer exports this function: the library would link, and fail to load. Compiled with --gpu only.
    Patch(
        "horovod/tensorflow/mpi_ops.cc",
        "// Forward declaration of AsGpuStreamValue\n"
        "namespace stream_executor {\n"
        "namespace gpu {\n"
        "GpuStreamHandle AsGpuStreamValue(Stream* stream);\n",
        '#include "tensorflow/compiler/xla/stream_executor/stream.h"\n'
        "namespace stream_executor {\n"
        "namespace gpu {\n"
        "static inline GpuStreamHandle AsGpuStreamValue(Stream* stream) {\n"
        "  return static_cast<GpuStreamHandle>(stream->platform_specific_handle().stream);\n"
        "}\n",
    ),
    # In an elastic job ranks meet anew, and one that should come may not. That would end all others by std::terminate, where
    # they should learn of it, as of other failures to begin, and try again.
    Patch(
        "horovod/common/operations.cc",
        "  {\n"
        "    global_gloo_context.Initialize(ParseGlooIface());\n"
        "  }\n"
        "  if (state.control_operation == LibType::GLOO) {\n"
        "    // Initializes global controller\n"
        "    state.process_set_table.Initialize(global_gloo_context);\n"
        "  }\n",
        "  try {\n"
        "    global_gloo_context.Initialize(ParseGlooIface());\n"
        "  } catch (const std::exception& ex) {\n"
        "    GiveUpOnGloo(state, ex);\n"
        "    return;\n"
        "  }\n"
        "  if (state.control_operation == LibType::GLOO) {\n"
        "    // Initializes global controller\n"
        "    try {\n"
        "      state.process_set_table.Initialize(global_gloo_context);\n"
        "    } catch (const std::exception& ex) {\n"
        "      GiveUpOnGloo(state, ex);\n"
        "      return;\n"
        "    }\n"
        "  }\n",
    ),
    Patch(
        "horovod/common/operations.cc",
        "void BackgroundThreadLoop(HorovodGlobalState& state) {\n",
        "#if HAVE_GLOO\n"
        "static void GiveUpOnGloo(HorovodGlobalState& state, const std::exception& ex) {\n"
        '  LOG(ERROR) << "Horovod could not be initialized: " << ex.what();\n'
        "  if (state.control_operation == LibType::GLOO) {\n"
        "    state.process_set_table.Finalize(global_gloo_context, SHUT_DOWN_ERROR);\n"
        "  }\n"
        "  global_gloo_context.Finalize();\n"
        "  state.initialization_failed = true;\n"
        "}\n"
        "#endif\n\n"
        "void BackgroundThreadLoop(HorovodGlobalState& state) {\n",
    ),
    Patch(
        "horovod/common/operations.cc",
        "    // Reset initialization flag\n",
        "    // Reset initialization flags\n    horovod_global.initialization_failed = false;\n",
    ),
    # How a rank that has no place in the job any more can tell this from other failures.
    Patch(
        "horovod/common/gloo/gloo_context.cc",
        "      // Signals that this host is not part of the job\n",
        '      // Signals that this host is not part of the job\n      SetEnv(HOROVOD_RANK, "-1");\n',
    ),
)


def fingerprint(*ingredients: object) -> str:
    """A short hash of the source, of what is changed in it, and of these ingredients."""
    headers = [path.read_bytes() for path in sorted(HEADERS.rglob("*.h"))]
    return hashlib.sha256(repr((SHA256, PATCHES, headers, ingredients)).encode()).hexdigest()[:12]


def sha256(path: Path) -> str:
    """A file's sha256 in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def download(cache: Path, log: Path) -> Path:
    """The source package, from the cache or a package index."""
    package = cache / f"horovod-{VERSION}.tar.gz"
    if package.is_file() and sha256(package) == SHA256:
        return package
    with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as work:
        # pip runs a package's setup.py to learn its name: with the hash in a requirements file it checks before that.
        requirements = Path(work, "requirements.txt")
        requirements.write_text(f"horovod=={VERSION} --hash=sha256:{SHA256}\n")
        command = toolchain.pip("download", "--no-deps", "--no-binary", "horovod", "--no-build-isolation")
        command += ["--require-hashes", "--requirement", str(requirements), "--dest", work]
        code = process.run(command, log, environment=os.environ | {"TMPDIR": work})
        found = Path(work, package.name)
        if code or not found.is_file() or sha256(found) != SHA256:
            raise BackendError(
                f"the source of Horovod {VERSION} could not be downloaded: {last_error(log)} Try again with a network, or put "
                f"{package.name} into {cache}. The log: {log}"
            )
        os.replace(found, package)
    return package


def unpack(package: Path, folder: Path) -> Path:
    """Unpacks the source into the folder, changes it, and returns where it is."""
    with tarfile.open(package) as tar:
        # The safe filter, where this Python has it; the hash has been checked in any case.
        tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        tar.extractall(folder)
    source = folder / f"horovod-{VERSION}"
    for patch in PATCHES:
        patch.apply(source)
    return source
