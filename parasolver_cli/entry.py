"""Where the ``parasolver`` command begins. Imports nothing slow, so that Ctrl-C is answered from the start."""

import os
import signal
import sys
from typing import Any

INTERRUPTED = 130  # what shells expect of a program that Ctrl-C ended


def main() -> None:
    """Run the command line.

    Until a command begins its work, Ctrl-C ends the process at once: nothing has to be kept, and an exception that a
    signal raises while modules are imported can get lost in them.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody chose to ignore it
        signal.signal(signal.SIGINT, _leave)
    from parasolver_cli.main import app

    app()


def begin_work() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt: there may be something to keep."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(*_: Any) -> None:
    sys.stderr.write("parasolver: interrupted; nothing was kept\n")
    sys.stderr.flush()
    os._exit(INTERRUPTED)
