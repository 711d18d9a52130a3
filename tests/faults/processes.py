"""
Processes that die at a chosen moment: at a time, or at one of the things that they do to files below a folder.

File events are opening for writing, renaming, removing, and making a folder, as Python's audit hooks report them, and
what `torch.save` and safetensors write without Python's knowledge. Dying at an event means before it happens. It can
also tear the file that was written last, or take away from the disk what was not synced, as a power failure does.
"""

import ctypes
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


KILLED = -signal.SIGKILL


@dataclass(frozen=True)
class KillAt:
    """
    Dies at a file event.

    Args:
        event (`int`): Number of the event below `root`, from 0.
        root (`pathlib.Path`): Folder to watch.
        mode (`str`):
            `"before"`: just before the event. `"torn"`: also cuts the file that was opened for writing last to a
            random length. `"power"`: also takes back all that was not synced: contents, and renames in folders.
        seed (`int`): Of random lengths.
    """

    event: int
    root: Path
    mode: Literal["before", "torn", "power"] = "before"
    seed: int = 0


@dataclass(frozen=True)
class KillAfter:
    """Dies after so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Exit:
    """
    How a forked process ended.

    Args:
        code (`int`): Exit code, or the negative number of the signal that ended it.
        value: What the function returned.
        error (`Exception`, *optional*): What it raised.
        text (`str`): The traceback of `error`.
    """

    code: int
    value: Any = None
    error: Exception | None = None
    text: str = ""

    @property
    def was_killed(self) -> bool:
        return self.code == KILLED


def forked(function: Callable[..., Any], *args: Any, kill: KillAt | KillAfter | None = None, **kwargs: Any) -> Exit:
    """
    Calls a function in a forked child, which has all modules in memory already, and waits for it. If this process is
    interrupted, the child is killed.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        os.close(reader)
        code = 1
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)  # the limit of a try is its parent's
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # dies with its parent (PR_SET_PDEATHSIG)
            if isinstance(kill, KillAt):
                Watch(kill.root, kill).start()
            answer = _answer(function, *args, **kwargs)
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(answer)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    try:
        if isinstance(kill, KillAfter):
            _wait(child, kill.seconds)
        with os.fdopen(reader, "rb") as pipe:
            answer = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    if code or not answer:
        return Exit(code)
    value, error, text = pickle.loads(answer)
    return Exit(code, value, error, text)


def _answer(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bytes:
    try:
        return pickle.dumps((function(*args, **kwargs), None, ""))
    except Exception as error:
        text = traceback.format_exc()
        try:
            answer = pickle.dumps((None, error, text))
            pickle.loads(answer)
            return answer
        except Exception:  # its class cannot be pickled
            return pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}"), text))


