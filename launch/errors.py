"""One line for a person's mistake instead of a traceback, and an exit code that is not 0."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_USER_ERROR = 2
# The first rank to exit takes the others with it (the launcher ends them). Rank 0 therefore gets
# this head start, so that a mistake that every rank finds is told once.
OTHER_RANKS_WAIT_SECONDS = 5.0


class UserError(Exception):
    """A mistake its user can mend: the message says what is wrong, where, and what to do."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a `UserError` into one `error:` line on stderr and exit code 2, on every rank.

    Anything else keeps its traceback: it is a defect of ours, and the traceback is the report.
    """
    try:
        yield
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        message = " ".join(str(error).split())
        if rank > 0:
            time.sleep(OTHER_RANKS_WAIT_SECONDS)
            message = f"[rank {rank}] {message}"
        print(f"error: {message}", file=sys.stderr, flush=True)
        # Not sys.exit: a rank that waits in a collective's thread must not hold up its own end.
        sys.stdout.flush()
        os._exit(EXIT_USER_ERROR)
