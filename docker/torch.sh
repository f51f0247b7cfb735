#!/bin/sh
# Installs torch into the environment, and refuses a torch of the other flavour.
set -eu
locked() { python3 -m pip install --no-deps --require-hashes --requirement "/launcher/locks/$1.txt"; }

locked torch
case "$FLAVOUR" in
    cuda) locked cuda ;;
    cpu)
        # PyPI has no CPU build of torch for Linux: without a wheel at hand ask PyTorch's own index. No lock
        # holds its hash for the same reason.
        index=""
        if [ -z "$(find /launcher/wheels -name 'torch-*+cpu-*.whl')" ]; then
            index="--extra-index-url $TORCH_CPU_INDEX_URL"
        fi
        # shellcheck disable=SC2086  # either nothing or an option and its value
        python3 -m pip install --no-deps $index "$(grep -o '^torch==[^ ]*' /launcher/locks/cuda.txt)"
        ;;
    *) echo "FLAVOUR is '$FLAVOUR': it must be cpu or cuda" >&2 && exit 2 ;;
esac

python3 - "$FLAVOUR" <<'PYTHON'
import sys

import torch

found = "cpu" if torch.version.cuda is None else "cuda"
if found != sys.argv[1]:
    sys.exit(
        f"flavour {sys.argv[1]} wants a {sys.argv[1]} build of torch, pip found {torch.__version__} ({found}): "
        "give a wheel folder or a pip index that has one"
    )
PYTHON

# What is in this layer, so that the next one can hold the rest alone (rest.sh).
sh /launcher/files.sh >/launcher/torch.files
