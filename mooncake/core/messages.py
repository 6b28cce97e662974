"""Messages between processes, and the one command every core may give: `Send`.

The same values travel over gRPC (`mooncake.rpc.codec` maps each to protobuf) and over the simulator's memory network.
Messages may be lost with a broken connection or repeated; every handler is idempotent, and periodic snapshots repair
what was lost. `REASONS` of failures are words that programs compare; `detail` is for people.
"""

from __future__ import annotations

import msgspec

from mooncake.core.types import (
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
    Slo,
    TierLoad,
    TokenLogprobs,
)

CONDUCTOR = "conductor"
"""The peer name of the Conductor; instances, frontends and store nodes have names of their own."""


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of everything that crosses a wire. Tagged, so that event logs can be read back."""


# ---------------------------------------------------------------- frontend -> Conductor


class PlaceRequest(Message, frozen=True):
    """Ask for a placement of one attempt. It is answered by exactly one `Placed` or `Rejected` with the same key.

    `decode_only`: the KV of all tokens but the last few exists at `source`; only a decode instance is wanted.
    `exclude`: instances that failed this request; used only if there is no other.
    `first`: whether no token was sent to the client yet; only then may admission reject.
    `num_choices`: sequences that will decode, all at one instance. Each is booked under the key of its choice (from
    `key.choice` on) and ends by itself."""

    key: AttemptKey
    num_tokens: int
    block_keys: tuple[bytes, ...]
    max_tokens: int | None
    """The client's limit on output tokens, or None."""
    num_generated: int = 0
    tenant: str = ""
    priority: int = 0
    slo: Slo = Slo()
    exclude: tuple[str, ...] = ()
    decode_only: bool = False
    first: bool = True
    num_choices: int = 1
    weight: float = 1.0
    """The tenant's share, beside those of the others."""


class PrefillDone(Message, frozen=True):
    """The prefill part of a booking ended: first token seen, or the prefill failed. ttft_ns is the measured time from
    placement to first token, or None."""

    key: AttemptKey
    ttft_ns: int | None = None


class AttemptEnded(Message, frozen=True):
    """The attempt is over, whatever way; what is left of its booking goes."""

    key: AttemptKey
    num_output: int = 0
    completed: bool = False
    """Whether the request ended by stop or length; then num_output teaches the length distribution."""
    mean_itl_ns: int | None = None
    tbt_ns: int | None = None
    """As the frontend saw it: of tokens that came together each had an equal part of the gap."""


class BookingSnapshot(Message, frozen=True):
    """All attempts of this frontend that are placed and not ended, with what is still booked. Sent at connection and then
    periodically; it repairs lost messages in both directions. Tuple: key, prefill instance or "", decode instance, tokens."""

    frontend: str
    bookings: tuple[tuple[AttemptKey, str, str, int], ...]


# ---------------------------------------------------------------- Conductor -> frontend


class Prediction(msgspec.Struct, frozen=True):
    """What the Conductor expects of a placement, in nanoseconds. ttft is the sum of the parts before it."""

    queue_ns: int = 0
    load_ns: int = 0
    prefill_ns: int = 0
    ttft_ns: int = 0
    tbt_ns: int = 0


class Placed(Message, frozen=True):
    """prefill is "" when only a decode instance was asked for, or when the decode instance prefills in place. num_choices: as
    many keys are booked as were asked for. check_decode: decode is not judged yet; when the KV is ready, ask for decode alone
    before it is submitted, and give the request up if that is rejected."""

    key: AttemptKey
    prefill: str
    decode: str
    source: KvSource | None
    prediction: Prediction
    num_choices: int = 1
    check_decode: bool = False


class Rejected(Message, frozen=True):
    """reason: overloaded_ttft, overloaded_tbt, queue_full, no_instance, too_long, over_quota. Only `too_long` is the client's
    fault."""

    key: AttemptKey
    reason: str
    detail: str
    retry_after_ns: int
    prediction: Prediction = Prediction()


