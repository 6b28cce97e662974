"""What is wrong with a trace is one sentence with the file, the line and the reason."""

from __future__ import annotations

import gzip
import os
import random
import time
from pathlib import Path

import pytest

from mooncake.core.errors import MooncakeError, TraceError
from mooncake.trace.files import check_trace, open_trace
from tests.trace.helpers import bailian_line, mooncake_line, written
from tests.trace.test_formats import AZURE, BURSTGPT

GOOD = mooncake_line(0)
KNOWN = "begins no trace of a known format (mooncake, bailian, azure, burstgpt)"


def failure(path: Path, name: str | None = None) -> str:
    """Without the path, which must come first."""
    with pytest.raises(TraceError) as caught:
        check_trace(path, name)
    sentence = str(caught.value)
    assert sentence.startswith(f"trace {path}") and "\n" not in sentence
    return sentence.removeprefix(f"trace {path}").removeprefix(", ").removeprefix(": ")


def without(line: str, field: str) -> str:
    return line.replace(f'"{field}"', '"other"')


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ((GOOD, without(GOOD, "output_length")), "line 2: missing required field output_length"),
        ((GOOD, without(GOOD, "hash_ids")), "line 2: missing required field hash_ids"),
        ((mooncake_line(input_length=600, hash_ids=None),), "line 1: hash_ids = None: expected array, got null"),
        ((GOOD, mooncake_line(output_length="5")), "line 2: output_length = '5': expected int, got str"),
        ((GOOD, mooncake_line(timestamp="1")), "line 2: timestamp = '1': expected int | float, got str"),
        ((GOOD, mooncake_line(timestamp=True)), "line 2: timestamp = True: expected int | float, got bool"),
        ((GOOD, mooncake_line(hash_ids=[1, 2.5])), "line 2: hash_ids[1] = [1, 2.5]: expected int, got float"),
        (
            (mooncake_line(hash_ids=[1, 1 << 63]),),
            "line 1: hash_ids[1] = [1, 9223372036854775808]: expected int <= 9223372036854775807",
        ),
        ((GOOD, mooncake_line(-1)), "line 2: timestamp = -1: expected int >= 0"),
        ((mooncake_line(-0.5),), "line 1: timestamp = -0.5: expected float >= 0.0"),
        ((GOOD, mooncake_line(1e18)), "line 2: timestamp = 1e+18: expected float <= 3000000000000.0"),
        ((mooncake_line(7000), mooncake_line(5500)), "line 2: its timestamp is 1.5 s before that of an earlier line"),
        ((GOOD, mooncake_line(3), mooncake_line(2)), "line 3: its timestamp is 0.001 s before that of an earlier line"),
        ((GOOD, GOOD.replace('"timestamp": 0', '"timestamp": NaN')), "line 2: not JSON: it has no NaN and no Infinity"),
        ((GOOD.replace(": 0,", ": Infinity,"),), "line 1: not JSON: it has no NaN and no Infinity"),
        ((GOOD.replace(": 0,", ": 1e999,"),), "line 1: not JSON: number out of range"),
        (
            (GOOD, mooncake_line(1, 1025, hash_ids=[0, 1])),
            "line 2: hash_ids has 2 ids, and input_length = 1025 needs 3, one for each 512 tokens",
        ),
        (
            (mooncake_line(1, 512, hash_ids=[0, 1]),),
            "line 1: hash_ids has 2 ids, and input_length = 512 needs 1, one for each 512 tokens",
        ),
        ((mooncake_line(hash_ids=[4, 4]),), "line 1: hash_ids has an id twice, and an id stands for a whole prefix"),
        ((GOOD, mooncake_line(0, 0)), "line 2: input_length = 0: expected int >= 1"),
        ((GOOD, mooncake_line(0, 600, -1)), "line 2: output_length = -1: expected int >= 0"),
        ((mooncake_line(0, 1 << 31, 1, hash_ids=[]),), "line 1: input_length = 2147483648: expected int <= 1073741824"),
        ((GOOD, GOOD[:20]), "line 2: not JSON: input data was truncated"),
        ((GOOD, GOOD + " " + GOOD), "line 2: not JSON: trailing characters (byte 79)"),
        ((GOOD, "", GOOD), "line 2: empty"),
        ((GOOD, "[1, 2]"), "line 2: expected a JSON object, got '[1, 2]'"),
        ((GOOD, '{"a": ' + "[" * 100_000), "line 2: nested too deeply"),
        ((mooncake_line(0, 600, 0),), "all requests failed (1), without output tokens"),
        ((), "empty"),
        (("", " ", ""), "empty"),
        (("hello", GOOD), f"line 1: 'hello' {KNOWN}"),
        (('{"a": 1}', GOOD), f"line 1: '{{\"a\": 1}}' {KNOWN}"),
        (
            (bailian_line(1), bailian_line(2, 1.5, hash_ids=[1])),
            "line 2: hash_ids has 1 ids, and input_length = 20 needs 2, one for each 16 tokens",
        ),
        ((bailian_line(1, 2.0), bailian_line(2, 1.5)), "line 2: its timestamp is 0.5 s before that of an earlier line"),
        ((bailian_line(1), bailian_line("b")), "line 2: chat_id = 'b': expected int, got str"),
        ((*AZURE, "2023-11-16 18:15:46.1,374"), "line 4: 2 fields, and the header has 3"),
        (
            (*AZURE, "2023-11-16 18:15:46.1,374,x"),
            "line 4: GeneratedTokens = 'x': expected a whole number from 0 to 1073741824",
        ),
        (
            (*AZURE, "2023-11-16 18:15:46.1,0,4"),
            "line 4: ContextTokens = '0': expected a whole number from 1 to 1073741824",
        ),
        (
            (*AZURE, "2023-11-16 18:15:46.1,-3,4"),
            "line 4: ContextTokens = '-3': expected a whole number from 1 to 1073741824",
        ),
        (
            (*AZURE, f"2023-11-16 18:15:46.1,{'9' * 30},4"),
            f"line 4: ContextTokens = '{'9' * 30}': expected a whole number from 1 to 1073741824",
        ),
        ((*AZURE, "2023-11-16 18:59:59.1,3,4"), "line 4: its timestamp is 1.89517 s before that of an earlier line"),
        ((*AZURE, "", AZURE[1]), "line 4: empty"),
        ((AZURE[0],), "no requests"),
        ((BURSTGPT[0], "nan,m,1,1,2,log"), "line 2: Timestamp = 'nan': expected seconds, from 0 to 3000000000"),
        ((BURSTGPT[0], "-5,m,1,1,2,log"), "line 2: Timestamp = '-5': expected seconds, from 0 to 3000000000"),
        (
            (BURSTGPT[0], "5,m,1.5,1,2,log"),
            "line 2: Request tokens = '1.5': expected a whole number from 1 to 1073741824",
        ),
        ((BURSTGPT[0], "5,m,0,1,1,log"), "line 2: Request tokens = '0': expected a whole number from 1 to 1073741824"),
        ((BURSTGPT[0], '5,"a,b",1,1,2,log'), "line 2: 7 fields, and the header has 6"),
        ((*BURSTGPT[:2], "4.5,m,1,1,2,log"), "line 3: its timestamp is 0.5 s before that of an earlier line"),
        ((BURSTGPT[0], "5,m,1,0,1,log"), "all requests failed (1), without output tokens"),
        ((GOOD, bailian_line()), "line 2: a line of the bailian format, and the trace is mooncake"),
        ((bailian_line(), GOOD), "line 2: a line of the mooncake format, and the trace is bailian"),
        ((*AZURE, GOOD), "line 4: a line of the mooncake format, and the trace is azure"),
        ((GOOD, *BURSTGPT), "line 2: a line of the burstgpt format, and the trace is mooncake"),
        ((*AZURE, *BURSTGPT), "line 4: a line of the burstgpt format, and the trace is azure"),
        ((*AZURE, *AZURE), "line 4: a header again, as if several files were joined"),
    ],
)
def test_bad_lines(tmp_path: Path, lines: tuple[str, ...], sentence: str) -> None:
    assert failure(written(tmp_path, *lines)).partition(", in '")[0] == sentence


