# shellcheck shell=bash
# Settings for a CPU; source it before the command. Measured: docs/benchmarks.md.

# glibc would give XLA's large buffers back to the system after every step and fault them in again,
# a quarter of a step's time. XLA allocates on threads of its own, whose arenas hold 64 MB at most
# and map what is larger whatever the first setting says: hence one arena.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_ARENA_MAX=1
# Huge pages fault less.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
