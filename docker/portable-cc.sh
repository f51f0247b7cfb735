#!/bin/sh
# A compiler that builds for any node, not for the machine it runs on.
#
# DeepSpeed's builders always say -march=native and a SIMD width read from this machine's CPU; such an op dies
# of an illegal instruction on an older node. This stands in for gcc and g++ (by the name it is called under)
# and puts CPU_ARCH in the place of both. CPU_ARCH=native leaves everything as it was.
set -eu
case "${CPU_ARCH:=}" in
    native) exec "/usr/bin/${0##*/}" "$@" ;;
    "")
        case "$(uname -m)" in
            x86_64) CPU_ARCH=x86-64-v3 ;; # AVX2 and FMA: every server CPU since 2013 (Intel), 2017 (AMD)
            aarch64) CPU_ARCH=armv8-a ;;
            *) exec "/usr/bin/${0##*/}" "$@" ;;
        esac
        ;;
esac
case "$CPU_ARCH" in
    x86-64-v4) simd=-D__AVX512__ ;;
    x86-64-v3) simd=-D__AVX256__ ;;
    armv8*) simd=-D__NEON__ ;;
    *) simd=-D__SCALAR__ ;;
esac
for argument in "$@"; do
    shift
    case "$argument" in
        -march=native) argument="-march=$CPU_ARCH" ;;
        -D__AVX512__ | -D__AVX256__ | -D__SVE__ | -D__NEON__ | -D__SCALAR__) argument="$simd" ;;
    esac
    set -- "$@" "$argument"
done
exec "/usr/bin/${0##*/}" "$@"
