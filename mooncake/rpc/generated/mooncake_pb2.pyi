from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Hello(_message.Message):
    __slots__ = ("major", "minor", "peer", "kind", "token", "compat")
    MAJOR_FIELD_NUMBER: _ClassVar[int]
    MINOR_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    COMPAT_FIELD_NUMBER: _ClassVar[int]
    major: int
    minor: int
    peer: str
    kind: str
    token: str
    compat: str
    def __init__(self, major: _Optional[int] = ..., minor: _Optional[int] = ..., peer: _Optional[str] = ..., kind: _Optional[str] = ..., token: _Optional[str] = ..., compat: _Optional[str] = ...) -> None: ...

class Envelope(_message.Message):
    __slots__ = ("hello", "items")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    items: _containers.RepeatedCompositeFieldContainer[Item]
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., items: _Optional[_Iterable[_Union[Item, _Mapping]]] = ...) -> None: ...

class Item(_message.Message):
    __slots__ = ("place_request", "prefill_done", "attempt_ended", "booking_snapshot", "placed", "rejected", "members", "submit", "abort", "handover_done", "live_attempts", "step_tokens", "kv_ready", "attempt_failed", "register", "registered", "load_report", "cache_delta", "cache_snapshot", "snapshot_request", "state_change", "drain", "register_node", "change_role", "copy_blocks", "kv_part_ready", "load_ahead", "node_load", "ask_status", "ask_explain", "ask_hold", "told", "cluster_status", "hold")
    PLACE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    PREFILL_DONE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_ENDED_FIELD_NUMBER: _ClassVar[int]
    BOOKING_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    PLACED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    HANDOVER_DONE_FIELD_NUMBER: _ClassVar[int]
    LIVE_ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_READY_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FAILED_FIELD_NUMBER: _ClassVar[int]
    REGISTER_FIELD_NUMBER: _ClassVar[int]
    REGISTERED_FIELD_NUMBER: _ClassVar[int]
    LOAD_REPORT_FIELD_NUMBER: _ClassVar[int]
    CACHE_DELTA_FIELD_NUMBER: _ClassVar[int]
    CACHE_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_REQUEST_FIELD_NUMBER: _ClassVar[int]
    STATE_CHANGE_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    REGISTER_NODE_FIELD_NUMBER: _ClassVar[int]
    CHANGE_ROLE_FIELD_NUMBER: _ClassVar[int]
    COPY_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    KV_PART_READY_FIELD_NUMBER: _ClassVar[int]
    LOAD_AHEAD_FIELD_NUMBER: _ClassVar[int]
    NODE_LOAD_FIELD_NUMBER: _ClassVar[int]
    ASK_STATUS_FIELD_NUMBER: _ClassVar[int]
    ASK_EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    ASK_HOLD_FIELD_NUMBER: _ClassVar[int]
    TOLD_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_STATUS_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    place_request: PlaceRequest
    prefill_done: PrefillDone
    attempt_ended: AttemptEnded
    booking_snapshot: BookingSnapshot
    placed: Placed
    rejected: Rejected
    members: Members
    submit: Job
    abort: Keys
    handover_done: Keys
    live_attempts: LiveAttempts
    step_tokens: StepTokens
    kv_ready: KvReady
    attempt_failed: AttemptFailed
    register: InstanceInfo
    registered: Registered
    load_report: InstanceLoad
    cache_delta: CacheDelta
    cache_snapshot: CacheSnapshot
    snapshot_request: SnapshotRequest
    state_change: StateChange
    drain: str
    register_node: NodeInfo
    change_role: ChangeRole
    copy_blocks: CopyBlocks
    kv_part_ready: KvPartReady
    load_ahead: LoadAhead
    node_load: NodeLoad
    ask_status: int
    ask_explain: AskExplain
    ask_hold: AskHold
    told: Told
    cluster_status: ClusterStatus
    hold: Hold
    def __init__(self, place_request: _Optional[_Union[PlaceRequest, _Mapping]] = ..., prefill_done: _Optional[_Union[PrefillDone, _Mapping]] = ..., attempt_ended: _Optional[_Union[AttemptEnded, _Mapping]] = ..., booking_snapshot: _Optional[_Union[BookingSnapshot, _Mapping]] = ..., placed: _Optional[_Union[Placed, _Mapping]] = ..., rejected: _Optional[_Union[Rejected, _Mapping]] = ..., members: _Optional[_Union[Members, _Mapping]] = ..., submit: _Optional[_Union[Job, _Mapping]] = ..., abort: _Optional[_Union[Keys, _Mapping]] = ..., handover_done: _Optional[_Union[Keys, _Mapping]] = ..., live_attempts: _Optional[_Union[LiveAttempts, _Mapping]] = ..., step_tokens: _Optional[_Union[StepTokens, _Mapping]] = ..., kv_ready: _Optional[_Union[KvReady, _Mapping]] = ..., attempt_failed: _Optional[_Union[AttemptFailed, _Mapping]] = ..., register: _Optional[_Union[InstanceInfo, _Mapping]] = ..., registered: _Optional[_Union[Registered, _Mapping]] = ..., load_report: _Optional[_Union[InstanceLoad, _Mapping]] = ..., cache_delta: _Optional[_Union[CacheDelta, _Mapping]] = ..., cache_snapshot: _Optional[_Union[CacheSnapshot, _Mapping]] = ..., snapshot_request: _Optional[_Union[SnapshotRequest, _Mapping]] = ..., state_change: _Optional[_Union[StateChange, _Mapping]] = ..., drain: _Optional[str] = ..., register_node: _Optional[_Union[NodeInfo, _Mapping]] = ..., change_role: _Optional[_Union[ChangeRole, _Mapping]] = ..., copy_blocks: _Optional[_Union[CopyBlocks, _Mapping]] = ..., kv_part_ready: _Optional[_Union[KvPartReady, _Mapping]] = ..., load_ahead: _Optional[_Union[LoadAhead, _Mapping]] = ..., node_load: _Optional[_Union[NodeLoad, _Mapping]] = ..., ask_status: _Optional[int] = ..., ask_explain: _Optional[_Union[AskExplain, _Mapping]] = ..., ask_hold: _Optional[_Union[AskHold, _Mapping]] = ..., told: _Optional[_Union[Told, _Mapping]] = ..., cluster_status: _Optional[_Union[ClusterStatus, _Mapping]] = ..., hold: _Optional[_Union[Hold, _Mapping]] = ...) -> None: ...