def test_what_is_no_json_is_shown_in_part(tmp_path: Path) -> None:
    begin = '{"timestamp": 0, "input_length": 600, "output_length": 5, "'
    reason = f"line 2: not JSON: trailing characters (byte 79), in '{begin}…"
    assert failure(written(tmp_path, GOOD, f"{GOOD} {GOOD}")) == reason


@pytest.mark.parametrize(
    "text",
    [
        "2023-13-16 18:15:46.1",
        "2023-11-16T18:15:46",
        "2023-11-16 18:15:60",
        "18:15:46",
        "",
        "2023-11-16 18:15:46.1+02:00",
    ],
)
def test_bad_times(tmp_path: Path, text: str) -> None:
    reason = f"line 4: TIMESTAMP = {text!r}: expected a time such as 2023-11-16 18:15:46.6805900"
    assert failure(written(tmp_path, *AZURE, f"{text},1,1")) == reason


def test_a_format_that_was_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    assert failure(path, "bailian").endswith(" begins no bailian trace")
    with pytest.raises(
        TraceError, match="trace format 'parquet': not known; there are mooncake, bailian, azure, burstgpt"
    ):
        open_trace(path, "parquet")


def test_a_line_far_into_a_file_is_named(tmp_path: Path) -> None:
    lines = [mooncake_line(number) for number in range(20_000)]
    assert (
        failure(written(tmp_path, *lines, mooncake_line(20_000, 0), *lines))
        == "line 20001: input_length = 0: expected int >= 1"
    )


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert failure(tmp_path / "pipe") == failure(tmp_path) == "not a regular file; a trace is read more than once"
    assert failure(tmp_path / "nowhere") == "No such file or directory"
    compressed = gzip.compress("\n".join([GOOD] * 1000).encode())
    path = tmp_path / "trace"
    path.write_bytes(compressed[:-20])
    assert failure(path).startswith("damaged gzip file: ")
    path.write_bytes(compressed[:40] + b"xxxx" + compressed[44:])
    assert failure(path).startswith("damaged gzip file: ")


def test_a_gigabyte_of_junk_fails_at_once(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    began = time.process_time()
    for start in (b"", GOOD.encode() + b"\n"):
        with path.open("wb") as file:
            file.write(start)
            file.truncate(1 << 30)  # zeros that take no space
        assert failure(path) == f"line {2 if start else 1}: longer than 16 MiB"
    assert time.process_time() - began < 5


def test_random_bytes_are_no_trace(tmp_path: Path) -> None:
    rng = random.Random(5)
    for _ in range(50):
        path = tmp_path / "trace"
        path.write_bytes(rng.randbytes(rng.randrange(1, 2000)))
        assert failure(path)


def test_an_error_of_a_trace_is_one_of_ours() -> None:
    assert TraceError.__bases__ == (MooncakeError,)
