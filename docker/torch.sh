#!/bin/sh
# Installs torch into the environment and refuses a torch of the other flavour.
set -eu
case "$FLAVOUR" in
    cpu | cuda) ;;
    *) echo "FLAVOUR is '$FLAVOUR': it must be cpu or cuda" >&2 && exit 2 ;;
esac

# PyPI has no CPU build of torch for Linux: without a wheel at hand ask PyTorch's own index.
index=""
if [ "$FLAVOUR" = cpu ] && [ -z "$(find /launcher/wheels -name 'torch-*+cpu-*.whl')" ]; then
    index="--extra-index-url $TORCH_CPU_INDEX_URL"
fi
# shellcheck disable=SC2086  # either nothing or an option and its value
python3 -m pip install $index "$(grep '^torch==' /launcher/requirements.txt)" numpy

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
