#!/bin/sh
# Installs packages of Debian or Ubuntu and leaves no package cache behind.
#
#   apt.sh PACKAGE...      "old|new" takes the first name that this release knows
#
# APT_MIRROR replaces scheme and host of every official source; the mirror keeps the paths
# (/debian, /debian-security, /ubuntu).
set -eu
export DEBIAN_FRONTEND=noninteractive

# A base without ca-certificates cannot read an HTTPS mirror behind a private CA: lend it ours until the
# package is there and writes the file anew.
bundle=/etc/ssl/certs/ca-certificates.crt
if [ ! -e "$bundle" ] && ls /usr/local/share/ca-certificates/*.crt >/dev/null 2>&1; then
    mkdir -p "${bundle%/*}"
    cat /usr/local/share/ca-certificates/*.crt >"$bundle"
fi

if [ -n "${APT_MIRROR:-}" ]; then
    find /etc/apt -name '*.list' -o -name '*.sources' | xargs -r sed -i -E \
        "s,https?://(deb\.debian\.org|security\.debian\.org|archive\.ubuntu\.com|security\.ubuntu\.com),${APT_MIRROR%/},g"
fi

apt-get update --quiet
chosen=""
for names in "$@"; do
    for name in $(echo "$names" | tr '|' ' '); do
        if apt-cache show "$name" >/dev/null 2>&1; then
            break
        fi
    done
    chosen="$chosen $name"
done
# shellcheck disable=SC2086  # a list of package names, split on purpose
apt-get install --quiet --yes --no-install-recommends $chosen
update-ca-certificates
apt-get clean
rm -rf /var/lib/apt/lists/* /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log
