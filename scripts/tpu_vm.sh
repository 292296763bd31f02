#!/usr/bin/env bash
# Creates a Cloud TPU slice, installs this checkout on every worker, trains there, and goes on after preemption.
#
#   export TPU=adder ZONE=us-west4-a ACCELERATOR=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite
#   scripts/tpu_vm.sh watch --config configs/imagenet_adder_deit_ti.py --workdir /mnt/runs/deit-ti
#
# Commands: create, install, run ARGUMENTS, watch ARGUMENTS (all of them, until the run has finished), delete.
# ARGUMENTS are those of train.py; --distributed is added. docs/cloud.md explains the rest:
#   CREATE   further arguments of `gcloud compute tpus queued-resources create`   (default: --spot)
#   SETUP    a command for every worker before the installation, such as mounting a disk
#   CACHE    where compiled programs are kept: a directory that all workers see outlives the slice
#   POLL     seconds between two looks at the queue                               (default: 60)
set -euo pipefail
cd "$(dirname "$0")/.."

: "${TPU:?the name of the slice}" "${ZONE:?its zone}"
: "${CREATE=--spot}" "${SETUP:=true}" "${POLL:=60}"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

tpus() { gcloud compute tpus "$@" --zone="$ZONE"; }

on_every_worker() { tpus tpu-vm ssh "$TPU" --worker=all --command="$1"; }

# Empty where there is no such request; UNKNOWN where the question failed, which is no reason to ask for another.
request_state() {
  local problem=$scratch/problem
  if ! tpus queued-resources describe "$TPU" --format='value(state.state)' 2>"$problem"; then
    grep -q NOT_FOUND "$problem" || { cat "$problem" >&2 && echo UNKNOWN; }
  fi
}

ready() { [ "$(tpus tpu-vm describe "$TPU" --format='value(state)' 2>/dev/null)" = READY ]; }

create() {
  # CREATE is a list of words.
  # shellcheck disable=SC2086
  tpus queued-resources create "$TPU" --node-id="$TPU" \
    --accelerator-type="${ACCELERATOR:?such as v5litepod-16}" \
    --runtime-version="${RUNTIME:?such as v2-alpha-tpuv5-lite}" $CREATE
}

delete() { tpus queued-resources delete "$TPU" --force --quiet; }

wait_until_ready() {
  while true; do
    case "$(request_state)" in
      ACTIVE) if ready; then return; fi ;;
      "") create ;;
      # SUSPENDED is what a preempted spot slice ends in; it never comes back by itself.
      SUSPENDED | FAILED)
        tpus queued-resources describe "$TPU" --format='yaml(state)' >&2 || true
        delete || echo "The old request is not deleted yet: trying again" >&2
        ;;
    esac
    sleep "$POLL"
  done
}

# Takes up a run whose connection was lost, and leaves its files alone until it has ended.
AWAIT='while systemctl is-active --quiet adderflax; do sleep 10; done'

install() {
  local archive=$scratch/adderflax.tar.gz
  # uv brings a Python of its own: that of the TPU images is older than 3.11.
  git archive --format=tar.gz --output="$archive" HEAD &&
    tpus tpu-vm scp "$archive" "$TPU:adderflax.tar.gz" --worker=all &&
    on_every_worker "set -e
      $AWAIT
      $SETUP
      mkdir -p adderflax && tar -xzf adderflax.tar.gz -C adderflax
      [ -x .local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh
      [ -d venv ] || .local/bin/uv venv --quiet --python 3.11 venv
      sed 's/^jax==/jax[tpu]==/' adderflax/requirements.txt |
        .local/bin/uv pip install --quiet --python venv/bin/python --requirements -"
}

run() {
  # As a service: it outlives the connection, and a shutdown sends it SIGTERM and waits, so that it saves. Being
  # ordered after network file systems, it is stopped before they are taken away.
  on_every_worker "$AWAIT
    sudo systemd-run --unit=adderflax --uid=\$(id -u) --collect --wait --pipe --quiet \
      --working-directory=\$HOME/adderflax --setenv=HOME=\$HOME \
      ${CACHE:+--setenv=JAX_COMPILATION_CACHE_DIR=$CACHE} \
      --property=After=network-online.target --property=After=remote-fs.target \
      --property=LimitMEMLOCK=infinity --property=LimitNOFILE=1048576 --property=TimeoutStopSec=120 \
      \$HOME/venv/bin/python train.py --distributed --noprogress $(printf '%q ' "$@")"
}

watch() {
  local code step
  while true; do
    wait_until_ready
    code=0 step="The installation"
    { install && step=train.py && run "$@"; } || code=$?
    if [ "$code" = 0 ]; then return; fi
    sleep "$POLL"
    # 75: the run was told to stop, and saved. 255: the connection was lost. Else a slice that is still there
    # has failed for a reason of its own, which would come again.
    if [ "$code" != 75 ] && [ "$code" != 255 ] && ready; then
      echo "$step ended with code $code; its messages are above, those of train.py also in:" \
        "journalctl --unit adderflax" >&2
      return "$code"
    fi
    echo "Interrupted (code $code): going on from the newest checkpoint" >&2
  done
}

case "${1:-}" in
  create | delete | install | run | watch) "$@" ;;
  *) sed -n '2,12s/^# \{0,1\}//p' scripts/tpu_vm.sh >&2 && exit 2 ;;
esac
