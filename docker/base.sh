#!/bin/sh
# A base image from Debian packages alone, for machines that reach no registry.
#
#   sh docker/base.sh [--suite bookworm] [--mirror http://deb.debian.org] | docker import - launcher/base
#
# The mirror has /debian and, if security updates are wanted (--security), /debian-security. The tar goes to
# stdout, everything else to stderr. Needs root and debootstrap.
set -eu
suite=bookworm
mirror=http://deb.debian.org
security=no
PATH="$PATH:/usr/sbin:/sbin" # where debootstrap lies, and a user does not look

usage() {
    echo "usage: base.sh [--suite NAME] [--mirror URL] [--security] > base.tar" >&2
    exit 2
}
while [ $# -gt 0 ]; do
    case "$1" in
        --suite) suite="${2:?--suite needs a name}" && shift 2 ;;
        --mirror) mirror="${2:?--mirror needs a URL}" && shift 2 ;;
        --security) security=yes && shift ;;
        *) usage ;;
    esac
done
mirror="${mirror%/}"
mirror="${mirror%/debian}"

if ! command -v debootstrap >/dev/null; then
    echo "base.sh: debootstrap is missing
  next: apt-get install debootstrap, or name a base image that this machine can pull" >&2
    exit 69
fi
if [ "$(id -u)" != 0 ]; then
    echo "base.sh: debootstrap must run as root (it makes device nodes and a chroot)
  next: sudo sh $0 ..." >&2
    exit 77
fi
if [ -t 1 ]; then
    echo "base.sh: stdout is a terminal, the tar belongs in a pipe or a file" >&2
    usage
fi

root="$(mktemp -d "${TMPDIR:-/tmp}/launcher-base.XXXXXX")"
trap 'rm -rf "$root"' EXIT
trap 'exit 130' INT TERM
chmod 755 "$root"

debootstrap --variant=minbase --include=ca-certificates "$suite" "$root" "$mirror/debian" >&2
{
    echo "deb $mirror/debian $suite main"
    echo "deb $mirror/debian $suite-updates main"
    if [ "$security" = yes ]; then
        echo "deb $mirror/debian-security $suite-security main"
    fi
} >"$root/etc/apt/sources.list"
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/cache/apt/*.bin "$root"/var/lib/apt/lists/* \
    "$root"/var/log/* "$root"/debootstrap

tar --create --directory "$root" --sort=name --numeric-owner --one-file-system .
