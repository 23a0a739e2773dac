#!/usr/bin/env bash
# Trains on a GKE cluster that XPK has made, on TPU slices or on GPU nodes.
#
#   bash launch/xpk.sh run --name=dk-dm --cluster=mine --tpu=v5litepod-16 \
#     --config=configs/flux_dev_dk_dm.py --workdir=gs://bucket/dk_dm
#   bash launch/xpk.sh run --name=dk-dm --cluster=mine --gpu=h100-mega-80gb-8 --nodes=2 ...
#
# run      creates the workload        follow   prints the logs of its pods as they grow
# status   lists it                    delete   ends and removes it
#
# --name=NAME       the workload's       --cluster=C  --zone=Z  --project=P   as xpk has them
# --tpu=TYPE        TPU slices of this type, --slices=N of them (1)
# --gpu=TYPE        nodes with this type of GPU, --nodes=N of them (1)
# --config=FILE[:ARGUMENTS]  --workdir=DIR  --config.KEY=VALUE    as eru_jax.train has them
# --flags=NAME      a set of compiler flags, such as v5e or h100 (none)
# --include=PATHS   more files of this clone to send, joined by commas, such as pairs.jsonl
# --image=IMAGE     the image that this clone is laid upon (python:3.12)
# --restarts=N      how often a broken-off or preempted workload is started again (50; 0 is never)
# --grace=S         seconds that a pod has to save before it is ended (300): more than two iterations
#                   and a save take
# --pass=FLAG       one more flag of xpk, such as --priority=high; may be repeated
# --dry_run         prints what would run, and changes nothing
#
# No image is built by hand: XPK lays this clone upon the image, and every pod installs what the
# image lacks when it starts, which takes some minutes. An image that has the packages of
# launch/constraints.txt already saves them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

action=${1:-}
case $action in
  run | follow | status | delete) shift ;;
  --help | -h) ;;
  *) fail "no '$action': the first word says what to do: run, follow, status, delete" ;;
esac
name='' cluster='' zone='' project='' tpu='' slices=1 gpu='' nodes=1 flags='' include=''
image=python:3.12 restarts=50 grace=300
known='name cluster zone project tpu slices gpu nodes flags include image restarts grace'
parse_flags "$known" '' "$@"
require_flags name cluster
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  fail "--name=$name: at most 40 lower-case letters, digits and hyphens, a letter first"

place=("--cluster=$cluster")
[ -z "$zone" ] || place+=("--zone=$zone")
[ -z "$project" ] || place+=("--project=$project")
place+=(${pass[@]+"${pass[@]}"})

create() {
  require_run
  require_number slices nodes grace
  [ "$restarts" = 0 ] || require_number restarts
  check_flags "$flags"
  case $workdir in
    gs://* | /*) ;;
    *) fail "--workdir=$workdir would be lost with the pod: give gs://... or a mounted directory" ;;
  esac
  local extra wanted
  if [ -n "$tpu" ] && [ -z "$gpu" ]; then
    extra=tpu wanted=("--tpu-type=$tpu" "--num-slices=$slices")
  elif [ -n "$gpu" ] && [ -z "$tpu" ]; then
    extra=cuda wanted=("--device-type=$gpu" "--num-nodes=$nodes")
  else
    fail 'give either --tpu=TYPE or --gpu=TYPE'
  fi

  # XPK copies its --command into YAML as it stands, where a quote or a colon may end it. So the
  # command is a file's name, and the file goes with the clone.
  local files added directory=eru_jax_workload file
  read -r -a files <<<"$(payload)"
  if [ -n "$include" ]; then
    IFS=, read -r -a added <<<"$include"
    files+=("${added[@]}")
  fi
  for file in "${files[@]}"; do
    [ -e "$file" ] || fail "$file does not exist; --include names files of this clone"
  done
  local script
  script="exec bash launch/xpk_worker.sh $extra $(quote "$flags" "${train[@]}")"
  if [ -n "$dry_run" ]; then
    echo "mkdir $directory"
    echo "tar --exclude=__pycache__ -cf - $(quote "${files[@]}") | tar -xf - -C $directory"
    echo "echo $(quote "$script") >$directory/run.sh"
  else
    directory=$(mktemp -d)
    # shellcheck disable=SC2064  # the directory of now
    trap "rm -rf $(quote "$directory")" EXIT
    tar --exclude=__pycache__ -cf - "${files[@]}" | tar -xf - -C "$directory"
    echo "$script" >"$directory/run.sh"
  fi
  # Status 1 is that of a pod that has lost another; a mistake that somebody must mend is a 2.
  run xpk workload create "--workload=$name" "${wanted[@]}" "--base-docker-image=$image" \
    "--script-dir=$directory" "--command=exec bash run.sh" "--max-restarts=$restarts" \
    --restart-on-exit-codes=1 "--termination-grace-period-seconds=$grace" "${place[@]}"
}

require_tool xpk 'see https://github.com/AI-Hypercomputer/xpk'
[ "$action" != follow ] || require_tool kubectl 'it is a component of the Google Cloud CLI'
case $action in
  run) create ;;
  follow)
    # kubectl knows no --cluster, --zone or --project; listing makes it speak to that cluster.
    run xpk workload list "--filter-by-job=$name" "${place[@]}"
    run kubectl logs --follow --prefix --tail=200 --max-log-requests=100 \
      "--selector=xpk.google.com/workload=$name"
    ;;
  status) run xpk workload list "--filter-by-job=$name" "${place[@]}" ;;
  delete) run xpk workload delete "--workload=$name" "${place[@]}" ;;
esac
