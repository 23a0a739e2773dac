#!/usr/bin/env bash
# Trains on all workers of a Cloud TPU VM, from your own computer.
#
#   bash launch/tpu_vm.sh create --name=eru --accelerator=v5litepod-16 --zone=us-west4-a --spot
#   bash launch/tpu_vm.sh run    --name=eru --zone=us-west4-a \
#     --config=configs/flux_dev_dk_dm.py --workdir=gs://bucket/dk_dm
#   bash launch/tpu_vm.sh follow --name=eru --zone=us-west4-a
#
# create   asks for a TPU as a queued resource: --accelerator=TYPE, [--spot] [--runtime_version=V]
# run      sends this clone, installs what is missing, and starts the run detached on every worker
# follow   prints the log of one worker as it grows, --worker=N (0); ending it does not end the run
# status   says of every worker whether it runs and what it printed last
# stop     lets the run save, and waits for it
# kill     ends it at once, as a fault would
# delete   gives the queued resource and its TPU back
#
# --name=NAME       the TPU's name
# --zone=Z          its zone; --project=P as gcloud has it
# --slices=N        slices of a queued resource (1)
# --config=FILE[:ARGUMENTS]  --workdir=DIR  --config.KEY=VALUE    as eru_jax.train has them
# --flags=NAME      a set of compiler flags: v5e, v5p or v6e (none)
# --include=PATHS   more files of this clone to send, joined by commas, such as pairs.jsonl
# --pass=FLAG       one more flag of gcloud, such as --internal-ip; may be repeated
# --dry_run         prints what would run, and changes nothing
#
# `run` again continues an interrupted run, also on another TPU if the workdir is in a bucket. With
# more than one worker it must be there, or in a directory that all workers have mounted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

action=${1:-}
case $action in
  create | run | follow | status | stop | kill | delete) shift ;;
  --help | -h) ;;
  *) fail "no '$action': the first word says what to do: create, run, follow...; see --help" ;;
esac
name='' zone='' project='' slices=1 accelerator='' runtime_version='' spot='' worker=0
flags='' include=''
parse_flags 'name zone project slices accelerator runtime_version worker flags include' spot "$@"
require_flags name
# gcloud would ask for it, or fail at length, at each of several calls.
[ -n "$zone${CLOUDSDK_COMPUTE_ZONE:-}" ] || fail '--zone must be given, such as --zone=us-west4-a'
require_number slices
check_flags "$flags"
require_tool gcloud 'it comes with the Google Cloud CLI'

place=()
[ -z "$zone" ] || place+=("--zone=$zone")
[ -z "$project" ] || place+=("--project=$project")
place+=(${pass[@]+"${pass[@]}"})

# Several slices are reached through their queued resource, a single one as the TPU VM that it is.
if [ "$slices" -gt 1 ]; then
  tpu=(gcloud compute tpus queued-resources) nodes=(--node=all)
else
  tpu=(gcloud compute tpus tpu-vm) nodes=()
fi
on_all() {
  run "${tpu[@]}" ssh "$name" --worker=all ${nodes[@]+"${nodes[@]}"} ${place[@]+"${place[@]}"} \
    "--command=$1"
}
# Nothing runs where nothing was sent.
on_worker() { echo "[ ! -d eru_jax ] || (cd eru_jax && bash launch/tpu_worker.sh $1)"; }

create() {
  require_flags accelerator
  if [ -z "$runtime_version" ]; then
    case $accelerator in
      v5litepod-*) runtime_version=v2-alpha-tpuv5-lite ;;
      v5p-*) runtime_version=v2-alpha-tpuv5 ;;
      v6e-*) runtime_version=v2-alpha-tpuv6e ;;
      *) fail "which --runtime_version '$accelerator' needs is not known here" ;;
    esac
  fi
  local wanted=("--accelerator-type=$accelerator" "--runtime-version=$runtime_version")
  if [ "$slices" -gt 1 ]; then
    wanted+=("--node-count=$slices" "--node-prefix=$name")
  else
    wanted+=("--node-id=$name")
  fi
  [ -z "$spot" ] || wanted+=(--spot)
  run gcloud compute tpus queued-resources create "$name" "${wanted[@]}" ${place[@]+"${place[@]}"}
}

start() {
  require_run
  local archive=eru_jax.tar.gz files extra
  read -r -a files <<<"$(payload)"
  if [ -n "$include" ]; then
    IFS=, read -r -a extra <<<"$include"
    files+=("${extra[@]}")
  fi
  local file
  for file in "${files[@]}"; do
    [ -e "$file" ] || fail "$file does not exist; --include names files of this clone"
  done
  if [ -z "$dry_run" ]; then
    directory=$(mktemp -d)
    trap 'rm -rf "$directory"' EXIT
    archive=$directory/$archive
  fi
  run tar --exclude=__pycache__ -czf "$archive" "${files[@]}"
  run "${tpu[@]}" scp "$archive" "$name:" --worker=all ${nodes[@]+"${nodes[@]}"} \
    ${place[@]+"${place[@]}"}
  # What was sent before is replaced, not mixed; not while a run may yet import it.
  on_all "{ $(on_worker idle); } && mkdir -p eru_jax && cd eru_jax && \
rm -rf configs eru_jax launch && tar -xzf ../eru_jax.tar.gz && bash launch/tpu_worker.sh install"
  on_all "cd eru_jax && bash launch/tpu_worker.sh start $(quote "$flags" "${train[@]}")"
  [ -n "$dry_run" ] || echo "started; for its log: bash launch/tpu_vm.sh follow --name=$name${zone:+ --zone=$zone}"
}

case $action in
  create) create ;;
  run) start ;;
  follow)
    run "${tpu[@]}" ssh "$name" "--worker=$worker" ${place[@]+"${place[@]}"} \
      "--command=$(on_worker follow)"
    ;;
  status | stop | kill) on_all "$(on_worker "$action")" ;;
  delete)
    run gcloud compute tpus queued-resources delete "$name" --force --quiet \
      ${place[@]+"${place[@]}"}
    ;;
esac
