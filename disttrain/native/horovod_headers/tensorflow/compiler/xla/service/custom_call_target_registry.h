// Stands in for a header that TensorFlow no longer ships; see client/xla_builder.h beside this folder for the reason.
#pragma once
#undef HAVE_GPU
