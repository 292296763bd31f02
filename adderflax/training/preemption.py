"""Stopping when told to: SIGTERM and SIGINT end a run after the update at hand, saved."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# EX_TEMPFAIL of sysexits.h, "try again": for whatever restarts the command.
EXIT_CODE = 75
# Processes agree on stopping by a collective, which waits for the devices: not at every update.
_AGREE_EVERY = 8
# Seconds within which the same signal again is the first one: `timeout` sends it to the process, then to its
# group, of which the process is one.
_SAME_WITHIN = 0.2


class Preempted(SystemExit):
    """The run was told to stop and has saved what it had; uncaught, it ends the process with `EXIT_CODE`.

    Like KeyboardInterrupt, which it replaces, it is no Exception.
    """

    def __init__(self):
        super().__init__(EXIT_CODE)


class StopSignals:
    """Takes SIGTERM and SIGINT while it is entered: the first is remembered, a second one exits at once.

    It exits with 128 plus the signal's number, even while the main thread is inside a compiler or waits for a
    device. The same signal within 0.2 s of the first is no second one: `timeout` sends it twice. Processes
    started meanwhile have both signals blocked: a Ctrl-C reaches the terminal's whole process group, and
    without data workers the update at hand could not be finished. Entered outside the main thread, which
    alone may set handlers, it does nothing.

    It is entered before anything is compiled: an exception out of a signal's handler, as KeyboardInterrupt,
    would come into the compiler's own code.
    """

    def __init__(self):
        self._received = 0
        self._updating = False
        self._agreed = 0
        self._previous: dict[int, object] = {}
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():
            return self
        # Starting this helper unblocks the signals again in Python 3.11, so it is started before.
        resource_tracker.ensure_running()
        # What a shell has a background job ignore stays ignored.
        taken = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, _leave_to_watcher) for number in taken}
        # The interpreter writes each signal's number here as it arrives, whatever the main thread does.
        incoming, self._outgoing = os.pipe()
        os.set_blocking(self._outgoing, False)
        self._wakeup = signal.set_wakeup_fd(self._outgoing, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, args=(incoming,), daemon=True)
        self._watcher.start()
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        return self

    def __exit__(self, kind, *_) -> None:
        if self._watcher is None:
            return
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        signal.set_wakeup_fd(self._wakeup)
        os.write(self._outgoing, b"\0")
        self._watcher.join()
        os.close(self._outgoing)
        for number, handler in self._previous.items():
            # None is a handler that was not set from Python; Python cannot set it again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if kind is None:
            self._agree()
            if self._agreed:
                # Nobody asked for it any more: it came during the last validation, for instance.
                name = signal.Signals(self._agreed).name
                _say(f"Stopped by {name} after the last step; the same command goes on from there\n")
                raise Preempted

    def should_stop(self, step: int) -> bool:
        """Whether to save and stop after update `step`: the same answer in every process.

        With several processes every one must ask after every update; they answer together every few updates,
        and where one was told to stop, all stop.
        """
        if jax.process_count() == 1 or step % _AGREE_EVERY == 0:
            self._agree()
        return self._agreed != 0

    def stop_before_updates(self) -> None:
        """Ends a run that was told to stop, before its next update; one process of several does not.

        Raises:
          Preempted: a signal came, and there is one process.
        """
        self._updating = True
        if self._received and jax.process_count() == 1:
            name = signal.Signals(self._received).name
            _say(f"Stopped by {name} before an update; the same command begins there\n")
            raise Preempted

    def _agree(self) -> None:
        self._agreed = self._received
        if jax.process_count() > 1:
            self._agreed = int(np.max(multihost_utils.process_allgather(np.int32(self._received))))

    def stop(self, step: int, say: Callable[[str], None]) -> NoReturn:
        """Ends a run that `should_stop` and that has saved update `step`.

        Raises:
          Preempted: always.
        """
        name = signal.Signals(self._agreed).name
        say(f"Stopped by {name} at step {step}, saved; the same command goes on from there")
        raise Preempted

    def _watch(self, incoming: int) -> None:
        first = 0.0
        with open(incoming, "rb", buffering=0) as stream:
            while number := ord(stream.read(1)):
                if number not in SIGNALS:
                    continue
                now = time.monotonic()
                if number == self._received and now < first + _SAME_WITHIN:
                    continue
                if self._received:
                    for worker in multiprocessing.active_children():
                        worker.kill()
                    os._exit(128 + number)
                self._received, first = number, now
                name = signal.Signals(number).name
                early = not self._updating and jax.process_count() == 1
                told = "stopping before the next step" if early else "finishing this step and saving"
                _say(f"\n{name}: {told}; a second signal exits at once\n")


def _leave_to_watcher(number, frame) -> None:
    """Being handled is what makes the interpreter write a signal to the wakeup descriptor."""


def _say(text: str) -> None:
    # Not print: the main thread may hold the stream's lock and wait for long. Whoever listened may be gone.
    with contextlib.suppress(BrokenPipeError):
        os.write(2, text.encode())
