"""The command line: parse, call, render, exit code. No logic; heavy modules are loaded by who needs them.

`options` holds what the commands share; `bring`, `plan`, `train`, `watch`, `examine`, `rehearse`, `checkpoint`,
`config` and `images` hold the commands.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from typing import NoReturn

import click

from cluster.errors import ClusterError, Interrupted
from launcher.cli import bring, checkpoint, config, examine, images, plan, rehearse, train, watch
from launcher.cli.options import NAME, launcher

ROOMS = (
    bring,
    plan,
    train,
    watch,
    examine,
    rehearse,
    checkpoint,
    config,
    images,
)  # importing them registers their commands


def main() -> NoReturn:
    """Run, and leave by the exit codes of the contract; no traceback reaches a user."""
    debug = "--debug" in sys.argv[1:]
    try:
        launcher.main(prog_name=NAME, standalone_mode=False)
    except Interrupted as error:
        click.echo(str(error), err=True)
        _leave(error.exit_code)
    except ClusterError as error:
        _complain(error, debug=debug)
        _leave(error.exit_code)
    except click.exceptions.Exit as leaving:
        _leave(leaving.exit_code)
    except click.ClickException as error:
        error.show()
        _leave(2)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        _leave(130)
    except SystemExit as leaving:
        _leave(leaving.code if isinstance(leaving.code, int) else 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
            _unexpected(error, debug=debug)
        else:
            click.echo(f"error: this machine cannot take what was to be written: {error}", err=True)
        _leave(1)
    except Exception as error:  # noqa: BLE001 - the last resort: one line for the user, the rest for the log
        _unexpected(error, debug=debug)
        _leave(1)
    _leave(0)


def _complain(error: ClusterError, *, debug: bool) -> None:
    from launcher.views.live import paint, sanitize

    if debug:
        traceback.print_exc()
    lines = [sanitize(line) for line in str(error).splitlines()]
    click.echo(f"{paint('error', 31, on=sys.stderr.isatty())}: " + "\n".join(lines), err=True)


def _unexpected(error: Exception, *, debug: bool) -> None:
    if debug:
        traceback.print_exc()
        return
    from launcher.record import keep_traceback, state_folder

    kept = keep_traceback(state_folder(os.environ), traceback.format_exc())
    click.echo(f"error: this should not happen: {type(error).__name__}: {error}", err=True)
    click.echo(f"  the traceback is in {kept}\n  next: report it, or run again with --debug", err=True)


def _leave(code: int) -> NoReturn:
    """Leave at once: threads that wait for a dead node must not hold the prompt."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed by the caller
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    os._exit(code)
