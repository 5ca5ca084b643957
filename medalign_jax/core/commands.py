"""How every command begins and ends: what a user can mend is one line and a status.

    arguments = commands.ArgumentParser(...).parse_args()
    sys.exit(commands.ended(main))

Status 0: done; 1: an error; 2: a command line that means nothing; 130: stopped by Ctrl-C; 143: by
SIGTERM. What is a fault of the code keeps its stack trace.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import gc
import io
import math
import os
import re
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator

from medalign_jax.core.errors import UserError
from medalign_jax.core.local_paths import check_local

ERROR, USAGE, INTERRUPTED, TERMINATED = 1, 2, 130, 143

_AGAIN = 0.05  # seconds until a signal is asked for again
_IMPORT = "<frozen importlib._bootstrap>"  # file name of the code that every import runs through
_GO_ON = "start the same command again to go on"
_WORDS = {
    errno.ENOSPC: "the disk is full; free some space and start again",
    errno.EDQUOT: "your disk quota is used up; free some space and start again",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "permission denied; change its owner or mode, or choose another folder",
    errno.EPERM: "permission denied; change its owner or mode, or choose another folder",
    errno.ENOENT: "there is no such file or folder (any more)",
    errno.EEXIST: "there is a file of that name where a folder is needed; choose another",
    errno.ENOTDIR: "a part of this path is a file where a folder is needed",
    errno.EISDIR: "this is a folder where a file is needed",
    errno.ENAMETOOLONG: "the name is too long for this file system",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.EIO: "the disk gives read or write errors; look at its health",
    errno.ESTALE: "the network file system lost this file; start again",
}
_MEMORY = (
    "the {} is out of memory; lower train.batch_size, raise train.accumulate, or take a smaller "
    "model"
)


class ArgumentParser(argparse.ArgumentParser):
    """One that refuses an option given twice; argparse keeps the last one in silence."""

    def __init__(self, *args, **keywords):
        super().__init__(*args, **keywords)
        self.given: set[str] = set()
        self.register("action", None, _Once)
        self.register("action", "store", _Once)

    def parse_known_args(self, args=None, namespace=None):
        """As argparse; each call counts anew."""
        self.given.clear()
        return super().parse_known_args(args, namespace)


class _Once(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        if option_string and self.dest in parser.given:
            several = (
                " put all its values behind it" if self.nargs in ("+", "*") else " give it once"
            )
            parser.error(f"{option_string} is given twice, and the first would be lost;{several}")
        parser.given.add(self.dest)
        setattr(namespace, self.dest, values)


def seconds(text: str) -> float:
    """The type of an option that is a time."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time above 0, in seconds")
    return value


class UsageError(UserError):
    """A command line that means nothing; argparse ends with the same status."""


class Terminated(KeyboardInterrupt):
    """SIGTERM; ends like Ctrl-C, with a status of its own."""


def ended(
    command: Callable[[], int | None],
    after_error: Callable[[UserError], None] | None = None,
    given: argparse.Namespace | None = None,
) -> int:
    """Runs a command and says what went wrong; returns the exit status.

    Args:
      command: returns a status, or None where all went well.
      after_error: called after a UserError was printed, to say more.
      given: the command's arguments, looked through for paths that are not local.
    """
    for stream in (sys.stdout, sys.stderr):  # not every file name fits the terminal's encoding
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    try:
        with _signals_raise():
            check_local({} if given is None else vars(given))
            return command() or 0
    except Terminated as stop:
        return _stopped(stop, TERMINATED)
    except KeyboardInterrupt as stop:
        return _stopped(stop, INTERRUPTED)
    except BrokenPipeError:  # whoever read the output has left: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    except Exception as error:
        if (words := _words(error)) is None:
            raise
        print(f"error: {words}", file=sys.stderr)
        if after_error is not None and isinstance(error, UserError):
            ended(functools.partial(after_error, error))  # it writes files, which may fail too
        return USAGE if isinstance(error, UsageError) else ERROR


def _stopped(stop: KeyboardInterrupt, status: int) -> int:
    print(f"stopped: {str(stop) or _GO_ON}", flush=True)
    return status


def _words(error: BaseException) -> str | None:
    """One line for what a user can mend; None for a fault of the code."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError):
        return _MEMORY.format("computer")
    if isinstance(error, OSError):
        return _of_system(error)
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text:  # XLA's, whose class is not public
        return _MEMORY.format("device")
    # TensorStore, which writes checkpoints, hands on what the system said in its own words.
    if found := re.search(r"\[OS error (\d+)", text):
        path = re.search(r'"(/[^"]+)"', text)
        return _of_system(OSError(int(found[1]), "", path[1] if path else None))
    return None


def _of_system(error: OSError) -> str:
    reason = _WORDS.get(error.errno) or error.strerror or " ".join(str(error).split())
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return ": ".join([" -> ".join(names), reason] if names else [reason])


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Training has its own handlers, which save first, and puts these back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kinds = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background of a shell
        del kinds[signal.SIGINT]

    def stop(number: int, frame: types.FrameType | None) -> None:
        if collecting or _would_harm(frame):
            again = threading.Timer(_AGAIN, os.kill, (os.getpid(), number))
            again.daemon = True  # a process that ends meanwhile has heard enough
            again.start()
        else:
            raise kinds[number]

    collecting = False

    def watch(phase: str, _: object) -> None:
        nonlocal collecting
        collecting = phase == "start"  # finalisers run until the other, "stop"

    before = {number: signal.signal(number, stop) for number in kinds}
    gc.callbacks.insert(0, watch)
    try:
        yield
    finally:
        gc.callbacks.remove(watch)
        for number, handler in before.items():
            signal.signal(number, handler)


def _would_harm(frame: types.FrameType | None) -> bool:
    """Whether nothing must be raised here.

    What is raised in a finaliser or in a callback of the garbage collector is lost, and JAX has one
    of these. An import that is interrupted fails for a reason that it makes up, or with a
    segmentation fault.
    """
    callbacks = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        code = frame.f_code
        if code in callbacks or code.co_name == "__del__" or code.co_filename == _IMPORT:
            return True
        frame = frame.f_back
    return False
