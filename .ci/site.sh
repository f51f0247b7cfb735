# Sourced, never run: what an image build needs to know of this site, where nobody has said it. What pip and Debian
# have been told already holds for the build as well: a local folder of wheels, further certificate authorities.
#
#   LAUNCHER_TEST_WHEELS LAUNCHER_TEST_CA_BUNDLE LAUNCHER_TEST_APT_MIRROR LAUNCHER_TEST_BASE

if [ -z "${LAUNCHER_TEST_WHEELS:-}" ]; then
    for python in .venv/bin/python python3; do
        links="${PIP_FIND_LINKS:-$("$python" -m pip config get global.find-links 2>/dev/null || true)}"
        for link in $links; do
            link="${link#file://}"
            if [ -z "${LAUNCHER_TEST_WHEELS:-}" ] && [ -d "$link" ]; then
                export LAUNCHER_TEST_WHEELS="$link"
            fi
        done
    done
fi

# Where Debian keeps the authorities that were added to its own.
authorities=/usr/local/share/ca-certificates
if [ -z "${LAUNCHER_TEST_CA_BUNDLE:-}" ] && compgen -G "$authorities/*.crt" >/dev/null; then
    export LAUNCHER_TEST_CA_BUNDLE="$authorities"
fi
