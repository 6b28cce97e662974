"""Every message crosses the wire unchanged; what is unknown is skipped; what is wrong is refused."""

from __future__ import annotations

import contextlib
import struct
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake.core import messages as m
from mooncake.core import types as t
from mooncake.core.errors import ProtocolFault
from mooncake.rpc import codec
from mooncake.rpc.codec import decode_envelope, encode_envelope
from mooncake.rpc.generated import mooncake_pb2 as pb

LIMIT = 64 << 20
INT32, INT64 = st.integers(-(2**31), 2**31 - 1), st.integers(-(2**63), 2**63 - 1)
COUNT = st.integers(0, 2**31 - 1)
CHOICES = st.integers(1, 16)
WEIGHT = st.floats(t.WEIGHT_MIN, t.WEIGHT_MAX)
TOKEN = st.integers(0, 2**31 - 1)
TEXT = st.text(max_size=8)
TEXTS = st.lists(TEXT, max_size=3).map(tuple)
FLOAT = st.floats(allow_nan=False)
BLOCK_KEYS = st.lists(st.binary(min_size=16, max_size=16), max_size=3).map(tuple)
KEY = st.builds(t.AttemptKey, TEXT, INT64, INT32, INT32)
KEYS = st.lists(KEY, max_size=3).map(tuple)
PAIRS = st.lists(st.tuples(TOKEN, FLOAT), max_size=3).map(tuple)
SOURCE = st.builds(t.KvSource, TEXT, COUNT, BLOCK_KEYS, st.binary(max_size=16), TEXTS)
COST = st.builds(t.CostModel, st.tuples(FLOAT, FLOAT, FLOAT), st.tuples(FLOAT, FLOAT, FLOAT))
PREDICTION = st.builds(m.Prediction, INT64, INT64, INT64, INT64, INT64)
SAMPLING = st.builds(
    t.SamplingParams,
    seed=st.integers(0, 2**64 - 1),
    temperature=FLOAT,
    top_p=FLOAT,
    top_k=INT32,
    min_p=FLOAT,
    presence_penalty=FLOAT,
    frequency_penalty=FLOAT,
    repetition_penalty=FLOAT,
    logit_bias=PAIRS,
    stop_token_ids=st.lists(TOKEN, max_size=3).map(tuple),
    min_tokens=COUNT,
    num_logprobs=st.none() | COUNT,
    grammar=st.text(max_size=20),
)
INFO = st.builds(
    t.InstanceInfo,
    name=TEXT,
    epoch=INT64,
    role=st.sampled_from(t.Role),
    address=TEXT,
    compat=TEXT,
    node=TEXT,
    node_addresses=TEXTS,
    num_pages=INT64,
    page_tokens=INT64,
    max_batch=INT64,
    max_step_tokens=INT64,
    cost=COST,
    state=st.sampled_from(t.InstanceState),
    shard=st.binary(max_size=8),
    kv_token_bytes=INT64,
    held=st.booleans(),
)


@st.composite
def jobs(draw: st.DrawFn) -> t.Job:
    num_tokens = draw(st.integers(0, 5))
    with_ids = draw(st.booleans())
    return t.Job(
        key=draw(KEY),
        num_tokens=num_tokens,
        num_prompt_tokens=draw(COUNT),
        max_tokens=draw(INT64),
        block_keys=draw(BLOCK_KEYS),
        token_ids=struct.pack(f"<{num_tokens}I", *draw(st.permutations(range(num_tokens)))) if with_ids else b"",
        sampling=draw(SAMPLING),
        source=draw(st.none() | SOURCE),
        hand_over=draw(st.booleans()),
        priority=draw(INT32),
        deadline_ns=draw(INT64),
        allow_in_place=draw(st.booleans()),
        num_choices=draw(CHOICES),
        tenant=draw(TEXT),
        weight=draw(WEIGHT),
        role=draw(st.none() | st.sampled_from(t.Role)),
    )


