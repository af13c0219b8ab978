"""Error handling of all scripts: an error that the user can fix is printed as one line, not as a traceback."""

import signal
import sys
from collections.abc import Callable


def run(main: Callable[[], None], name: str):
    """Call `main()`. Args: name: starts the error line, as in "train.py".

    ValueError (BadImage is one) and OSError print one line on stderr and exit with status 1; Ctrl-C prints one line and
    exits with status 130. Any other exception is a bug in this project and keeps its traceback.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        text = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
        sys.exit(f"{name}: {' '.join(text.splitlines())}")
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
