"""Status lines: whole, bounded, and never in the way of the one who writes them."""

from __future__ import annotations

import logging
import os

import pytest

from mooncake.status import LINE_BYTES_MAX, Phase, Status, StatusLine


def test_lines_arrive_in_order() -> None:
    read_fd, write_fd = os.pipe()
    status = Status(write_fd)
    status.loading("50 %")
    status.ready()
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as pipe:
        assert [StatusLine.unpack(line) for line in pipe] == [
            StatusLine(Phase.LOADING, "50 %"),
            StatusLine(Phase.READY),
        ]


@pytest.mark.parametrize("detail", ["x" * 100_000, "\N{FULL MOON SYMBOL}" * 100_000, "\n\0\x1f" * 5000])
def test_a_long_line_is_cut_to_what_a_pipe_takes_whole(detail: str) -> None:
    line = StatusLine(Phase.FAILED, detail).pack()
    assert len(line) <= LINE_BYTES_MAX
    assert line.count(b"\n") == 1
    assert detail.startswith(StatusLine.unpack(line).detail)


def test_a_full_or_broken_pipe_is_ignored() -> None:
    read_fd, write_fd = os.pipe()
    status = Status(write_fd)
    for _ in range(100):
        status.loading("x" * 2000)
    os.close(read_fd)
    status.ready()
    os.close(write_fd)


def test_without_a_supervisor_it_logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    Status().ready("port 8000")
    Status().warning("logged already by the one who warned")
    assert caplog.messages == ["ready: port 8000"]
