"""What a process tells the supervisor about itself: one JSON line per change, over an inherited pipe.

    starting -> loading -> ready -> draining
       any  -> failed        a sentence for the screen, before the process exits
       any  -> warning       a log record worth showing; changes nothing

A process without a supervisor logs the same instead. Reporting never blocks and never fails:
a full or broken pipe loses the line.
"""

from __future__ import annotations

import ctypes
import enum
import logging
import os
import signal

import msgspec

LINE_BYTES_MAX = 4096
"""A pipe takes writes up to this size whole (PIPE_BUF), so lines of several threads do not mix."""

_PR_SET_PDEATHSIG = 1
_log = logging.getLogger("mooncake")


def die_with(parent_pid: int, by: signal.Signals = signal.SIGTERM) -> None:
    """The kernel sends this signal when the parent dies, even by kill -9; a parent that died before is noticed here. A parent
    with several threads sends it several times, one right after the other."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, by)
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), by)


class Phase(enum.StrEnum):
    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    WARNING = "warning"
    FAILED = "failed"


class StatusLine(msgspec.Struct, frozen=True):
    stage: Phase
    detail: str = ""

    def pack(self) -> bytes:
        line = msgspec.json.encode(self) + b"\n"
        if len(line) <= LINE_BYTES_MAX:
            return line
        return StatusLine(self.stage, self.detail[: LINE_BYTES_MAX // 8]).pack()

    @staticmethod
    def unpack(line: bytes) -> StatusLine:
        """Raises msgspec.DecodeError or ValidationError (a DecodeError) if the line is not one of ours."""
        return msgspec.json.decode(line, type=StatusLine)


class Status:
    """The writing end. fd: the pipe, or None to log."""

    def __init__(self, fd: int | None = None) -> None:
        self._fd = fd
        if fd is not None:
            os.set_blocking(fd, False)
            os.set_inheritable(fd, False)

    def starting(self, detail: str = "") -> None:
        self._report(Phase.STARTING, detail)

    def loading(self, detail: str = "") -> None:
        self._report(Phase.LOADING, detail)

    def ready(self, detail: str = "") -> None:
        self._report(Phase.READY, detail)

    def draining(self, detail: str = "") -> None:
        self._report(Phase.DRAINING, detail)

    def failed(self, detail: str) -> None:
        self._report(Phase.FAILED, detail)

    def warning(self, detail: str) -> None:
        """Used by the log handler only; elsewhere call logging.warning, which comes here."""
        if self._fd is not None:
            self._write(StatusLine(Phase.WARNING, detail))

    def _report(self, stage: Phase, detail: str) -> None:
        if self._fd is None:
            _log.info("%s%s", stage, f": {detail}" if detail else "")
        else:
            self._write(StatusLine(stage, detail))

    def _write(self, line: StatusLine) -> None:
        assert self._fd is not None
        try:
            os.write(self._fd, line.pack())
        except OSError:  # full, or the supervisor is gone: nobody reads it
            return


class StatusHandler(logging.Handler):
    """Shows this process's warnings and errors on the supervisor's screen; what ends the process goes there by `failed`."""

    def __init__(self, status: Status) -> None:
        super().__init__(logging.WARNING)
        self._status = status

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.CRITICAL:
            self._status.warning(record.getMessage())
