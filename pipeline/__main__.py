"""`python -m pipeline` and the console script `twotower`."""

import os
import threading

from pipeline.cli.app import app

LEAVE_S = 5.0
"""Seconds for a tidy exit. Python waits for all threads at its end, and one may be trying storage that hangs."""


def main() -> None:
    """Run the command line; leaves with its exit code."""
    try:
        app(prog_name="twotower")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        timer = threading.Timer(LEAVE_S, os._exit, (code,))
        timer.daemon = True
        timer.start()
        raise


if __name__ == "__main__":
    main()
