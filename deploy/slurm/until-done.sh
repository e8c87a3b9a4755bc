# shellcheck shell=bash
# Sourced by the batch scripts.

# Ray's files of another user of the node, in /tmp/ray, could not be written to.
export RAY_TMPDIR=/tmp/ray-$USER

# until_done COMMAND…: run a training; hand Slurm's signal on to it, and requeue the job by its exit code.
#   0 done · 2 a mistake in recipe or data · 3 asked to stop, and saved · 4 machines or disks failed · 5 diverged
#   15, 134, 143 ended by the signal while Python or Ray was starting or ending, when nobody minds it
# Of the last kind, five in a row without a stop that was saved are enough.
until_done() {
  "$@" &
  local child=$! code faults=sdft-$SLURM_JOB_ID.faults
  trap 'kill -TERM "$child" 2> /dev/null || true' TERM INT
  while true; do
    code=0
    wait "$child" || code=$?
    # A signal ends `wait`, not the training, which is saving now.
    if ! kill -0 "$child" 2> /dev/null; then break; fi
  done
  case $code in
    4 | 15 | 134 | 143) echo "$code" >> "$faults" ;;
    *) rm -f "$faults" ;;
  esac
  case $code in
    3) scontrol requeue "$SLURM_JOB_ID" ;;
    4 | 15 | 134 | 143) if (($(wc -l < "$faults") <= 5)); then scontrol requeue "$SLURM_JOB_ID"; fi ;;
  esac
  return "$code"
}