@st.composite
def steps(draw: st.DrawFn) -> m.StepTokens:
    """All outputs of one step are for one frontend."""
    frontend = draw(TEXT)
    output = st.builds(
        m.TokenOutput,
        st.builds(t.AttemptKey, st.just(frontend), INT64, INT32, INT32),
        INT64,
        st.lists(st.integers(0, 2**32 - 1), max_size=3).map(tuple),
        st.none() | st.sampled_from(t.FinishReason),
        st.lists(st.builds(t.TokenLogprobs, FLOAT, PAIRS), max_size=2).map(tuple),
        st.none() | INT64,
        st.none() | INT64,
    )
    return m.StepTokens(draw(TEXT), tuple(draw(st.lists(output, max_size=4))))


OPTIONAL = st.none() | INT64
TIERS = st.lists(st.builds(t.TierLoad, TEXT, INT64, INT64, INT64), max_size=2).map(tuple)
INSTANCE_STATUS = st.builds(m.InstanceStatus, *[TEXT] * 4, *[INT64] * 7, FLOAT, INT64, INT64)
REUSED = st.builds(t.ReusedTokens, *[INT64] * 4)
NODE_STATUS = st.builds(m.NodeStatus, TEXT, st.booleans(), *[INT64] * 4, TIERS)
MESSAGES: dict[type, st.SearchStrategy[Any]] = {
    m.PlaceRequest: st.builds(
        m.PlaceRequest,
        key=KEY,
        num_tokens=INT64,
        block_keys=BLOCK_KEYS,
        max_tokens=OPTIONAL,
        num_generated=INT64,
        tenant=TEXT,
        priority=INT32,
        slo=st.builds(t.Slo, OPTIONAL, OPTIONAL),
        exclude=TEXTS,
        decode_only=st.booleans(),
        first=st.booleans(),
        num_choices=CHOICES,
        weight=WEIGHT,
    ),
    m.PrefillDone: st.builds(m.PrefillDone, KEY, OPTIONAL),
    m.AttemptEnded: st.builds(m.AttemptEnded, KEY, INT64, st.booleans(), OPTIONAL, OPTIONAL),
    m.BookingSnapshot: st.builds(
        m.BookingSnapshot, TEXT, st.lists(st.tuples(KEY, TEXT, TEXT, INT64), max_size=3).map(tuple)
    ),
    m.Placed: st.builds(m.Placed, KEY, TEXT, TEXT, st.none() | SOURCE, PREDICTION, CHOICES, st.booleans()),
    m.Rejected: st.builds(m.Rejected, KEY, TEXT, TEXT, INT64, PREDICTION),
    m.Members: st.builds(m.Members, st.lists(INFO, max_size=2).map(tuple)),
    m.Submit: st.builds(m.Submit, jobs()),
    m.Abort: st.builds(m.Abort, KEYS),
    m.LoadAhead: st.builds(m.LoadAhead, INT64, SOURCE, TEXT),
    m.HandoverDone: st.builds(m.HandoverDone, KEYS),
    m.LiveAttempts: st.builds(m.LiveAttempts, TEXT, KEYS, KEYS),
    m.StepTokens: steps(),
    m.KvPartReady: st.builds(m.KvPartReady, TEXT, KEY, INT64, SOURCE),
    m.KvReady: st.builds(m.KvReady, TEXT, KEY, SOURCE),
    m.AttemptFailed: st.builds(m.AttemptFailed, TEXT, KEY, TEXT, TEXT),
    m.Register: st.builds(m.Register, INFO),
    m.Registered: st.builds(m.Registered, st.booleans(), TEXT),
    m.LoadReport: st.builds(m.LoadReport, st.builds(t.InstanceLoad, TEXT, *[INT64] * 11, REUSED)),
    m.CacheDelta: st.builds(m.CacheDelta, TEXT, INT64, INT64, TEXT, BLOCK_KEYS, BLOCK_KEYS),
    m.CacheSnapshot: st.builds(m.CacheSnapshot, TEXT, INT64, INT64, TEXT, BLOCK_KEYS),
    m.SnapshotRequest: st.builds(m.SnapshotRequest, TEXT, TEXT),
    m.StateChange: st.builds(m.StateChange, TEXT, INT64, st.sampled_from(t.InstanceState), COST),
    m.Drain: st.builds(m.Drain, TEXT),
    m.ChangeRole: st.builds(m.ChangeRole, TEXT, INT64, st.sampled_from(t.Role)),
    m.CopyBlocks: st.builds(m.CopyBlocks, SOURCE, st.binary(max_size=8)),
    m.NodeLoad: st.builds(m.NodeLoad, TEXT, INT64, TIERS),
    m.AskStatus: st.builds(m.AskStatus, INT64),
    m.AskExplain: st.builds(m.AskExplain, INT64, TEXT, INT64),
    m.AskHold: st.builds(m.AskHold, INT64, TEXT, st.booleans()),
    m.Told: st.builds(m.Told, INT64, TEXT, TEXT),
    m.Hold: st.builds(m.Hold, TEXT, st.booleans()),
    m.ClusterStatus: st.builds(
        m.ClusterStatus,
        INT64,
        TEXT,
        INT64,
        INT64,
        st.lists(st.tuples(TEXT, INT64), max_size=3).map(tuple),
        REUSED,
        st.lists(INSTANCE_STATUS, max_size=2).map(tuple),
        st.lists(NODE_STATUS, max_size=2).map(tuple),
    ),
    m.RegisterNode: st.builds(m.RegisterNode, st.builds(m.NodeInfo, TEXT, INT64, TEXTS, INT64, TEXT)),
}