class Key(_message.Message):
    __slots__ = ("frontend", "request", "choice", "attempt")
    FRONTEND_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    frontend: str
    request: int
    choice: int
    attempt: int
    def __init__(self, frontend: _Optional[str] = ..., request: _Optional[int] = ..., choice: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class Keys(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedCompositeFieldContainer[Key]
    def __init__(self, keys: _Optional[_Iterable[_Union[Key, _Mapping]]] = ...) -> None: ...

class Slo(_message.Message):
    __slots__ = ("ttft_ns", "tbt_ns")
    TTFT_NS_FIELD_NUMBER: _ClassVar[int]
    TBT_NS_FIELD_NUMBER: _ClassVar[int]
    ttft_ns: int
    tbt_ns: int
    def __init__(self, ttft_ns: _Optional[int] = ..., tbt_ns: _Optional[int] = ...) -> None: ...

class KvSource(_message.Message):
    __slots__ = ("node", "num_tokens", "block_keys", "partial_key", "addresses")
    NODE_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_KEYS_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_KEY_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    node: str
    num_tokens: int
    block_keys: bytes
    partial_key: bytes
    addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, node: _Optional[str] = ..., num_tokens: _Optional[int] = ..., block_keys: _Optional[bytes] = ..., partial_key: _Optional[bytes] = ..., addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("seed", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "bias_ids", "bias_values", "stop_token_ids", "min_tokens", "num_logprobs", "grammar")
    SEED_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    BIAS_IDS_FIELD_NUMBER: _ClassVar[int]
    BIAS_VALUES_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    seed: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    bias_ids: _containers.RepeatedScalarFieldContainer[int]
    bias_values: _containers.RepeatedScalarFieldContainer[float]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    min_tokens: int
    num_logprobs: int
    grammar: str
    def __init__(self, seed: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., bias_ids: _Optional[_Iterable[int]] = ..., bias_values: _Optional[_Iterable[float]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., min_tokens: _Optional[int] = ..., num_logprobs: _Optional[int] = ..., grammar: _Optional[str] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("key", "num_tokens", "num_prompt_tokens", "max_tokens", "block_keys", "token_ids", "sampling", "source", "hand_over", "priority", "deadline_ns", "allow_in_place", "num_choices", "role", "tenant", "weight")
    KEY_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_KEYS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    HAND_OVER_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_NS_FIELD_NUMBER: _ClassVar[int]
    ALLOW_IN_PLACE_FIELD_NUMBER: _ClassVar[int]
    NUM_CHOICES_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    key: Key
    num_tokens: int
    num_prompt_tokens: int
    max_tokens: int
    block_keys: bytes
    token_ids: bytes
    sampling: Sampling
    source: KvSource
    hand_over: bool
    priority: int
    deadline_ns: int
    allow_in_place: bool
    num_choices: int
    role: str
    tenant: str
    weight: float
    def __init__(self, key: _Optional[_Union[Key, _Mapping]] = ..., num_tokens: _Optional[int] = ..., num_prompt_tokens: _Optional[int] = ..., max_tokens: _Optional[int] = ..., block_keys: _Optional[bytes] = ..., token_ids: _Optional[bytes] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., source: _Optional[_Union[KvSource, _Mapping]] = ..., hand_over: bool = ..., priority: _Optional[int] = ..., deadline_ns: _Optional[int] = ..., allow_in_place: bool = ..., num_choices: _Optional[int] = ..., role: _Optional[str] = ..., tenant: _Optional[str] = ..., weight: _Optional[float] = ...) -> None: ...

class PlaceRequest(_message.Message):
    __slots__ = ("key", "num_tokens", "block_keys", "max_tokens", "num_generated", "tenant", "priority", "slo", "exclude", "decode_only", "first", "num_choices", "weight")
    KEY_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_KEYS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_GENERATED_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    SLO_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_FIELD_NUMBER: _ClassVar[int]
    DECODE_ONLY_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    NUM_CHOICES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    key: Key
    num_tokens: int
    block_keys: bytes
    max_tokens: int
    num_generated: int
    tenant: str
    priority: int
    slo: Slo
    exclude: _containers.RepeatedScalarFieldContainer[str]
    decode_only: bool
    first: bool
    num_choices: int
    weight: float
    def __init__(self, key: _Optional[_Union[Key, _Mapping]] = ..., num_tokens: _Optional[int] = ..., block_keys: _Optional[bytes] = ..., max_tokens: _Optional[int] = ..., num_generated: _Optional[int] = ..., tenant: _Optional[str] = ..., priority: _Optional[int] = ..., slo: _Optional[_Union[Slo, _Mapping]] = ..., exclude: _Optional[_Iterable[str]] = ..., decode_only: bool = ..., first: bool = ..., num_choices: _Optional[int] = ..., weight: _Optional[float] = ...) -> None: ...

class PrefillDone(_message.Message):
    __slots__ = ("key", "ttft_ns")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TTFT_NS_FIELD_NUMBER: _ClassVar[int]
    key: Key
    ttft_ns: int
    def __init__(self, key: _Optional[_Union[Key, _Mapping]] = ..., ttft_ns: _Optional[int] = ...) -> None: ...

class AttemptEnded(_message.Message):
    __slots__ = ("key", "num_output", "completed", "mean_itl_ns", "tbt_ns")
    KEY_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_FIELD_NUMBER: _ClassVar[int]
    MEAN_ITL_NS_FIELD_NUMBER: _ClassVar[int]
    TBT_NS_FIELD_NUMBER: _ClassVar[int]
    key: Key
    num_output: int
    completed: bool
    mean_itl_ns: int
    tbt_ns: int
    def __init__(self, key: _Optional[_Union[Key, _Mapping]] = ..., num_output: _Optional[int] = ..., completed: bool = ..., mean_itl_ns: _Optional[int] = ..., tbt_ns: _Optional[int] = ...) -> None: ...

class Booking(_message.Message):
    __slots__ = ("key", "prefill", "decode", "num_tokens")
    KEY_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    key: Key
    prefill: str
    decode: str
    num_tokens: int
    def __init__(self, key: _Optional[_Union[Key, _Mapping]] = ..., prefill: _Optional[str] = ..., decode: _Optional[str] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class BookingSnapshot(_message.Message):
    __slots__ = ("frontend", "bookings")
    FRONTEND_FIELD_NUMBER: _ClassVar[int]
    BOOKINGS_FIELD_NUMBER: _ClassVar[int]
    frontend: str
    bookings: _containers.RepeatedCompositeFieldContainer[Booking]
    def __init__(self, frontend: _Optional[str] = ..., bookings: _Optional[_Iterable[_Union[Booking, _Mapping]]] = ...) -> None: ...

class Prediction(_message.Message):
    __slots__ = ("queue_ns", "load_ns", "prefill_ns", "ttft_ns", "tbt_ns")
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    LOAD_NS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_NS_FIELD_NUMBER: _ClassVar[int]
    TTFT_NS_FIELD_NUMBER: _ClassVar[int]
    TBT_NS_FIELD_NUMBER: _ClassVar[int]
    queue_ns: int
    load_ns: int
    prefill_ns: int
    ttft_ns: int
    tbt_ns: int
    def __init__(self, queue_ns: _Optional[int] = ..., load_ns: _Optional[int] = ..., prefill_ns: _Optional[int] = ..., ttft_ns: _Optional[int] = ..., tbt_ns: _Optional[int] = ...) -> None: ...

class Placed(_message.Message):
    __slots__ = ("key", "prefill", "decode", "source", "prediction", "num_choices", "check_decode")
    KEY_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    PREDICTION_FIELD_NUMBER: _ClassVar[int]
    NUM_CHOICES_FIELD_NUMBER: _ClassVar[int]
    CHECK_DECODE_FIELD_NUMBER: _ClassVar[int]
    key: Key
    prefill: str
    decode: str
    source: KvSource
    prediction: Prediction
    num_choices: int
    check_decode: bool
    def __init__(self, key: _Optional[_Union[Key, _Mapping]] = ..., prefill: _Optional[str] = ..., decode: _Optional[str] = ..., source: _Optional[_Union[KvSource, _Mapping]] = ..., prediction: _Optional[_Union[Prediction, _Mapping]] = ..., num_choices: _Optional[int] = ..., check_decode: bool = ...) -> None: ...

class Rejected(_message.Message):
    __slots__ = ("key", "reason", "detail", "retry_after_ns", "prediction")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_NS_FIELD_NUMBER: _ClassVar[int]
    PREDICTION_FIELD_NUMBER: _ClassVar[int]
    key: Key
    reason: str
    detail: str
    retry_after_ns: int
    prediction: Prediction
    def __init__(self, key: _Optional[_Union[Key, _Mapping]] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ..., retry_after_ns: _Optional[int] = ..., prediction: _Optional[_Union[Prediction, _Mapping]] = ...) -> None: ...

class CostModel(_message.Message):
    __slots__ = ("prefill", "decode")
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    prefill: _containers.RepeatedScalarFieldContainer[float]
    decode: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, prefill: _Optional[_Iterable[float]] = ..., decode: _Optional[_Iterable[float]] = ...) -> None: ...

class InstanceInfo(_message.Message):
    __slots__ = ("name", "epoch", "role", "address", "compat", "node", "node_addresses", "num_pages", "page_tokens", "max_batch", "max_step_tokens", "cost", "state", "shard", "kv_token_bytes", "held")
    NAME_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    COMPAT_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    NODE_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    MAX_STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    KV_TOKEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    name: str
    epoch: int
    role: str
    address: str
    compat: str
    node: str
    node_addresses: _containers.RepeatedScalarFieldContainer[str]
    num_pages: int
    page_tokens: int
    max_batch: int
    max_step_tokens: int
    cost: CostModel
    state: str
    shard: bytes
    kv_token_bytes: int
    held: bool
    def __init__(self, name: _Optional[str] = ..., epoch: _Optional[int] = ..., role: _Optional[str] = ..., address: _Optional[str] = ..., compat: _Optional[str] = ..., node: _Optional[str] = ..., node_addresses: _Optional[_Iterable[str]] = ..., num_pages: _Optional[int] = ..., page_tokens: _Optional[int] = ..., max_batch: _Optional[int] = ..., max_step_tokens: _Optional[int] = ..., cost: _Optional[_Union[CostModel, _Mapping]] = ..., state: _Optional[str] = ..., shard: _Optional[bytes] = ..., kv_token_bytes: _Optional[int] = ..., held: bool = ...) -> None: ...

class Members(_message.Message):
    __slots__ = ("instances",)
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    instances: _containers.RepeatedCompositeFieldContainer[InstanceInfo]
    def __init__(self, instances: _Optional[_Iterable[_Union[InstanceInfo, _Mapping]]] = ...) -> None: ...

class LiveAttempts(_message.Message):
    __slots__ = ("frontend", "keys", "held")
    FRONTEND_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    frontend: str
    keys: _containers.RepeatedCompositeFieldContainer[Key]
    held: _containers.RepeatedCompositeFieldContainer[Key]
    def __init__(self, frontend: _Optional[str] = ..., keys: _Optional[_Iterable[_Union[Key, _Mapping]]] = ..., held: _Optional[_Iterable[_Union[Key, _Mapping]]] = ...) -> None: ...

class StepTokens(_message.Message):
    __slots__ = ("instance", "frontend", "requests", "choices", "attempts", "positions", "counts", "finishes", "token_ids", "firsts", "logprobs")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    FRONTEND_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    FINISHES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FIRSTS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    instance: str
    frontend: str
    requests: _containers.RepeatedScalarFieldContainer[int]
    choices: _containers.RepeatedScalarFieldContainer[int]
    attempts: _containers.RepeatedScalarFieldContainer[int]
    positions: _containers.RepeatedScalarFieldContainer[int]
    counts: _containers.RepeatedScalarFieldContainer[int]
    finishes: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    firsts: _containers.RepeatedCompositeFieldContainer[First]
    logprobs: _containers.RepeatedCompositeFieldContainer[Logprobs]
    def __init__(self, instance: _Optional[str] = ..., frontend: _Optional[str] = ..., requests: _Optional[_Iterable[int]] = ..., choices: _Optional[_Iterable[int]] = ..., attempts: _Optional[_Iterable[int]] = ..., positions: _Optional[_Iterable[int]] = ..., counts: _Optional[_Iterable[int]] = ..., finishes: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., firsts: _Optional[_Iterable[_Union[First, _Mapping]]] = ..., logprobs: _Optional[_Iterable[_Union[Logprobs, _Mapping]]] = ...) -> None: ...

class First(_message.Message):
    __slots__ = ("index", "cached_tokens", "compute_ns")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_NS_FIELD_NUMBER: _ClassVar[int]
    index: int
    cached_tokens: int
    compute_ns: int
    def __init__(self, index: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., compute_ns: _Optional[int] = ...) -> None: ...

class Logprobs(_message.Message):
    __slots__ = ("index", "logprob", "top_ids", "top_values")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_VALUES_FIELD_NUMBER: _ClassVar[int]
    index: int
    logprob: float
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, index: _Optional[int] = ..., logprob: _Optional[float] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_values: _Optional[_Iterable[float]] = ...) -> None: ...

class KvReady(_message.Message):
    __slots__ = ("instance", "key", "source")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    instance: str
    key: Key
    source: KvSource
    def __init__(self, instance: _Optional[str] = ..., key: _Optional[_Union[Key, _Mapping]] = ..., source: _Optional[_Union[KvSource, _Mapping]] = ...) -> None: ...

class KvPartReady(_message.Message):
    __slots__ = ("instance", "key", "start", "source")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    instance: str
    key: Key
    start: int
    source: KvSource
    def __init__(self, instance: _Optional[str] = ..., key: _Optional[_Union[Key, _Mapping]] = ..., start: _Optional[int] = ..., source: _Optional[_Union[KvSource, _Mapping]] = ...) -> None: ...

class LoadAhead(_message.Message):
    __slots__ = ("start", "source", "tenant")
    START_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    start: int
    source: KvSource
    tenant: str
    def __init__(self, start: _Optional[int] = ..., source: _Optional[_Union[KvSource, _Mapping]] = ..., tenant: _Optional[str] = ...) -> None: ...

class AttemptFailed(_message.Message):
    __slots__ = ("instance", "key", "reason", "detail")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    instance: str
    key: Key
    reason: str
    detail: str
    def __init__(self, instance: _Optional[str] = ..., key: _Optional[_Union[Key, _Mapping]] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class Registered(_message.Message):
    __slots__ = ("accepted", "detail")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    detail: str
    def __init__(self, accepted: bool = ..., detail: _Optional[str] = ...) -> None: ...

class InstanceLoad(_message.Message):
    __slots__ = ("name", "epoch", "seq", "num_waiting", "waiting_tokens", "num_running", "context_tokens", "free_pages", "step_ns", "waiting_context", "num_attempts", "num_computed_tokens", "reused")
    NAME_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FREE_PAGES_FIELD_NUMBER: _ClassVar[int]
    STEP_NS_FIELD_NUMBER: _ClassVar[int]
    WAITING_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    NUM_ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REUSED_FIELD_NUMBER: _ClassVar[int]
    name: str
    epoch: int
    seq: int
    num_waiting: int
    waiting_tokens: int
    num_running: int
    context_tokens: int
    free_pages: int
    step_ns: int
    waiting_context: int
    num_attempts: int
    num_computed_tokens: int
    reused: ReusedTokens
    def __init__(self, name: _Optional[str] = ..., epoch: _Optional[int] = ..., seq: _Optional[int] = ..., num_waiting: _Optional[int] = ..., waiting_tokens: _Optional[int] = ..., num_running: _Optional[int] = ..., context_tokens: _Optional[int] = ..., free_pages: _Optional[int] = ..., step_ns: _Optional[int] = ..., waiting_context: _Optional[int] = ..., num_attempts: _Optional[int] = ..., num_computed_tokens: _Optional[int] = ..., reused: _Optional[_Union[ReusedTokens, _Mapping]] = ...) -> None: ...

class CacheDelta(_message.Message):
    __slots__ = ("holder", "epoch", "seq", "tier", "added", "removed")
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    holder: str
    epoch: int
    seq: int
    tier: str
    added: bytes
    removed: bytes
    def __init__(self, holder: _Optional[str] = ..., epoch: _Optional[int] = ..., seq: _Optional[int] = ..., tier: _Optional[str] = ..., added: _Optional[bytes] = ..., removed: _Optional[bytes] = ...) -> None: ...

class CacheSnapshot(_message.Message):
    __slots__ = ("holder", "epoch", "seq", "tier", "keys")
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    holder: str
    epoch: int
    seq: int
    tier: str
    keys: bytes
    def __init__(self, holder: _Optional[str] = ..., epoch: _Optional[int] = ..., seq: _Optional[int] = ..., tier: _Optional[str] = ..., keys: _Optional[bytes] = ...) -> None: ...

class SnapshotRequest(_message.Message):
    __slots__ = ("holder", "tier")
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    holder: str
    tier: str
    def __init__(self, holder: _Optional[str] = ..., tier: _Optional[str] = ...) -> None: ...

class StateChange(_message.Message):
    __slots__ = ("name", "epoch", "state", "cost")
    NAME_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    name: str
    epoch: int
    state: str
    cost: CostModel
    def __init__(self, name: _Optional[str] = ..., epoch: _Optional[int] = ..., state: _Optional[str] = ..., cost: _Optional[_Union[CostModel, _Mapping]] = ...) -> None: ...

class NodeInfo(_message.Message):
    __slots__ = ("name", "epoch", "addresses", "capacity_bytes", "compat")
    NAME_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMPAT_FIELD_NUMBER: _ClassVar[int]
    name: str
    epoch: int
    addresses: _containers.RepeatedScalarFieldContainer[str]
    capacity_bytes: int
    compat: str
    def __init__(self, name: _Optional[str] = ..., epoch: _Optional[int] = ..., addresses: _Optional[_Iterable[str]] = ..., capacity_bytes: _Optional[int] = ..., compat: _Optional[str] = ...) -> None: ...

class ChangeRole(_message.Message):
    __slots__ = ("name", "epoch", "role")
    NAME_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    name: str
    epoch: int
    role: str
    def __init__(self, name: _Optional[str] = ..., epoch: _Optional[int] = ..., role: _Optional[str] = ...) -> None: ...

class CopyBlocks(_message.Message):
    __slots__ = ("source", "shard")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    source: KvSource
    shard: bytes
    def __init__(self, source: _Optional[_Union[KvSource, _Mapping]] = ..., shard: _Optional[bytes] = ...) -> None: ...

class TierLoad(_message.Message):
    __slots__ = ("tier", "capacity_bytes", "used_bytes", "num_objects")
    TIER_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_OBJECTS_FIELD_NUMBER: _ClassVar[int]
    tier: str
    capacity_bytes: int
    used_bytes: int
    num_objects: int
    def __init__(self, tier: _Optional[str] = ..., capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., num_objects: _Optional[int] = ...) -> None: ...

class NodeLoad(_message.Message):
    __slots__ = ("name", "epoch", "tiers")
    NAME_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    epoch: int
    tiers: _containers.RepeatedCompositeFieldContainer[TierLoad]
    def __init__(self, name: _Optional[str] = ..., epoch: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[TierLoad, _Mapping]]] = ...) -> None: ...

class AskExplain(_message.Message):
    __slots__ = ("number", "frontend", "request")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    FRONTEND_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    number: int
    frontend: str
    request: int
    def __init__(self, number: _Optional[int] = ..., frontend: _Optional[str] = ..., request: _Optional[int] = ...) -> None: ...

class AskHold(_message.Message):
    __slots__ = ("number", "name", "held")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    number: int
    name: str
    held: bool
    def __init__(self, number: _Optional[int] = ..., name: _Optional[str] = ..., held: bool = ...) -> None: ...

class Told(_message.Message):
    __slots__ = ("number", "text", "error")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    number: int
    text: str
    error: str
    def __init__(self, number: _Optional[int] = ..., text: _Optional[str] = ..., error: _Optional[str] = ...) -> None: ...

class InstanceStatus(_message.Message):
    __slots__ = ("name", "role", "state", "node", "num_waiting", "num_running", "num_prefills", "num_decodes", "num_pages", "used_pages", "max_batch", "tokens_per_s", "step_ns", "queue_ns")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFILLS_FIELD_NUMBER: _ClassVar[int]
    NUM_DECODES_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    USED_PAGES_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    STEP_NS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    name: str
    role: str
    state: str
    node: str
    num_waiting: int
    num_running: int
    num_prefills: int
    num_decodes: int
    num_pages: int
    used_pages: int
    max_batch: int
    tokens_per_s: float
    step_ns: int
    queue_ns: int
    def __init__(self, name: _Optional[str] = ..., role: _Optional[str] = ..., state: _Optional[str] = ..., node: _Optional[str] = ..., num_waiting: _Optional[int] = ..., num_running: _Optional[int] = ..., num_prefills: _Optional[int] = ..., num_decodes: _Optional[int] = ..., num_pages: _Optional[int] = ..., used_pages: _Optional[int] = ..., max_batch: _Optional[int] = ..., tokens_per_s: _Optional[float] = ..., step_ns: _Optional[int] = ..., queue_ns: _Optional[int] = ...) -> None: ...

class NodeStatus(_message.Message):
    __slots__ = ("name", "connected", "num_blocks", "out_ns", "in_ns", "ssd_ns", "tiers")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    OUT_NS_FIELD_NUMBER: _ClassVar[int]
    IN_NS_FIELD_NUMBER: _ClassVar[int]
    SSD_NS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    connected: bool
    num_blocks: int
    out_ns: int
    in_ns: int
    ssd_ns: int
    tiers: _containers.RepeatedCompositeFieldContainer[TierLoad]
    def __init__(self, name: _Optional[str] = ..., connected: bool = ..., num_blocks: _Optional[int] = ..., out_ns: _Optional[int] = ..., in_ns: _Optional[int] = ..., ssd_ns: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[TierLoad, _Mapping]]] = ...) -> None: ...

