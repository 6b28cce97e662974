"""What is written is read again; a file is replaced as a whole or not at all."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from itertools import combinations, takewhile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mooncake.core.errors import TraceError
from mooncake.trace.files import open_trace, write_trace
from mooncake.trace.types import TraceRequest

SECOND = 1_000_000_000


@st.composite
def traces(draw: st.DrawFn, block_tokens: int, clock_ns: int) -> list[TraceRequest]:
    """From its own zero, with ids that no request has twice."""
    requests: list[TraceRequest] = []
    at = 0
    for _ in range(draw(st.integers(1, 6))):
        num_blocks = draw(st.integers(1, 4))
        input_length = draw(st.integers((num_blocks - 1) * block_tokens + 1, num_blocks * block_tokens))
        ids = draw(st.lists(st.integers(-5, 1 << 62), min_size=num_blocks, max_size=num_blocks, unique=True))
        requests.append(TraceRequest(at, input_length, draw(st.integers(1, 2000)), tuple(ids)))
        at += clock_ns * draw(st.integers(0, 100_000))
    return requests


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(traces(512, 1000), st.sampled_from(["trace.jsonl", "trace.jsonl.gz"]))
def test_mooncake_round_trip(tmp_path: Path, requests: list[TraceRequest], name: str) -> None:
    path = tmp_path / name
    assert write_trace(path, requests) == len(requests)
    reader = open_trace(path)
    assert list(reader) == requests
    assert reader.info.format.name == "mooncake" and not reader.info.synthetic


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(traces(16, 1_000_000))
def test_bailian_round_trip(tmp_path: Path, requests: list[TraceRequest]) -> None:
    """Ids come back as ids of prefixes: which prompts share how much is what stays."""
    path = tmp_path / "trace"
    write_trace(path, requests, "bailian")
    found = list(open_trace(path))
    assert [(r.arrival_ns, r.input_length, r.output_length) for r in found] == [
        (r.arrival_ns, r.input_length, r.output_length) for r in requests
    ]
    for (one, one_found), (other, other_found) in combinations(zip(requests, found, strict=True), 2):
        assert num_shared(one, other) == num_shared(one_found, other_found)


def num_shared(one: TraceRequest, other: TraceRequest) -> int:
    pairs = zip(one.hash_ids or (), other.hash_ids or (), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def test_what_is_synthetic_says_so_on_every_line(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    for name, num_blocks in (("mooncake", 1), ("bailian", 2)):
        requests = [TraceRequest(at * SECOND, 20, 1, tuple(range(num_blocks))) for at in range(3)]
        write_trace(path, requests, name, synthetic=True)
        assert all(json.loads(line)["synthetic"] is True for line in path.read_text().splitlines())
        reader = open_trace(path)
        assert reader.info.synthetic and reader.info.format.name == name


def test_whole_milliseconds_are_written_as_such(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    write_trace(
        path, [TraceRequest(0, 5, 1, (0,)), TraceRequest(1_500_000, 5, 1, (0,)), TraceRequest(2 * SECOND, 5, 1, (0,))]
    )
    assert [line.partition(",")[0] for line in path.read_text().splitlines()] == [
        '{"timestamp":0',
        '{"timestamp":1.5',
        '{"timestamp":2000',
    ]


def test_equal_requests_make_equal_compressed_files(tmp_path: Path) -> None:
    requests = [TraceRequest(0, 5, 1, (0,))]
    for name in ("a.gz", "b.gz"):
        write_trace(tmp_path / name, requests)
    content = (tmp_path / "a.gz").read_bytes()
    assert content == (tmp_path / "b.gz").read_bytes() and gzip.decompress(content).count(b"\n") == 1


def test_a_file_is_replaced_when_all_is_written(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text("before")

    def breaking() -> Iterator[TraceRequest]:
        yield TraceRequest(0, 5, 1, (0,))
        assert path.read_text() == "before"
        raise TraceError("broken")

    with pytest.raises(TraceError, match="broken"):
        write_trace(path, breaking())
    assert [each.name for each in tmp_path.iterdir()] == ["trace"] and path.read_text() == "before"
    with pytest.raises(TraceError, match="Is a directory"):
        write_trace(tmp_path, [])
    with pytest.raises(TraceError, match="No such file or directory"):
        write_trace(tmp_path / "nowhere" / "trace", [])
