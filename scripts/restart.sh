#!/usr/bin/env bash
# A command again and again until it is complete: scripts/restart.sh glmd run CONFIG [key=value ...]
#                                                 scripts/restart.sh scripts/launch.sh CONFIG
# What a restart cannot mend ends it with the same exit code: wrong usage or a refusal (2), numbers that are not finite
# (3), a full disk (4). So does Ctrl-C (130). A SIGTERM to this script goes on to the command, which saves, and ends both.
# (bash lets a command in the background ignore Ctrl-C, so that it gets a SIGTERM as well.)
# A launcher of several ranks has a code of its own, mostly 1: there a refusal is tried again too. Run `glmd check CONFIG`
# first. ATTEMPTS and PAUSE (seconds) may be set.
set -uo pipefail

child=
stopped=
trap 'stopped=143; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM
trap 'stopped=130; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' INT

for ((attempt = 1; attempt <= ${ATTEMPTS:-100}; attempt++)); do
    "$@" &
    child=$!
    wait "$child"
    code=$?
    # A trap ends `wait` early, not the command.
    while kill -0 "$child" 2>/dev/null; do
        wait "$child"
        code=$?
    done
    [ -z "$stopped" ] || exit "$stopped"
    case $code in
    0 | 2 | 3 | 4 | 126 | 127 | 130) exit "$code" ;;
    esac
    echo "restart: attempt $attempt ended with code $code; starting again" >&2
    child=
    sleep "${PAUSE:-10}"
done
echo "restart: given up after ${ATTEMPTS:-100} attempts" >&2
exit "$code"
