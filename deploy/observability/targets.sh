#!/bin/sh
# List the agents of this node for Prometheus (file_sd): targets.sh [-u USER]... OUTPUT DIRECTORY...
#
# Every agent keeps a file `ready` in its directory while it serves: process id, address for agents, address of
# metrics, the same as the beginning of URLs. It removes the file when it ends in good order. One that was killed stays
# a target, which is down: at a port where nobody can listen, for its own is anybody's by now.
#
# Prometheus shows its token to all that is listed here, and anybody may make a directory in /tmp. So only files of who
# runs this are read, or of the users that -u names, in directories of theirs or of root; and only an address of this
# node is taken from them.
set -eu

usage() {
    echo "usage: $0 [-u USER]... OUTPUT DIRECTORY..." >&2
    exit 2
}

owners=''
while getopts u: option; do
    case $option in
        u) owners="$owners $(id -u "$OPTARG")" ;;
        *) usage ;;
    esac
done
shift $((OPTIND - 1))
[ $# -ge 2 ] || usage
output=$1
shift
owners=${owners:-$(id -u)}
node=$(uname -n)

# After the directories, what find(1) is to look for there.
set -- "$@" -maxdepth 4 -type d ! -user 0
for owner in $owners; do
    set -- "$@" ! -user "$owner"
done
set -- "$@" -prune -o -name ready -type f '('
for owner in $owners; do
    set -- "$@" -user "$owner" -o
done
set -- "$@" -false ')' -print

# Whether the process of a file `ready` lives, as its owner's.
lives() {
    pid=$(sed -n 1p "$1" | grep -Ex '[0-9]{1,9}') || return 1
    [ "$(sed -n 's/^Uid:[[:space:]]*\([0-9]*\).*/\1/p' "/proc/$pid/status" 2>/dev/null)" = "$(stat -c %u "$1")" ]
}

list() {
    separator=''
    printf '['
    find "$@" | LC_ALL=C sort | while read -r ready; do
        address=$(sed -n 3p "$ready" 2>/dev/null | grep -Ex '[A-Za-z0-9.-]+:[0-9]{1,5}|\[::1\]:[0-9]{1,5}') || continue
        port=${address##*:}
        host=${address%:*}
        if [ "$host" != "$node" ] && [ "$host" != '[::1]' ]; then
            printf '%s\n' "$host" | grep -qEx '127(\.[0-9]{1,3}){3}' || continue
        fi
        scheme=''
        if lives "$ready"; then
            case $(sed -n 4p "$ready") in https://*) scheme=', "__scheme__": "https"' ;; esac
        else
            address=127.0.0.1:0
        fi
        printf '%s\n  {"targets": ["%s"], "labels": {"instance": "%s:%s"%s}}' \
            "$separator" "$address" "$node" "$port" "$scheme"
        separator=,
    done
    printf '\n]\n'
}

umask 022
list "$@" > "$output.new"
mv "$output.new" "$output" # at once: Prometheus may be reading