class Members(Message, frozen=True):
    """All instances that are not gone. Complete every time, never a difference."""

    instances: tuple[InstanceInfo, ...]


# ---------------------------------------------------------------- frontend -> instance


class Submit(Message, frozen=True):
    """Run this job. A key that is known already is ignored."""

    job: Job


class Abort(Message, frozen=True):
    keys: tuple[AttemptKey, ...]


class LoadAhead(Message, frozen=True):
    """A sequence will come whose leading blocks are at `source`: load them if there is room, and if those up to token `start`,
    named by an earlier such message, are still there. Nobody waits for it, and there is no answer. tenant: whose it is."""

    start: int
    source: KvSource
    tenant: str = ""


class HandoverDone(Message, frozen=True):
    """The decode instance has the KV; the prefill instance may release its leases of these attempts."""

    keys: tuple[AttemptKey, ...]


class LiveAttempts(Message, frozen=True):
    """All attempts this frontend still wants of this instance; others of this frontend that are older than the message are
    aborted and their hand-overs released. `held`: hand-overs still needed."""

    frontend: str
    keys: tuple[AttemptKey, ...]
    held: tuple[AttemptKey, ...] = ()


# ---------------------------------------------------------------- instance -> frontend


class TokenOutput(msgspec.Struct, frozen=True):
    """Tokens of one attempt. `position` is the absolute position in the sequence (prompt counts) of the first of them.

    cached_tokens: prompt tokens whose KV was reused; compute_ns: time since the engine gave the attempt its pages. Both come
    with the first output of an attempt, else None."""

    key: AttemptKey
    position: int
    token_ids: tuple[int, ...]
    finish: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    cached_tokens: int | None = None
    compute_ns: int | None = None


class StepTokens(Message, frozen=True):
    """All tokens of one step for one frontend."""

    instance: str
    outputs: tuple[TokenOutput, ...]


class KvPartReady(Message, frozen=True):
    """The KV of `source.num_tokens` leading tokens is committed, while the rest is still computed. `start`: how many of them an
    earlier such message told of. Lost ones are not repeated."""

    instance: str
    key: AttemptKey
    start: int
    source: KvSource


class KvReady(Message, frozen=True):
    """The KV of `source.num_tokens` tokens is committed and leased by the prefill instance until HandoverDone or Abort."""

    instance: str
    key: AttemptKey
    source: KvSource


class AttemptFailed(Message, frozen=True):
    """The instance gave the attempt up. reason: refused (queue full, draining, or in another role), load_failed, store_full,
    engine_error, too_long, grammar (it cannot be followed, here or elsewhere), deadline, unknown. The KV of the job's source
    may still exist unless load_failed."""

    instance: str
    key: AttemptKey
    reason: str
    detail: str = ""


# ---------------------------------------------------------------- instance <-> Conductor


class Register(Message, frozen=True):
    info: InstanceInfo


class Registered(Message, frozen=True):
    """accepted is False when the compatibility hash differs or the name is taken; detail names both values."""

    accepted: bool
    detail: str = ""


class LoadReport(Message, frozen=True):
    load: InstanceLoad


class CacheDelta(Message, frozen=True):
    """Blocks that a holder gained and lost. holder: an instance (tier hbm) or a store node (dram, ssd). (epoch, seq) number
    the reports; a gap makes the receiver ask with SnapshotRequest, answered by a CacheSnapshot."""

    holder: str
    epoch: int
    seq: int
    tier: str
    added: tuple[bytes, ...]
    removed: tuple[bytes, ...]


class CacheSnapshot(Message, frozen=True):
    """Everything the holder has in that tier, as of `seq`; deltas up to seq are contained."""

    holder: str
    epoch: int
    seq: int
    tier: str
    keys: tuple[bytes, ...]


class SnapshotRequest(Message, frozen=True):
    holder: str
    tier: str


class StateChange(Message, frozen=True):
    """An instance's life cycle moved on, or its time model was fitted anew."""

    name: str
    epoch: int
    state: InstanceState
    cost: CostModel


