"""Runs the command line: `python -m pipeline` and the console script `twotower`."""

import errno
import os
import sys
import threading

from pipeline.cli.app import app
from pipeline.core.streams import open_missing, say

LEAVE_S = 5.0
"""Seconds that Python has for a normal exit before the process is ended by force. Python waits for all threads when it
exits, and one of them may be retrying a storage that hangs."""


def main() -> None:
    """Run the command line and exit with its exit code, at the latest LEAVE_S seconds after the command has ended."""
    open_missing()
    try:
        app(prog_name="twotower")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        say("error: cannot write to stdout: no space left on device", sys.stderr)  # of `status` or `show`
        sys.exit(1)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        timer = threading.Timer(LEAVE_S, os._exit, (code,))
        timer.daemon = True
        timer.start()
        raise


if __name__ == "__main__":
    main()
