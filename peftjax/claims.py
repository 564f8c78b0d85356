"""Who does what, where several processes or machines share a folder: claims without locks.

A claim is a file `KEY.N` made with O_EXCL, which one process alone can do, on a network file system too. Whoever holds
the highest N of a key has it. Its holder touches the file as long as it lives; one that was not touched for long, or
whose process is known to be dead, is followed by making `KEY.N+1`, which again one process alone can do: no file is
ever taken away from another, so there is nothing to race for. A holder that was only asleep finds the higher number.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Collection
from pathlib import Path


class Claims:
    """The claims that this process has in a folder.

    Args:
      folder: for the files.
      stale: seconds without a touch after which a claim counts as dead.

    Attributes:
      held: key -> number.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> with Claims(folder) as ours, Claims(folder) as theirs:
    ...     print(ours.take("lora"), theirs.take("lora"))
    True False
    """

    def __init__(self, folder: str | Path, stale: float = 600.0):
        self.folder, self.stale = Path(folder), stale
        self.folder.mkdir(parents=True, exist_ok=True)
        self.held: dict[str, int] = {}
        self._own = uuid.uuid4().hex  # in every claim, as numbers begin anew where all have been given back
        self._stop = threading.Event()
        self._touching = threading.Thread(target=self._touch, daemon=True)
        self._probe = self.folder / f"clock-{socket.gethostname()}-{os.getpid()}-{id(self)}"

    def __enter__(self) -> "Claims":
        self._touching.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._touching.join()
        for key in [*self.held]:
            self.release(key)
        self._probe.unlink(missing_ok=True)

    def take(self, key: str) -> bool:
        """Whether the key is now this process's."""
        newest = self._newest(key)
        if newest is not None and not self._dead(self._file(key, newest)):
            return False
        number = 0 if newest is None else newest + 1
        try:
            handle = os.open(self._file(key, number), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as f:
            f.write(json.dumps(_identity() | {"by": self._own}))
        self.held[key] = number
        return True

    def release(self, key: str) -> None:
        """Gives the key back, and clears away what dead processes left of it; what others have now stays."""
        number = self.held[key]
        ours = self._is_ours(key)
        del self.held[key]
        if not ours:
            return
        for file in sorted(self._files(key), key=lambda f: int(f.suffix[1:])):
            if int(file.suffix[1:]) <= number:
                file.unlink(missing_ok=True)

    def lost(self) -> list[str]:
        """The keys that others have taken over, or whose files are gone."""
        return [key for key, n in [*self.held.items()] if self._newest(key) != n or not self._is_ours(key)]

    def others(self, keys: Collection[str]) -> int:
        """How many living processes other than this hold some of the keys."""
        newest: dict[str, int] = {}
        for file in self._files("*"):
            if (key := file.stem) in keys and key not in self.held:
                newest[key] = max(newest.get(key, 0), int(file.suffix[1:]))
        files = [self._file(key, n) for key, n in newest.items()]
        return len({_said(file).get("by") for file in files if not self._dead(file)} - {None})

    def _is_ours(self, key: str) -> bool:
        return _said(self._file(key, self.held[key])).get("by") == self._own

    def _file(self, key: str, number: int) -> Path:
        return self.folder / f"{key}.{number}"

    def _files(self, key: str) -> list[Path]:
        return [f for f in self.folder.glob(f"{key}.*") if f.suffix[1:].isdigit()]

    def _newest(self, key: str) -> int | None:
        return max((int(f.suffix[1:]) for f in self._files(key)), default=None)

    def _dead(self, file: Path) -> bool:
        try:
            holder, touched = _said(file), file.stat().st_mtime
        except FileNotFoundError:
            return False  # given back just now: look again later
        here = _identity()
        if (
            here["machine"]
            and here["machine"] == holder.get("machine")
            and _started(holder["pid"]) != holder["started"]
        ):
            return True
        return self._now() - touched > self.stale

    def _now(self) -> float:
        """The time by the clock of the file system, which touches go by."""
        self._probe.touch()
        now = self._probe.stat().st_mtime
        self._probe.unlink(missing_ok=True)  # so that a process that is killed leaves none
        return now

    def _touch(self) -> None:
        while not self._stop.wait(min(self.stale / 10, 30.0)):
            for key, number in [*self.held.items()]:
                try:
                    os.utime(self._file(key, number))
                except OSError:  # given back, or the file system is away
                    continue


def _said(file: Path) -> dict:
    """What is in a claim; nothing if it is gone, or made and not yet written."""
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _identity() -> dict:
    """What tells whether a process lives: the boot and the namespace of its number, where there is /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        machine = ""
    pid = os.getpid()
    return {"host": socket.gethostname(), "machine": machine, "pid": pid, "started": _started(pid), "at": time.time()}


def _started(pid: int) -> str:
    """When the process with that number began, in clock ticks since boot; '' where there is none, or no /proc."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    state, *fields = status.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]
