"""One process a folder: an advisory lock that ends with its holder, however that dies, and says who holds it."""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nfnet_lib.config import ConfigError

LOCK = ".lock"
NAME_SECONDS = 2  # at most, from a lock's being taken to its holder's name in it, on a busy machine


class Holder(NamedTuple):
    """host: name of the machine; pid: of the process there."""

    host: str
    pid: int

    @property
    def here(self) -> bool:
        return self.host == socket.gethostname()

    @property
    def alive(self) -> bool | None:
        """Whether the process is there; None on another machine, where nobody can tell."""
        if not self.here:
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True


@contextlib.contextmanager
def exclusive(folder: Path, what: str, wait_seconds: float | int = 0, *, shared: bool = False) -> Iterator[None]:
    """Hold `folder`'s lock, made with it; ConfigError naming `what` and the holder where another keeps it too long.

    shared: with others that hold it so, but with none that holds it alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + wait_seconds
    with (folder / LOCK).open("a+") as file:
        while True:
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                now = holder(folder)
                named = now is not None and now.alive is not False  # else the holder has yet to write its name
                if time.monotonic() >= end + (0 if named else NAME_SECONDS):
                    who = f" (process {now.pid} on {now.host})" if now else ""
                    raise ConfigError(f"{what}: another process is running {folder.name}{who}") from None
                time.sleep(0.25)
        file.seek(0)
        file.truncate()
        file.write(f"{socket.gethostname()} {os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a full disk must not hide what else went wrong
                file.truncate(0)


def held(folder: Path) -> bool | None:
    """Whether the named holder of `folder`'s lock still has it: a number may be another process's by now, or a zombie's.

    None where nobody is named, or on another machine, where nobody can tell.
    """
    named = holder(folder)
    if named is None or not named.here:
        return None
    try:
        with (folder / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return named.alive


def holder(folder: Path) -> Holder | None:
    """Who holds the lock of `folder`, or held it last and was killed; None where it was given back or never taken."""
    try:
        host, pid = (folder / LOCK).read_text().split()
        return Holder(host, int(pid))
    except (OSError, ValueError):
        return None
