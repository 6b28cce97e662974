"""Every format: detected by content, and read to the number."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake.trace.files import check_trace, detect, open_trace
from mooncake.trace.formats.bailian import chained
from mooncake.trace.types import TraceRequest
from tests.trace.helpers import bailian_line, mooncake_line, real_trace, written

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens",
    "2023-11-16 18:59:59.6805900,374,44",
    "2023-11-16 19:00:00.9951691,396,109",
)
BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type",
    "5,ChatGPT,472,18,490,Conversation log",
    "45,ChatGPT,1087,0,1087,Conversation log",
    "45.5,GPT-4,417,276,693,API log",
)


def read(path: Path) -> list[TraceRequest]:
    return list(open_trace(path))


def test_mooncake(tmp_path: Path) -> None:
    path = written(tmp_path, mooncake_line(27000, 600, 5), mooncake_line(27001.5, 512, 6, hash_ids=[9], note="x"))
    assert detect(path).name == "mooncake" and detect(path).block_tokens == 512
    assert read(path) == [TraceRequest(0, 600, 5, (0, 1)), TraceRequest(1_500_000, 512, 6, (9,))]


def test_azure(tmp_path: Path) -> None:
    path = written(tmp_path, *AZURE)
    assert detect(path).name == "azure" and not detect(path).has_prefixes
    assert read(path) == [TraceRequest(0, 374, 44), TraceRequest(1_314_579_100, 396, 109)]


def test_azure_with_another_order_of_columns_an_offset_and_no_fraction(tmp_path: Path) -> None:
    lines = (
        "GeneratedTokens,TIMESTAMP,ContextTokens",
        "1,2024-02-28 23:59:59+00:00,10",
        "2,2024-02-29 00:00:00.5+00:00,20",
    )
    assert read(written(tmp_path, *lines)) == [TraceRequest(0, 10, 1), TraceRequest(1_500_000_000, 20, 2)]


def test_burstgpt_leaves_out_what_failed(tmp_path: Path) -> None:
    reader = open_trace(written(tmp_path, *BURSTGPT))
    assert reader.info.format.name == "burstgpt" and not reader.info.format.has_prefixes
    assert list(reader) == [TraceRequest(0, 472, 18), TraceRequest(40_500_000_000, 417, 276)]
    assert reader.num_skipped == 1


def test_newer_burstgpt_has_sessions(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type",
        "19440110.0,a-b,3.5,ChatGPT,10,2,12,Conversation log",
        "19440110.25,,3.5,GPT-4,20,3,23,API log",
    )
    assert read(path) == [TraceRequest(0, 10, 2, None, "a-b"), TraceRequest(250_000_000, 20, 3)]


def test_bailian_follows_chats_to_their_beginning(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        bailian_line(5, 61.114),
        bailian_line(6, 61.115),
        bailian_line(8, 62, parent_chat_id=5, turn=2),
        bailian_line(9, 63, parent_chat_id=8, turn=3),
        bailian_line(10, 64, parent_chat_id=4),
    )
    assert detect(path).name == "bailian" and detect(path).block_tokens == 16
    requests = read(path)
    assert [request.session for request in requests] == ["5", "6", "5", "5", "10"]
    assert [request.arrival_ns for request in requests[:3]] == [0, 1_000_000, 886_000_000]
    assert len({request.hash_ids for request in requests}) == 1


@given(st.lists(st.lists(st.integers(0, 2), max_size=4).map(tuple), max_size=8))
def test_chained_ids_are_equal_where_prefixes_are(prompts: list[tuple[int, ...]]) -> None:
    of_prefix: dict[tuple[int, ...], int] = {}
    for prompt, ids in zip(prompts, chained(prompts), strict=True):
        for end, chained_id in enumerate(ids, 1):
            assert of_prefix.setdefault(prompt[:end], chained_id) == chained_id
    assert len(set(of_prefix.values())) == len(of_prefix)


def test_chained_ids_do_not_depend_on_what_else_is_in_the_file() -> None:
    prompts = [(1, 2, 3), (), ((1 << 63) - 1, -5), (1, 2)]
    assert chained(prompts) == [chained([prompt])[0] for prompt in prompts]
    assert chained([(1, 2)]) == [(-4305071314101888162, 1129044178771627325)]


def test_requests_without_output_are_left_out_in_every_format(tmp_path: Path) -> None:
    for lines in (
        (mooncake_line(0), mooncake_line(1, 600, 0)),
        (bailian_line(1), bailian_line(2, output_length=0)),
        (*AZURE[:2], "2023-11-16 19:00:00.9951691,396,0"),
        BURSTGPT[:3],
    ):
        summary = check_trace(written(tmp_path, *lines))
        assert (summary.num_requests, summary.num_skipped) == (1, 1)


def test_a_file_may_be_compressed_have_other_line_ends_or_none_at_the_last(tmp_path: Path) -> None:
    lines = (mooncake_line(0), mooncake_line(1), mooncake_line(2))
    plain = read(written(tmp_path, *lines))
    assert read(written(tmp_path, *lines, "", "  ", "")) == plain
    assert read(written(tmp_path, *lines, end="\r\n")) == plain
    path = tmp_path / "trace"
    path.write_text("\ufeff" + "\n".join(lines))
    assert read(path) == plain
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    assert read(path) == plain
    for text in (*AZURE, ""), (*BURSTGPT, ""):
        assert read(written(tmp_path, *text)) == read(written(tmp_path, *text, end="\r\n"))


@pytest.mark.parametrize(
    ("name", "summary"),
    [
        ("conversation_trace.jsonl", ("mooncake", 12_031, 3_536_999_000_000, 144_793_823, 4_122_048)),
        ("synthetic_trace.jsonl", ("mooncake", 3_993, 1_022_025_000_000, 61_194_628, 595_432)),
        ("AzureLLMInferenceTrace_conv.csv", ("azure", 19_366, 3_501_721_937_000, 22_361_870, 4_088_665)),
    ],
)
def test_real_traces(name: str, summary: tuple[str, int, int, int, int]) -> None:
    found = check_trace(real_trace(name))
    assert (
        found.info.format.name,
        found.num_requests,
        found.span_ns,
        found.input_tokens,
        found.output_tokens,
    ) == summary
    assert found.num_skipped == 0 and not found.info.synthetic