def encode(*messages: Any) -> bytes:
    (data,) = encode_envelope(messages, LIMIT)
    return data


def test_every_message_of_the_contract_is_in_the_table() -> None:
    kinds = set(get_args(m.AnyMessage))
    assert set(MESSAGES) == kinds
    assert {kind for kind, *_ in codec._TABLE} == kinds
    fields = [field.name for field in pb.Item.DESCRIPTOR.oneofs_by_name["message"].fields]
    assert sorted(field for _, field, *_ in codec._TABLE) == sorted(fields)


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_round_trip(kind: type) -> None:
    @settings(max_examples=40, deadline=None)
    @given(MESSAGES[kind])
    def check(message: Any) -> None:
        (back,) = decode_envelope(encode(message))
        assert back == message and type(back) is kind

    check()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(*MESSAGES.values()), max_size=6))
def test_an_envelope_keeps_the_order(messages: list[Any]) -> None:
    assert decode_envelope(encode(*messages)) == messages


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_are_messages_or_a_fault(data: bytes) -> None:
    with contextlib.suppress(ProtocolFault):
        decode_envelope(data)


@settings(max_examples=200, deadline=None)
@given(st.one_of(*MESSAGES.values()), st.data())
def test_a_damaged_envelope_is_messages_or_a_fault(message: Any, data: st.DataObject) -> None:
    wire = bytearray(encode(message))
    wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolFault):
        decode_envelope(bytes(wire))


def length_delimited(field: int, body: bytes) -> bytes:
    tag = field << 3 | 2
    head = (tag,) if tag < 128 else (tag & 0x7F | 0x80, tag >> 7)
    assert tag < 1 << 14 and len(body) < 128
    return bytes((*head, len(body))) + body


def test_fields_of_a_newer_peer_are_ignored() -> None:
    item = pb.Item(registered=pb.Registered(accepted=True, detail="x"))
    newer = item.registered.SerializeToString() + length_delimited(15, b"new")
    envelope = length_delimited(2, length_delimited(16, newer)) + length_delimited(14, b"new")
    assert decode_envelope(envelope) == [m.Registered(True, "x")]


def test_an_older_peer_asks_for_one_choice() -> None:
    [message] = decode_envelope(pb.Envelope(items=[pb.Item(submit=pb.Job())]).SerializeToString())
    assert isinstance(message, m.Submit) and message.job.num_choices == 1


