#!/bin/sh
# Several processes on one machine, or one on each of several machines that reach each other by name.
#
#   experiments/scale/launch/hosts.sh COUNT kedit-arguments ...            COUNT processes here, one after another in number
#   COORDINATOR=first-host:8476 NUMBER=3 experiments/scale/launch/hosts.sh COUNT kedit-arguments ...     number 3 of them, here
#
# All must see the same model, facts, corpus and session folder. Give it once more to go on where a session was saved.
set -eu
count=$1
shift
coordinator=${COORDINATOR:-localhost:8476}
kedit=${KEDIT:-kedit}
if [ -n "${NUMBER:-}" ]; then
    exec "$kedit" --coordinator "$coordinator" --processes "$count" --process "$NUMBER" "$@"
fi
number=1
while [ "$number" -lt "$count" ]; do
    "$kedit" --coordinator "$coordinator" --processes "$count" --process "$number" "$@" &
    number=$((number + 1))
done
status=0
"$kedit" --coordinator "$coordinator" --processes "$count" --process 0 "$@" || status=$?
wait
exit "$status"
