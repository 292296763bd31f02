"""Commands whose output is cut short, as by ``| head -1``, end as Unix tools do: at once and quietly."""

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator

# What a shell reports of a tool that SIGPIPE has ended; Python itself ignores that signal.
STATUS = 128 + signal.SIGPIPE


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """Ends the process, with `STATUS`, where standard output has lost its reader; a decorator of ``main``.

    Everything else that fails does so as before, a pipe to another process included.
    """
    try:
        yield
        # Now, because nothing can be done about what fails when the interpreter ends.
        print(end="", flush=True)
    except BrokenPipeError:
        if not _reader_has_left():
            raise
        sys.exit(STATUS)
    finally:
        try:
            print(end="", flush=True)
        except BrokenPipeError:
            # What is still held back goes nowhere, or the interpreter would complain about it in the end.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        except OSError:
            pass  # is being told already, or will be when the interpreter ends


def _reader_has_left() -> bool:
    poll = select.poll()
    try:
        poll.register(sys.stdout, 0)  # what is wrong with a pipe is reported without being asked for
    except (OSError, TypeError, ValueError):  # it is no file at all
        return False
    return bool(poll.poll(0))