def _wait(child: int, seconds: float) -> None:
    """Kills a child after so many seconds, unless it has ended before; does not reap it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(min(0.002, max(end - time.monotonic(), 0)))
    os.kill(child, signal.SIGKILL)


def count_events(function: Callable[..., Any], *args: Any, root: Path, **kwargs: Any) -> int:
    """How many file events a function makes below a folder; it is called in a forked child."""

    def counted() -> int:
        watch = Watch(root)
        watch.start()
        function(*args, **kwargs)
        return watch.count

    ended = forked(counted)
    if ended.error is not None:
        raise ended.error
    return int(ended.value)


class Watch:
    """
    Counts the file events of this process below a folder, and ends it at one of them. An audit hook cannot be taken
    away again, so this is for processes that end soon.
    """

    def __init__(self, root: Path, kill: KillAt | None = None) -> None:
        self.root, self.kill, self.count = root.resolve(), kill, 0
        self.is_busy = False  # with its own files
        self.last: Path | None = None  # that was opened for writing
        self.dirty: dict[Path, bytes | None] = {}  # not synced since it was written, with what was synced before
        self.renamed: list[tuple[Path, Path, Path | None]] = []  # from, to, what stood there; the folder is not synced

    def start(self) -> None:
        """Begins to watch."""
        import safetensors.torch
        import torch

        if self.kill is not None and self.kill.mode == "power":
            self.backups = Path(tempfile.mkdtemp(prefix="trl_gopd_backup_", dir=self.root.parent))
        sys.addaudithook(self._hook)
        self._watch_native(safetensors.torch, "serialize_file", 1)
        self._watch_native(torch, "save", 1)
        fsync = os.fsync

        def syncing(descriptor: Any) -> None:
            fsync(descriptor)
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            self._synced(Path(os.readlink(f"/proc/self/fd/{number}")))

        os.fsync = syncing

    def _watch_native(self, module: Any, name: str, position: int) -> None:
        original = getattr(module, name)

        def writing(*args: Any, **kwargs: Any) -> Any:
            target = args[position] if len(args) > position else kwargs.get("filename", kwargs.get("f"))
            if isinstance(target, str | os.PathLike):
                self._event("open", Path(target))
            return original(*args, **kwargs)

        setattr(module, name, writing)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.is_busy:
            return
        if event == "open":
            path, mode, flags = args
            writes = (
                any(letter in mode for letter in "wax+")
                if isinstance(mode, str)
                else flags & (os.O_WRONLY | os.O_RDWR)
            )
            if writes and isinstance(path, str | bytes | os.PathLike):
                self._event("open", Path(os.fsdecode(path)))
        elif event == "os.rename" and isinstance(args[0], str | bytes | os.PathLike):
            self._event("rename", Path(os.fsdecode(args[0])), Path(os.fsdecode(args[1])))
        elif event in ("os.remove", "os.mkdir", "os.rmdir") and isinstance(args[0], str | bytes | os.PathLike):
            self._event(event.removeprefix("os."), Path(os.fsdecode(args[0])))

    def _event(self, kind: str, path: Path, target: Path | None = None) -> None:
        path = Path(os.path.abspath(path))
        if not path.is_relative_to(self.root):
            return
        self.is_busy = True
        if self.kill is not None and self.count == self.kill.event:
            self._die()
        self.count += 1
        if kind == "open":
            self.last = path
        if self.kill is not None and self.kill.mode == "power":
            self._remember(kind, path, None if target is None else Path(os.path.abspath(target)))
        self.is_busy = False

    # Power failures

    def _remember(self, kind: str, path: Path, target: Path | None) -> None:
        if kind == "open":
            # What was synced before is lost, too, if the file is opened to be written anew.
            self.dirty.setdefault(path, None)
        elif kind == "rename" and target is not None:
            before = None
            if target.is_file():
                before = self.backups / str(len(self.renamed))
                os.link(target, before)
            self.renamed.append((path, target, before))
            for old in [name for name in self.dirty if name == path or path in name.parents]:
                self.dirty[target / old.relative_to(path) if old != path else target] = self.dirty.pop(old)
        elif kind == "remove":
            self.dirty.pop(path, None)

    def _synced(self, path: Path) -> None:
        self.dirty.pop(path, None)
        self.renamed = [entry for entry in self.renamed if entry[1].parent != path]

    def _die(self) -> None:
        assert self.kill is not None
        lengths = random.Random(f"{self.kill.seed}:{self.kill.event}")
        if self.kill.mode == "torn" and self.last is not None and self.last.is_file():
            os.truncate(self.last, lengths.randint(0, self.last.stat().st_size))
        if self.kill.mode == "power":
            for path in self.dirty:
                if path.is_file():
                    os.truncate(path, lengths.randint(0, path.stat().st_size))
            for source, target, before in reversed(self.renamed):
                if target.exists() and lengths.random() < 0.5:  # a rename may have reached the disk or not
                    target.rename(source)
                    if before is not None:
                        before.rename(target)
            shutil.rmtree(self.backups, ignore_errors=True)
        os.kill(os.getpid(), signal.SIGKILL)
