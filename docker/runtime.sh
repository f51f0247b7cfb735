#!/bin/sh
# The Debian packages that a job needs when it runs.
set -eu
packages="bash ca-certificates iproute2 libaio1|libaio1t64 procps python3"
if [ "$FLAVOUR" = cuda ]; then
    packages="$packages libibverbs1 ibverbs-providers librdmacm1|librdmacm1t64" # NCCL over InfiniBand and RoCE
fi
if [ -n "${TOOLKIT:-}" ]; then
    packages="$packages gcc g++ libaio-dev python3-dev"
fi
# shellcheck disable=SC2086  # a list of package names, split on purpose
exec sh /launcher/apt.sh $packages