def test_messages_of_a_newer_peer_are_left_out() -> None:
    unknown = length_delimited(2, length_delimited(100, b"new"))
    assert decode_envelope(encode(m.Drain("a")) + unknown + encode(m.Drain("b"))) == [m.Drain("a"), m.Drain("b")]


def test_what_an_older_peer_does_not_say_is_nothing() -> None:
    info = pb.InstanceInfo(name="a", role="decode", state="ready", cost=pb.CostModel(prefill=[0] * 3, decode=[0] * 3))
    old = pb.Envelope(items=[pb.Item(register=info), pb.Item(load_report=pb.InstanceLoad(name="a", num_running=3))])
    register, report = decode_envelope(old.SerializeToString())
    assert isinstance(register, m.Register) and register.info.held is False
    assert isinstance(report, m.LoadReport) and (report.load.num_running, report.load.num_attempts) == (3, 0)


def wrong_step(**columns: Any) -> pb.Item:
    right = {
        "requests": [1],
        "choices": [0],
        "attempts": [0],
        "positions": [9],
        "counts": [1],
        "finishes": [0],
        "token_ids": [7],
    }
    return pb.Item(step_tokens=pb.StepTokens(**{**right, **columns}))


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (pb.Item(cache_snapshot=pb.CacheSnapshot(keys=b"x" * 17)), "17 bytes are no whole number of block keys"),
        (pb.Item(register=pb.InstanceInfo(role="cook", state="ready")), "cook"),
        (pb.Item(state_change=pb.StateChange(state="ready")), "not enough values"),
        (pb.Item(submit=pb.Job(num_tokens=2, token_ids=b"1234")), "4 bytes of token ids for 2 tokens"),
        (pb.Item(place_request=pb.PlaceRequest(num_choices=17)), "17 choices; at most 16 are allowed"),
        (pb.Item(place_request=pb.PlaceRequest(weight=-1.0)), "weight -1.0; it must be from 0.001 to 1000"),
        (wrong_step(positions=[]), "shorter"),
        (wrong_step(finishes=[9]), "out of range"),
        (wrong_step(counts=[2]), "1 token ids for counts that add up to 2"),
        (wrong_step(counts=[0]), "1 token ids for counts that add up to 0"),
    ],
)
def test_wrong_values_are_a_fault_that_says_what(item: pb.Item, reason: str) -> None:
    with pytest.raises(ProtocolFault, match=reason):
        decode_envelope(pb.Envelope(items=[item]).SerializeToString())


@pytest.mark.parametrize(
    "message",
    [
        m.Drain(5),  # type: ignore[arg-type]
        m.PrefillDone(t.AttemptKey("f", 2**63)),
        m.StepTokens("d", tuple(m.TokenOutput(t.AttemptKey(frontend, 1), 0, (1,)) for frontend in "ab")),
        "no message",
    ],
)
def test_what_cannot_be_encoded_is_a_fault(message: Any) -> None:
    with pytest.raises(ProtocolFault, match=f"cannot encode {type(message).__name__}"):
        encode(message)


def test_a_full_outbox_becomes_as_few_envelopes_as_fit() -> None:
    messages = [m.Drain("x" * 100) for _ in range(10)]
    envelopes = list(encode_envelope(messages, max_bytes=400))
    assert [len(decode_envelope(data)) for data in envelopes] == [2, 3, 2, 3]
    assert [message for data in envelopes for message in decode_envelope(data)] == messages
    with pytest.raises(ProtocolFault, match=r"Drain of 1\d\d bytes is over the limit of 50"):
        list(encode_envelope(messages, max_bytes=50))


def test_a_step_of_64_streams_is_small() -> None:
    outputs = tuple(m.TokenOutput(t.AttemptKey("frontend-0", 2**50 + i), 4000 + i, (40_000 + i,)) for i in range(64))
    assert len(encode(m.StepTokens("decode-0", outputs))) < 64 * 20