class Drain(Message, frozen=True):
    """Take no new work, finish what runs, then go."""

    name: str


class ChangeRole(Message, frozen=True):
    """Take no new work, finish what runs, then register again in that role, under a new epoch. epoch: of the life that is
    meant; another one ignores it."""

    name: str
    epoch: int
    role: Role


class CopyBlocks(Message, frozen=True):
    """To a store node: copy the objects of these blocks from the node of `source`, as far as they are there and there is room
    here. The usual reports tell what came of it. shard: with a block's key it makes the object's key."""

    source: KvSource
    shard: bytes


class NodeInfo(msgspec.Struct, frozen=True):
    """A store node at registration."""

    name: str
    epoch: int
    addresses: tuple[str, ...]
    capacity_bytes: int
    compat: str = ""


class RegisterNode(Message, frozen=True):
    info: NodeInfo


class NodeLoad(Message, frozen=True):
    """What is in a store node's tiers: for people, nothing is decided by it. Told when it changed, at most every second."""

    name: str
    epoch: int
    tiers: tuple[TierLoad, ...]


# ---------------------------------------------------------------- for the operator
# A frontend asks for the operator and the Conductor answers. `number` ties an answer to its question; who knows no such
# question does not answer it, so each is asked with a deadline.


class AskStatus(Message, frozen=True):
    """Answered by ClusterStatus."""

    number: int


class AskExplain(Message, frozen=True):
    """Why was that request placed as it was? Answered by Told."""

    number: int
    frontend: str
    request: int


class AskHold(Message, frozen=True):
    """The instance shall take nothing new (held), or take requests again. Answered by Told."""

    number: int
    name: str
    held: bool


class Told(Message, frozen=True):
    """text: for people. error: empty, or a word: unknown (the question names what is not there), unreachable (it is, but has
    no connection now)."""

    number: int
    text: str
    error: str = ""


class InstanceStatus(msgspec.Struct, frozen=True):
    """state: a word of InstanceState, or drained (held, and nothing is left) or lost (no connection). num_prefills,
    num_decodes: booked there. queue_ns: until all prefill work there will be done."""

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


class NodeStatus(msgspec.Struct, frozen=True):
    """out, in, ssd: for how long each of its links is booked from now. num_blocks: those that the prefix index knows."""

    name: str
    connected: bool
    num_blocks: int
    out_ns: int
    in_ns: int
    ssd_ns: int
    tiers: tuple[TierLoad, ...]


class ClusterStatus(Message, frozen=True):
    """counts: as the Conductor counts its answers: placed, waited, rejected_REASON, soft_REASON and so on. reused: by all
    instances that it knows, as they report it."""

    number: int
    policy: str
    num_waiting: int
    num_bookings: int
    counts: tuple[tuple[str, int], ...]
    reused: ReusedTokens
    instances: tuple[InstanceStatus, ...]
    nodes: tuple[NodeStatus, ...]


class Hold(Message, frozen=True):
    """To an instance: remember whether it is held, so that a Conductor that starts anew learns it. It goes on with all that
    was or is placed on it."""

    name: str
    held: bool


AnyMessage = (
    PlaceRequest
    | PrefillDone
    | AttemptEnded
    | BookingSnapshot
    | Placed
    | Rejected
    | Members
    | Submit
    | Abort
    | LoadAhead
    | HandoverDone
    | LiveAttempts
    | StepTokens
    | KvPartReady
    | KvReady
    | AttemptFailed
    | Register
    | Registered
    | LoadReport
    | CacheDelta
    | CacheSnapshot
    | SnapshotRequest
    | StateChange
    | Drain
    | RegisterNode
    | ChangeRole
    | CopyBlocks
    | NodeLoad
    | AskStatus
    | AskExplain
    | AskHold
    | Told
    | ClusterStatus
    | Hold
)
"""All messages, for typed decoding of event logs."""


class Send(msgspec.Struct, frozen=True):
    """Command: deliver `message` to the peer of that name. Delivery may fail silently."""

    to: str
    message: AnyMessage
