#!/bin/sh
# List the agents of this node for Prometheus (file_sd): targets.sh OUTPUT DIRECTORY...
#
# Every agent keeps a file `ready` in its directory while it serves: process id, address for agents, address of
# metrics, the same as the beginning of URLs. It removes the file when it ends in good order, so that one that was killed stays a target, which is down.
# Only what is an address is taken from such a file, for it belongs to the user whose agent it is.
set -eu

if [ $# -lt 2 ]; then
    echo "usage: $0 OUTPUT DIRECTORY..." >&2
    exit 2
fi
output=$1
shift
node=$(uname -n)

list() {
    separator=''
    printf '['
    find "$@" -maxdepth 4 -name ready -type f | LC_ALL=C sort | while read -r ready; do
        address=$(sed -n 3p "$ready" 2>/dev/null | grep -Ex '[A-Za-z0-9.:-]+:[0-9]{1,5}|\[[0-9a-f:]+\]:[0-9]{1,5}') || continue
        scheme=''
        case $(sed -n 4p "$ready") in https://*) scheme=', "__scheme__": "https"' ;; esac
        printf '%s\n  {"targets": ["%s"], "labels": {"instance": "%s:%s"%s}}' \
            "$separator" "$address" "$node" "${address##*:}" "$scheme"
        separator=,
    done
    printf '\n]\n'
}

umask 022
list "$@" > "$output.new"
mv "$output.new" "$output" # at once: Prometheus may be reading
