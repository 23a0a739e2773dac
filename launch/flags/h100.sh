# shellcheck shell=bash
# H100 and H200; source it before the command, or name it with --flags=h100.
# jaxlib 0.10 accepts all of it (tests/test_flags.py); nobody has timed it here.
compiler_flags=(
  # Moves communication between GPUs to where it overlaps with computation.
  --xla_gpu_enable_latency_hiding_scheduler=true
  # Gathers the weights of the next scanned block, and sums the gradients of the last one, while
  # this one computes: with weights split over fsdp that is most of the communication.
  --xla_gpu_enable_pipelined_all_gather=true
  --xla_gpu_enable_pipelined_reduce_scatter=true
  --xla_gpu_enable_pipelined_all_reduce=true
  # Two scanned blocks in turn, so that what was gathered ahead need not be copied into place.
  --xla_gpu_enable_while_loop_double_buffering=true
  # Joins small transfers up to this many bytes: a few of them a block, not dozens.
  --xla_gpu_all_gather_combine_threshold_bytes=134217728
  --xla_gpu_all_reduce_combine_threshold_bytes=134217728
  --xla_gpu_reduce_scatter_combine_threshold_bytes=67108864
  # cuBLAS for matrix products: compiling tries no Triton kernels out.
  --xla_gpu_enable_triton_gemm=false
)
# What is set already comes last, and wins.
export XLA_FLAGS="${compiler_flags[*]}${XLA_FLAGS:+ $XLA_FLAGS}"
# JAX's share of the memory, not three quarters; the rest is for cuDNN, NCCL and the CUDA context.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-.92}"
