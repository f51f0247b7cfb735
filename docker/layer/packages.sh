#!/bin/sh
# Installs packages.txt into the environment, and lays what is new in it into a folder of its own.
#
#   packages.sh FOLDER     FOLDER/launcher/layer/gone names what is there no more, with NUL between them
set -eu
cd /launcher/layer
environment=/opt/venv
filled="$1"

all() { find "$environment" | LC_ALL=C sort; }

mkdir -p "$filled/launcher/layer"
all >before
touch begun
if [ -s packages.txt ]; then
    python3 -m pip install --constraint constraints.txt --requirement packages.txt
    python3 -m pip check
fi
all >after
# By the time of change, not of the content: pip gives files the latter from their archives.
find "$environment" ! -type d -cnewer begun -print0 | tar --create --null --files-from=- --file=new.tar
tar --extract --file=new.tar --directory="$filled"
LC_ALL=C comm -23 before after | tr '\n' '\0' >"$filled/launcher/layer/gone"
