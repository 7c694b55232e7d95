#!/bin/sh
# merge_config.sh -m -n -O DIRECTORY FRAGMENT...: all of them one after the other
set -eu
test "$1 $2 $3" = "-m -n -O"
out=$4
shift 4
cat "$@" > "$out/.config"
