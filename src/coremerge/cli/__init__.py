"""The command ``coremerge``: one command a file, each thin over one public function."""

from __future__ import annotations

import signal
import sys
import warnings
from typing import NoReturn

from coremerge.cli._process import leave, settle

INTERRUPTED = 130
"""The exit status after Ctrl-C, as shells have it."""


def script() -> NoReturn:
    """The console script."""
    settle()
    try:
        main()
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        leave(end.code)
    leave(0)


def main() -> None:
    """The command, with the words of ``sys.argv``; ends by :class:`SystemExit`."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that half-written output is removed
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # those of the libraries; our own are part of the output
    try:
        from coremerge.cli._app import app

        app()
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            _interrupted()
        raise


def _interrupted() -> None:
    print("Error: interrupted", file=sys.stderr)
    sys.exit(INTERRUPTED)
