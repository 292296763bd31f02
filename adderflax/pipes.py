"""Commands whose output is cut short, as by ``| head -1``, end as Unix tools do: at once and quietly.

A training does not: what it says is a courtesy, and what it is for is in its workdir.
"""

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator
from typing import TextIO

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
            # Of what is still held back the interpreter would complain in the end.
            _send_nowhere(sys.stdout)
        except OSError:
            pass  # is being told already, or will be when the interpreter ends


@contextlib.contextmanager
def reader_may_leave_unheeded() -> Iterator[None]:
    """Goes on where standard output or standard error has lost its reader: what is said then goes nowhere.

    For work that is to be finished, or saved at least: Ctrl-C ends the reader in ``train.py | tee log``, too.
    """
    # A stream that is closed from the beginning is None.
    out, err = (stream and _Unheeding(stream) for stream in (sys.stdout, sys.stderr))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield
        print(end="", flush=True)


class _Unheeding:
    """A stream whose reader may leave."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            _send_nowhere(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            _send_nowhere(self._stream)


def _send_nowhere(stream: TextIO) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _reader_has_left() -> bool:
    poll = select.poll()
    try:
        poll.register(sys.stdout, 0)  # what is wrong with a pipe is reported without being asked for
    except (OSError, TypeError, ValueError):  # it is no file at all
        return False
    return bool(poll.poll(0))
