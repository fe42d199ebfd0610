"""Of Horovod, what is passed on as it is: starting, ranks, process sets, and names of reductions."""

from __future__ import annotations

from disttrain.horovod.engine import hvd

init, shutdown, is_initialized = hvd.init, hvd.shutdown, hvd.is_initialized
start_timeline, stop_timeline = hvd.start_timeline, hvd.stop_timeline

rank, size, is_homogeneous = hvd.rank, hvd.size, hvd.is_homogeneous
local_rank, local_size, cross_rank, cross_size = hvd.local_rank, hvd.local_size, hvd.cross_rank, hvd.cross_size
rank_op, size_op, local_rank_op, local_size_op = hvd.rank_op, hvd.size_op, hvd.local_rank_op, hvd.local_size_op

ProcessSet, global_process_set = hvd.ProcessSet, hvd.global_process_set
add_process_set, remove_process_set = hvd.add_process_set, hvd.remove_process_set
process_set_included_op = hvd.process_set_included_op

Average, Sum, Adasum, Min, Max, Product = hvd.Average, hvd.Sum, hvd.Adasum, hvd.Min, hvd.Max, hvd.Product

mpi_threads_supported, mpi_enabled, mpi_built = hvd.mpi_threads_supported, hvd.mpi_enabled, hvd.mpi_built
gloo_enabled, gloo_built, nccl_built, cuda_built = hvd.gloo_enabled, hvd.gloo_built, hvd.nccl_built, hvd.cuda_built
ddl_built, ccl_built, rocm_built = hvd.ddl_built, hvd.ccl_built, hvd.rocm_built

# Helpers that Horovod's module holds as well.
check_extension, gpu_available, split_list = hvd.check_extension, hvd.gpu_available, hvd.split_list
handle_average_backwards_compatibility = hvd.handle_average_backwards_compatibility
check_num_rank_power_of_2, refs_to_vars, vars_to_refs = (
    hvd.check_num_rank_power_of_2,
    hvd.refs_to_vars,
    hvd.vars_to_refs,
)
util, gradient_aggregation = hvd.util, hvd.gradient_aggregation
LocalGradientAggregationHelper = hvd.LocalGradientAggregationHelper
