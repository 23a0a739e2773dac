# shellcheck shell=bash
# TPU 7x (Ironwood); source it before the command, or name it with --flags=tpu7x.
# libtpu 0.0.42 accepts all of it (tests/test_flags.py); nobody has timed it here.
# Its SparseCores take gathers and sums off the main cores by default.
compiler_flags=(
  # Scratch memory of one operation, in KiB: all of the 64 MiB rather than 16, as other JAX trainers
  # have it. Larger tiles of the matrix products, for less room to fetch ahead.
  --xla_tpu_scoped_vmem_limit_kib=65536
  # If that schedule does not fit into memory, two more are tried that overlap less (default: one).
  --xla_latency_hiding_scheduler_rerun=2
  # The exchange between sequence and heads (--config.mesh.sequence) no longer stops everything.
  --xla_tpu_enable_async_all_to_all=true
  # Several slices: sums of gradients over the network between them overlap with the backward pass,
  # whatever their sizes. With one slice neither does anything.
  --xla_tpu_enable_data_parallel_all_reduce_opt=true
  --xla_tpu_data_parallel_opt_different_sized_ops=true
)
# What is set already comes last, and wins.
export LIBTPU_INIT_ARGS="${compiler_flags[*]}${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
