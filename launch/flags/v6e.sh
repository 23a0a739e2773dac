# shellcheck shell=bash
# TPU v6e (Trillium); source it before the command, or name it with --flags=v6e.
# libtpu 0.0.42 accepts all of it (tests/test_flags.py); nobody has timed it here.
compiler_flags=(
  # Scratch memory of one operation, in KiB: 96 of the 128 MiB rather than 16. Larger tiles of the
  # matrix products, for less room to fetch ahead; other JAX trainers use this for dense models.
  --xla_tpu_scoped_vmem_limit_kib=98304
  # Gathers the weights of the next scanned block while this one computes: with weights split over
  # fsdp that is most of the communication. The three belong together, and hold one more block.
  --xla_tpu_enable_ici_ag_pipelining=true
  --xla_should_allow_loop_variant_parameter_in_chain=enabled
  --xla_should_add_loop_invariant_op_in_chain=enabled
  # If that schedule does not fit into memory, two more are tried that overlap less (default: one).
  --xla_latency_hiding_scheduler_rerun=2
  # Sums of gradients over `data` overlap with the backward pass; gathers do so by default.
  --xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true
  # The exchange between sequence and heads (--config.mesh.sequence) no longer stops everything.
  --xla_tpu_enable_async_all_to_all=true
  # Several slices: sums of gradients over the network between them overlap with the backward pass,
  # whatever their sizes. With one slice neither does anything.
  --xla_tpu_enable_data_parallel_all_reduce_opt=true
  --xla_tpu_data_parallel_opt_different_sized_ops=true
)
# What is set already comes last, and wins.
export LIBTPU_INIT_ARGS="${compiler_flags[*]}${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
