// Stands in for a header that TensorFlow no longer ships. The XLA interface that Horovod 0.28.1's xla_mpi_ops.cc was
// written for is gone; the file includes this before it asks for HAVE_GPU, so that its XLA ops, and nothing else, drop out.
#pragma once
#undef HAVE_GPU
