#!/bin/sh
# Lists the files of the environment, one a line: path, size, time, and where a link leads, between tabs.
cd /opt/venv && find . ! -type d -printf '%P\t%s\t%T@\t%l\n' | LC_ALL=C sort
