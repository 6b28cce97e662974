"""Messages to protobuf and back, one pair of functions for each type, in one table.

Decoding checks what protobuf does not: known roles, whole keys, columns that fit each other. A fault on either way raises
ProtocolFault, and the link is closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from google.protobuf.message import DecodeError, EncodeError

from mooncake.core.errors import ProtocolFault
from mooncake.core.keys import KEY_BYTES
from mooncake.core.messages import (
    Abort,
    AnyMessage,
    AskExplain,
    AskHold,
    AskStatus,
    AttemptEnded,
    AttemptFailed,
    BookingSnapshot,
    CacheDelta,
    CacheSnapshot,
    ChangeRole,
    ClusterStatus,
    CopyBlocks,
    Drain,
    HandoverDone,
    Hold,
    InstanceStatus,
    KvPartReady,
    KvReady,
    LiveAttempts,
    LoadAhead,
    LoadReport,
    Members,
    NodeInfo,
    NodeLoad,
    NodeStatus,
    Placed,
    PlaceRequest,
    Prediction,
    PrefillDone,
    Register,
    Registered,
    RegisterNode,
    Rejected,
    SnapshotRequest,
    StateChange,
    StepTokens,
    Submit,
    TokenOutput,
    Told,
)
from mooncake.core.types import (
    MAX_CHOICES,
    WEIGHT_MAX,
    WEIGHT_MIN,
    AttemptKey,
    CostModel,
    FinishReason,
    InstanceInfo,
    InstanceLoad,
    InstanceState,
    Job,
    KvSource,
    ReusedTokens,
    Role,
    SamplingParams,
    Slo,
    TierLoad,
    TokenLogprobs,
)
from mooncake.rpc.generated import mooncake_pb2 as pb

_FINISHES = tuple(FinishReason)
_LOAD_FIELDS = InstanceLoad.__struct_fields__[:-1]
_REUSED_FIELDS = ReusedTokens.__struct_fields__
_PREDICTION_FIELDS = Prediction.__struct_fields__
_TIER_FIELDS = TierLoad.__struct_fields__
_STATUS_FIELDS = ClusterStatus.__struct_fields__[:4]
"""The plain ones; likewise of a node."""
_NODE_FIELDS = NodeStatus.__struct_fields__[:-1]


def encode_envelope(messages: Sequence[AnyMessage], max_bytes: int) -> Iterator[bytes]:
    """One envelope, or as few as keep within max_bytes each. Raises ProtocolFault."""
    data = _encode(messages)
    if len(data) <= max_bytes:
        yield data
        return
    if len(messages) == 1:
        raise ProtocolFault(f"{type(messages[0]).__name__} of {len(data)} bytes is over the limit of {max_bytes}")
    half = len(messages) // 2
    yield from encode_envelope(messages[:half], max_bytes)
    yield from encode_envelope(messages[half:], max_bytes)


def _encode(messages: Sequence[AnyMessage]) -> bytes:
    envelope = pb.Envelope()
    message: AnyMessage | None = None
    try:
        for message in messages:
            _ENCODERS[type(message)](message, envelope.items.add())
        return envelope.SerializeToString()
    except (AttributeError, KeyError, TypeError, ValueError, EncodeError) as error:
        raise ProtocolFault(f"cannot encode {type(message).__name__}: {error!r}") from error


def decode_envelope(data: bytes) -> list[AnyMessage]:
    """Items of unknown kinds, from a newer peer, are left out. Raises ProtocolFault."""
    messages: list[AnyMessage] = []
    try:
        for item in pb.Envelope.FromString(data).items:
            field = item.WhichOneof("message")
            if field is not None:
                messages.append(_DECODERS[field](getattr(item, field)))
    except (ValueError, IndexError, DecodeError) as error:
        raise ProtocolFault(f"invalid message: {error}") from error
    return messages


# ---------------------------------------------------------------- parts


def _key(key: AttemptKey, out: pb.Key) -> None:
    out.frontend = key.frontend
    out.request = key.request
    out.choice = key.choice
    out.attempt = key.attempt


def _to_key(key: pb.Key) -> AttemptKey:
    return AttemptKey(key.frontend, key.request, key.choice, key.attempt)


def _keys(keys: Iterable[AttemptKey], out: Any) -> None:
    for key in keys:
        _key(key, out.add())


def _to_keys(keys: Iterable[pb.Key]) -> tuple[AttemptKey, ...]:
    return tuple(_to_key(key) for key in keys)


def _to_block_keys(data: bytes) -> tuple[bytes, ...]:
    if len(data) % KEY_BYTES:
        raise ValueError(f"{len(data)} bytes are no whole number of block keys")
    return tuple(data[at : at + KEY_BYTES] for at in range(0, len(data), KEY_BYTES))


def _optional(message: Any, field: str) -> Any:
    return getattr(message, field) if message.HasField(field) else None


def _num_choices(count: int) -> int:
    """Older peers, which have no such field, ask for one."""
    if not 0 <= count <= MAX_CHOICES:
        raise ValueError(f"{count} choices; at most {MAX_CHOICES} are allowed")
    return max(1, count)


def _weight(weight: float) -> float:
    """Older peers, which have no such field, have equal tenants."""
    if weight == 0.0:
        return 1.0
    if not WEIGHT_MIN <= weight <= WEIGHT_MAX:
        raise ValueError(f"weight {weight}; it must be from {WEIGHT_MIN:g} to {WEIGHT_MAX:g}")
    return weight


def _source(source: KvSource, out: pb.KvSource) -> None:
    out.node = source.node
    out.num_tokens = source.num_tokens
    out.block_keys = b"".join(source.block_keys)
    out.partial_key = source.partial_key
    out.addresses.extend(source.addresses)


def _to_source(source: pb.KvSource) -> KvSource:
    keys = _to_block_keys(source.block_keys)
    return KvSource(source.node, source.num_tokens, keys, source.partial_key, tuple(source.addresses))


def _sampling(sampling: SamplingParams, out: pb.Sampling) -> None:
    out.seed = sampling.seed
    out.temperature = sampling.temperature
    out.top_p = sampling.top_p
    out.top_k = sampling.top_k
    out.min_p = sampling.min_p
    out.presence_penalty = sampling.presence_penalty
    out.frequency_penalty = sampling.frequency_penalty
    out.repetition_penalty = sampling.repetition_penalty
    for token, bias in sampling.logit_bias:
        out.bias_ids.append(token)
        out.bias_values.append(bias)
    out.stop_token_ids.extend(sampling.stop_token_ids)
    out.min_tokens = sampling.min_tokens
    if sampling.num_logprobs is not None:
        out.num_logprobs = sampling.num_logprobs
    out.grammar = sampling.grammar


def _to_sampling(sampling: pb.Sampling) -> SamplingParams:
    return SamplingParams(
        seed=sampling.seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=tuple(zip(sampling.bias_ids, sampling.bias_values, strict=True)),
        stop_token_ids=tuple(sampling.stop_token_ids),
        min_tokens=sampling.min_tokens,
        num_logprobs=_optional(sampling, "num_logprobs"),
        grammar=sampling.grammar,
    )


def _prediction(prediction: Prediction, out: pb.Prediction) -> None:
    for field in _PREDICTION_FIELDS:
        setattr(out, field, getattr(prediction, field))


def _to_prediction(prediction: pb.Prediction) -> Prediction:
    return Prediction(*(getattr(prediction, field) for field in _PREDICTION_FIELDS))


def _cost(cost: CostModel, out: pb.CostModel) -> None:
    out.prefill.extend(cost.prefill)
    out.decode.extend(cost.decode)


def _to_cost(cost: pb.CostModel) -> CostModel:
    (a, b, c), (d, e, f) = cost.prefill, cost.decode
    return CostModel((a, b, c), (d, e, f))


def _info(info: InstanceInfo, out: pb.InstanceInfo) -> None:
    out.name = info.name
    out.epoch = info.epoch
    out.role = info.role
    out.address = info.address
    out.compat = info.compat
    out.node = info.node
    out.node_addresses.extend(info.node_addresses)
    out.num_pages = info.num_pages
    out.page_tokens = info.page_tokens
    out.max_batch = info.max_batch
    out.max_step_tokens = info.max_step_tokens
    out.state = info.state
    out.shard = info.shard
    out.kv_token_bytes = info.kv_token_bytes
    out.held = info.held
    _cost(info.cost, out.cost)


def _to_info(info: pb.InstanceInfo) -> InstanceInfo:
    return InstanceInfo(
        name=info.name,
        epoch=info.epoch,
        role=Role(info.role),
        address=info.address,
        compat=info.compat,
        node=info.node,
        node_addresses=tuple(info.node_addresses),
        num_pages=info.num_pages,
        page_tokens=info.page_tokens,
        max_batch=info.max_batch,
        max_step_tokens=info.max_step_tokens,
        cost=_to_cost(info.cost),
        state=InstanceState(info.state),
        shard=info.shard,
        kv_token_bytes=info.kv_token_bytes,
        held=info.held,
    )


# ---------------------------------------------------------------- frontend and Conductor


def _place_request(message: PlaceRequest, item: pb.Item) -> None:
    out = item.place_request
    _key(message.key, out.key)
    out.num_tokens = message.num_tokens
    out.block_keys = b"".join(message.block_keys)
    if message.max_tokens is not None:
        out.max_tokens = message.max_tokens
    out.num_generated = message.num_generated
    out.tenant = message.tenant
    out.priority = message.priority
    if message.slo.ttft_ns is not None:
        out.slo.ttft_ns = message.slo.ttft_ns
    if message.slo.tbt_ns is not None:
        out.slo.tbt_ns = message.slo.tbt_ns
    out.exclude.extend(message.exclude)
    out.decode_only = message.decode_only
    out.first = message.first
    out.num_choices = message.num_choices
    out.weight = message.weight


def _to_place_request(message: pb.PlaceRequest) -> PlaceRequest:
    return PlaceRequest(
        key=_to_key(message.key),
        num_tokens=message.num_tokens,
        block_keys=_to_block_keys(message.block_keys),
        max_tokens=_optional(message, "max_tokens"),
        num_generated=message.num_generated,
        tenant=message.tenant,
        priority=message.priority,
        slo=Slo(_optional(message.slo, "ttft_ns"), _optional(message.slo, "tbt_ns")),
        exclude=tuple(message.exclude),
        decode_only=message.decode_only,
        first=message.first,
        num_choices=_num_choices(message.num_choices),
        weight=_weight(message.weight),
    )


def _prefill_done(message: PrefillDone, item: pb.Item) -> None:
    _key(message.key, item.prefill_done.key)
    if message.ttft_ns is not None:
        item.prefill_done.ttft_ns = message.ttft_ns


def _attempt_ended(message: AttemptEnded, item: pb.Item) -> None:
    out = item.attempt_ended
    _key(message.key, out.key)
    out.num_output = message.num_output
    out.completed = message.completed
    if message.mean_itl_ns is not None:
        out.mean_itl_ns = message.mean_itl_ns
    if message.tbt_ns is not None:
        out.tbt_ns = message.tbt_ns


def _booking_snapshot(message: BookingSnapshot, item: pb.Item) -> None:
    out = item.booking_snapshot
    out.frontend = message.frontend
    for key, prefill, decode, num_tokens in message.bookings:
        booking = out.bookings.add()
        _key(key, booking.key)
        booking.prefill = prefill
        booking.decode = decode
        booking.num_tokens = num_tokens


def _to_booking_snapshot(message: pb.BookingSnapshot) -> BookingSnapshot:
    bookings = tuple((_to_key(b.key), b.prefill, b.decode, b.num_tokens) for b in message.bookings)
    return BookingSnapshot(message.frontend, bookings)


def _placed(message: Placed, item: pb.Item) -> None:
    out = item.placed
    _key(message.key, out.key)
    out.prefill = message.prefill
    out.decode = message.decode
    if message.source is not None:
        _source(message.source, out.source)
    _prediction(message.prediction, out.prediction)
    out.num_choices = message.num_choices
    out.check_decode = message.check_decode


def _to_placed(message: pb.Placed) -> Placed:
    return Placed(
        key=_to_key(message.key),
        prefill=message.prefill,
        decode=message.decode,
        source=_to_source(message.source) if message.HasField("source") else None,
        prediction=_to_prediction(message.prediction),
        num_choices=_num_choices(message.num_choices),
        check_decode=message.check_decode,
    )


def _rejected(message: Rejected, item: pb.Item) -> None:
    out = item.rejected
    _key(message.key, out.key)
    out.reason = message.reason
    out.detail = message.detail
    out.retry_after_ns = message.retry_after_ns
    _prediction(message.prediction, out.prediction)


def _to_rejected(message: pb.Rejected) -> Rejected:
    prediction = _to_prediction(message.prediction)
    return Rejected(_to_key(message.key), message.reason, message.detail, message.retry_after_ns, prediction)


def _members(message: Members, item: pb.Item) -> None:
    item.members.SetInParent()
    for info in message.instances:
        _info(info, item.members.instances.add())


# ---------------------------------------------------------------- frontend and instance


def _submit(message: Submit, item: pb.Item) -> None:
    job, out = message.job, item.submit
    _key(job.key, out.key)
    out.num_tokens = job.num_tokens
    out.num_prompt_tokens = job.num_prompt_tokens
    out.max_tokens = job.max_tokens
    out.block_keys = b"".join(job.block_keys)
    out.token_ids = job.token_ids
    _sampling(job.sampling, out.sampling)
    if job.source is not None:
        _source(job.source, out.source)
    out.hand_over = job.hand_over
    out.priority = job.priority
    out.deadline_ns = job.deadline_ns
    out.allow_in_place = job.allow_in_place
    out.num_choices = job.num_choices
    if job.role is not None:
        out.role = job.role
    out.tenant = job.tenant
    out.weight = job.weight


def _to_submit(job: pb.Job) -> Submit:
    if len(job.token_ids) not in (0, 4 * job.num_tokens):
        raise ValueError(f"{len(job.token_ids)} bytes of token ids for {job.num_tokens} tokens")
    return Submit(
        Job(
            key=_to_key(job.key),
            num_tokens=job.num_tokens,
            num_prompt_tokens=job.num_prompt_tokens,
            max_tokens=job.max_tokens,
            block_keys=_to_block_keys(job.block_keys),
            token_ids=job.token_ids,
            sampling=_to_sampling(job.sampling),
            source=_to_source(job.source) if job.HasField("source") else None,
            hand_over=job.hand_over,
            priority=job.priority,
            deadline_ns=job.deadline_ns,
            allow_in_place=job.allow_in_place,
            num_choices=_num_choices(job.num_choices),
            role=Role(job.role) if job.role else None,
            tenant=job.tenant,
            weight=_weight(job.weight),
        )
    )


def _abort(message: Abort, item: pb.Item) -> None:
    item.abort.SetInParent()
    _keys(message.keys, item.abort.keys)


def _handover_done(message: HandoverDone, item: pb.Item) -> None:
    item.handover_done.SetInParent()
    _keys(message.keys, item.handover_done.keys)


def _live_attempts(message: LiveAttempts, item: pb.Item) -> None:
    item.live_attempts.frontend = message.frontend
    _keys(message.keys, item.live_attempts.keys)
    _keys(message.held, item.live_attempts.held)


def _step_tokens(message: StepTokens, item: pb.Item) -> None:
    outputs = message.outputs
    out = item.step_tokens
    out.instance = message.instance
    keys = [output.key for output in outputs]
    if outputs:
        (out.frontend,) = {key.frontend for key in keys}  # a mixed step is a ValueError, never somebody else's tokens
    out.requests.extend([key.request for key in keys])
    out.choices.extend([key.choice for key in keys])
    out.attempts.extend([key.attempt for key in keys])
    out.positions.extend([output.position for output in outputs])
    out.counts.extend([len(output.token_ids) for output in outputs])
    out.finishes.extend([0 if o.finish is None else 1 + _FINISHES.index(o.finish) for o in outputs])
    out.token_ids.extend([token for output in outputs for token in output.token_ids])
    for index, output in enumerate(outputs):
        if output.cached_tokens is not None or output.compute_ns is not None:
            _first(index, output, out.firsts.add())
        for logprobs in output.logprobs:
            _logprobs(index, logprobs, out.logprobs.add())


def _first(index: int, output: TokenOutput, out: pb.First) -> None:
    out.index = index
    if output.cached_tokens is not None:
        out.cached_tokens = output.cached_tokens
    if output.compute_ns is not None:
        out.compute_ns = output.compute_ns


def _logprobs(index: int, logprobs: TokenLogprobs, out: pb.Logprobs) -> None:
    out.index = index
    out.logprob = logprobs.logprob
    for token, value in logprobs.top:
        out.top_ids.append(token)
        out.top_values.append(value)


def _to_step_tokens(message: pb.StepTokens) -> StepTokens:
    firsts = {first.index: first for first in message.firsts}
    logprobs: dict[int, list[TokenLogprobs]] = {}
    for row in message.logprobs:
        top = tuple(zip(row.top_ids, row.top_values, strict=True))
        logprobs.setdefault(row.index, []).append(TokenLogprobs(row.logprob, top))
    columns = (message.requests, message.choices, message.attempts, message.positions, message.counts, message.finishes)
    tokens: Sequence[int] = message.token_ids
    outputs: list[TokenOutput] = []
    at = 0
    for index, (request, choice, attempt, position, count, finish) in enumerate(zip(*columns, strict=True)):
        first = firsts.get(index)
        outputs.append(
            TokenOutput(
                AttemptKey(message.frontend, request, choice, attempt),
                position,
                tuple(tokens[at : at + count]),
                _FINISHES[finish - 1] if finish else None,
                tuple(logprobs.get(index, ())),
                None if first is None else _optional(first, "cached_tokens"),
                None if first is None else _optional(first, "compute_ns"),
            )
        )
        at += count
    if at != len(tokens):
        raise ValueError(f"{len(tokens)} token ids for counts that add up to {at}")
    return StepTokens(message.instance, tuple(outputs))


def _kv_ready(message: KvReady, item: pb.Item) -> None:
    item.kv_ready.instance = message.instance
    _key(message.key, item.kv_ready.key)
    _source(message.source, item.kv_ready.source)


def _kv_part_ready(message: KvPartReady, item: pb.Item) -> None:
    out = item.kv_part_ready
    out.instance = message.instance
    _key(message.key, out.key)
    out.start = message.start
    _source(message.source, out.source)


def _to_kv_part_ready(message: pb.KvPartReady) -> KvPartReady:
    return KvPartReady(message.instance, _to_key(message.key), message.start, _to_source(message.source))


def _load_ahead(message: LoadAhead, item: pb.Item) -> None:
    item.load_ahead.start = message.start
    _source(message.source, item.load_ahead.source)
    item.load_ahead.tenant = message.tenant


def _attempt_failed(message: AttemptFailed, item: pb.Item) -> None:
    out = item.attempt_failed
    out.instance = message.instance
    _key(message.key, out.key)
    out.reason = message.reason
    out.detail = message.detail


# ---------------------------------------------------------------- instance, store node and Conductor


def _register(message: Register, item: pb.Item) -> None:
    _info(message.info, item.register)


def _registered(message: Registered, item: pb.Item) -> None:
    item.registered.accepted = message.accepted
    item.registered.detail = message.detail


def _load_report(message: LoadReport, item: pb.Item) -> None:
    for field in _LOAD_FIELDS:
        setattr(item.load_report, field, getattr(message.load, field))
    _set(message.load.reused, item.load_report.reused, _REUSED_FIELDS)


def _to_load_report(message: pb.InstanceLoad) -> LoadReport:
    return LoadReport(InstanceLoad(**_values(message, _LOAD_FIELDS), reused=_to_reused(message.reused)))


def _cache_delta(message: CacheDelta, item: pb.Item) -> None:
    out = item.cache_delta
    out.holder, out.epoch, out.seq, out.tier = message.holder, message.epoch, message.seq, message.tier
    out.added = b"".join(message.added)
    out.removed = b"".join(message.removed)


def _to_cache_delta(message: pb.CacheDelta) -> CacheDelta:
    added, removed = _to_block_keys(message.added), _to_block_keys(message.removed)
    return CacheDelta(message.holder, message.epoch, message.seq, message.tier, added, removed)


def _cache_snapshot(message: CacheSnapshot, item: pb.Item) -> None:
    out = item.cache_snapshot
    out.holder, out.epoch, out.seq, out.tier = message.holder, message.epoch, message.seq, message.tier
    out.keys = b"".join(message.keys)


def _to_cache_snapshot(message: pb.CacheSnapshot) -> CacheSnapshot:
    return CacheSnapshot(message.holder, message.epoch, message.seq, message.tier, _to_block_keys(message.keys))


def _snapshot_request(message: SnapshotRequest, item: pb.Item) -> None:
    item.snapshot_request.holder = message.holder
    item.snapshot_request.tier = message.tier


def _state_change(message: StateChange, item: pb.Item) -> None:
    out = item.state_change
    out.name, out.epoch, out.state = message.name, message.epoch, message.state
    _cost(message.cost, out.cost)


def _to_state_change(message: pb.StateChange) -> StateChange:
    return StateChange(message.name, message.epoch, InstanceState(message.state), _to_cost(message.cost))


def _drain(message: Drain, item: pb.Item) -> None:
    item.drain = message.name


def _register_node(message: RegisterNode, item: pb.Item) -> None:
    info, out = message.info, item.register_node
    out.name, out.epoch, out.capacity_bytes, out.compat = info.name, info.epoch, info.capacity_bytes, info.compat
    out.addresses.extend(info.addresses)


def _to_register_node(info: pb.NodeInfo) -> RegisterNode:
    return RegisterNode(NodeInfo(info.name, info.epoch, tuple(info.addresses), info.capacity_bytes, info.compat))


def _change_role(message: ChangeRole, item: pb.Item) -> None:
    out = item.change_role
    out.name, out.epoch, out.role = message.name, message.epoch, message.role


def _copy_blocks(message: CopyBlocks, item: pb.Item) -> None:
    _source(message.source, item.copy_blocks.source)
    item.copy_blocks.shard = message.shard


def _hold(message: Hold, item: pb.Item) -> None:
    item.hold.name, item.hold.held = message.name, message.held


# ---------------------------------------------------------------- for the operator


def _set(message: Any, out: Any, fields: Sequence[str]) -> None:
    for field in fields:
        setattr(out, field, getattr(message, field))


def _values(message: Any, fields: Sequence[str]) -> dict[str, Any]:
    return {field: getattr(message, field) for field in fields}


def _to_reused(message: pb.ReusedTokens) -> ReusedTokens:
    return ReusedTokens(**_values(message, _REUSED_FIELDS))


def _tiers(tiers: Sequence[TierLoad], out: Any) -> None:
    for tier in tiers:
        _set(tier, out.add(), _TIER_FIELDS)


def _to_tiers(tiers: Iterable[pb.TierLoad]) -> tuple[TierLoad, ...]:
    return tuple(TierLoad(**_values(tier, _TIER_FIELDS)) for tier in tiers)


def _node_load(message: NodeLoad, item: pb.Item) -> None:
    _set(message, item.node_load, ("name", "epoch"))
    _tiers(message.tiers, item.node_load.tiers)


def _ask_status(message: AskStatus, item: pb.Item) -> None:
    item.ask_status = message.number


def _ask_explain(message: AskExplain, item: pb.Item) -> None:
    _set(message, item.ask_explain, AskExplain.__struct_fields__)


def _ask_hold(message: AskHold, item: pb.Item) -> None:
    _set(message, item.ask_hold, AskHold.__struct_fields__)


def _told(message: Told, item: pb.Item) -> None:
    _set(message, item.told, Told.__struct_fields__)


def _cluster_status(message: ClusterStatus, item: pb.Item) -> None:
    out = item.cluster_status
    _set(message, out, _STATUS_FIELDS)
    _set(message.reused, out.reused, _REUSED_FIELDS)
    for name, count in message.counts:
        out.counts.add(name=name, count=count)
    for instance in message.instances:
        _set(instance, out.instances.add(), InstanceStatus.__struct_fields__)
    for node in message.nodes:
        added = out.nodes.add()
        _set(node, added, _NODE_FIELDS)
        _tiers(node.tiers, added.tiers)


def _to_cluster_status(message: pb.ClusterStatus) -> ClusterStatus:
    return ClusterStatus(
        **_values(message, _STATUS_FIELDS),
        counts=tuple((each.name, each.count) for each in message.counts),
        reused=_to_reused(message.reused),
        instances=tuple(
            InstanceStatus(**_values(each, InstanceStatus.__struct_fields__)) for each in message.instances
        ),
        nodes=tuple(NodeStatus(**_values(each, _NODE_FIELDS), tiers=_to_tiers(each.tiers)) for each in message.nodes),
    )


# ---------------------------------------------------------------- the table

_TABLE: tuple[tuple[type, str, Callable[[Any, pb.Item], None], Callable[[Any], AnyMessage]], ...] = (
    (PlaceRequest, "place_request", _place_request, _to_place_request),
    (PrefillDone, "prefill_done", _prefill_done, lambda m: PrefillDone(_to_key(m.key), _optional(m, "ttft_ns"))),
    (
        AttemptEnded,
        "attempt_ended",
        _attempt_ended,
        lambda m: AttemptEnded(
            _to_key(m.key), m.num_output, m.completed, _optional(m, "mean_itl_ns"), _optional(m, "tbt_ns")
        ),
    ),
    (BookingSnapshot, "booking_snapshot", _booking_snapshot, _to_booking_snapshot),
    (Placed, "placed", _placed, _to_placed),
    (Rejected, "rejected", _rejected, _to_rejected),
    (Members, "members", _members, lambda m: Members(tuple(_to_info(info) for info in m.instances))),
    (Submit, "submit", _submit, _to_submit),
    (Abort, "abort", _abort, lambda m: Abort(_to_keys(m.keys))),
    (HandoverDone, "handover_done", _handover_done, lambda m: HandoverDone(_to_keys(m.keys))),
    (
        LiveAttempts,
        "live_attempts",
        _live_attempts,
        lambda m: LiveAttempts(m.frontend, _to_keys(m.keys), _to_keys(m.held)),
    ),
    (StepTokens, "step_tokens", _step_tokens, _to_step_tokens),
    (KvPartReady, "kv_part_ready", _kv_part_ready, _to_kv_part_ready),
    (LoadAhead, "load_ahead", _load_ahead, lambda m: LoadAhead(m.start, _to_source(m.source), m.tenant)),
    (KvReady, "kv_ready", _kv_ready, lambda m: KvReady(m.instance, _to_key(m.key), _to_source(m.source))),
    (
        AttemptFailed,
        "attempt_failed",
        _attempt_failed,
        lambda m: AttemptFailed(m.instance, _to_key(m.key), m.reason, m.detail),
    ),
    (Register, "register", _register, lambda m: Register(_to_info(m))),
    (Registered, "registered", _registered, lambda m: Registered(m.accepted, m.detail)),
    (LoadReport, "load_report", _load_report, _to_load_report),
    (CacheDelta, "cache_delta", _cache_delta, _to_cache_delta),
    (CacheSnapshot, "cache_snapshot", _cache_snapshot, _to_cache_snapshot),
    (SnapshotRequest, "snapshot_request", _snapshot_request, lambda m: SnapshotRequest(m.holder, m.tier)),
    (StateChange, "state_change", _state_change, _to_state_change),
    (Drain, "drain", _drain, Drain),
    (RegisterNode, "register_node", _register_node, _to_register_node),
    (ChangeRole, "change_role", _change_role, lambda m: ChangeRole(m.name, m.epoch, Role(m.role))),
    (CopyBlocks, "copy_blocks", _copy_blocks, lambda m: CopyBlocks(_to_source(m.source), m.shard)),
    (NodeLoad, "node_load", _node_load, lambda m: NodeLoad(m.name, m.epoch, _to_tiers(m.tiers))),
    (AskStatus, "ask_status", _ask_status, AskStatus),
    (AskExplain, "ask_explain", _ask_explain, lambda m: AskExplain(m.number, m.frontend, m.request)),
    (AskHold, "ask_hold", _ask_hold, lambda m: AskHold(m.number, m.name, m.held)),
    (Told, "told", _told, lambda m: Told(m.number, m.text, m.error)),
    (ClusterStatus, "cluster_status", _cluster_status, _to_cluster_status),
    (Hold, "hold", _hold, lambda m: Hold(m.name, m.held)),
)
_ENCODERS = {kind: encode for kind, _, encode, _ in _TABLE}
_DECODERS = {field: decode for _, field, _, decode in _TABLE}