class ReusedTokens(_message.Message):
    __slots__ = ("prompt", "hbm", "dram", "ssd")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    HBM_FIELD_NUMBER: _ClassVar[int]
    DRAM_FIELD_NUMBER: _ClassVar[int]
    SSD_FIELD_NUMBER: _ClassVar[int]
    prompt: int
    hbm: int
    dram: int
    ssd: int
    def __init__(self, prompt: _Optional[int] = ..., hbm: _Optional[int] = ..., dram: _Optional[int] = ..., ssd: _Optional[int] = ...) -> None: ...

class Count(_message.Message):
    __slots__ = ("name", "count")
    NAME_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    name: str
    count: int
    def __init__(self, name: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class ClusterStatus(_message.Message):
    __slots__ = ("number", "policy", "num_waiting", "num_bookings", "counts", "reused", "instances", "nodes")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_BOOKINGS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    REUSED_FIELD_NUMBER: _ClassVar[int]
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    number: int
    policy: str
    num_waiting: int
    num_bookings: int
    counts: _containers.RepeatedCompositeFieldContainer[Count]
    reused: ReusedTokens
    instances: _containers.RepeatedCompositeFieldContainer[InstanceStatus]
    nodes: _containers.RepeatedCompositeFieldContainer[NodeStatus]
    def __init__(self, number: _Optional[int] = ..., policy: _Optional[str] = ..., num_waiting: _Optional[int] = ..., num_bookings: _Optional[int] = ..., counts: _Optional[_Iterable[_Union[Count, _Mapping]]] = ..., reused: _Optional[_Union[ReusedTokens, _Mapping]] = ..., instances: _Optional[_Iterable[_Union[InstanceStatus, _Mapping]]] = ..., nodes: _Optional[_Iterable[_Union[NodeStatus, _Mapping]]] = ...) -> None: ...

class Hold(_message.Message):
    __slots__ = ("name", "held")
    NAME_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    name: str
    held: bool
    def __init__(self, name: _Optional[str] = ..., held: bool = ...) -> None: ...
