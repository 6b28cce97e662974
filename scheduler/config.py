"""The Conductor's settings. Every limit of its queues, memories and waits is named here, with its reason."""

from __future__ import annotations

from typing import Literal

import msgspec

from mooncake.core.types import NANOS_PER_MS, NANOS_PER_S

PolicyName = Literal["random", "round_robin", "least_load", "local_cache_aware", "algorithm1", "joint"]
AdmissionMode = Literal["off", "soft", "hard"]
AdmissionRule = Literal["placement", "baseline", "early", "early_predicted"]


class Rates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes per second at which KV moves. Of one transfer with the path to itself: dram, from a node's memory to an
    instance of that machine, which PCIe limits; ssd; remote, from another node. nic: of each node's NIC each way,
    which all its transfers share; they share its SSD likewise. FACTS 6 measured these on a laptop."""

    dram_bytes_per_s: float = 10e9
    ssd_bytes_per_s: float = 2e9
    remote_bytes_per_s: float = 5e9
    nic_bytes_per_s: float = 5e9


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When predictions of an instance are trusted enough to refuse requests by them (FACTS 5: hard gates with bad
    estimates)."""

    num_outcomes_min: int = 20
    relative_error_max: float = 0.5
    margin_max: float = 0.25
    """Part of an objective that is kept free at most, for those that come later than was predicted."""


class JointConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Policy joint."""

    work_weight: float = 1.0
    """What a second of computing costs those who come later, beside the second that this request waits for it: as if one
    were to wait for it. Between 0.5 and 6 goodput hardly changes; the queues of a full prefill pool are shorter with more."""
    in_place_tokens_max: int = 512
    """New tokens of a prompt that may be prefilled on a decode instance which has its prefix; 0: none."""


class Fairness(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who is refused first under overload."""

    class_step: float = 0.25
    """By how much of an objective a class is tolerated to be later than the class below it; class 0 is not at all."""
    share_floor: float = 0.5
    """However far a tenant is above its share, it is not refused below this part of an objective."""
    half_life_ns: int = 60 * NANOS_PER_S
    """Of the use that a tenant's share is measured by."""
    num_tenants_max: int = 1024
    """Tenants remembered; of more, the least lately seen are forgotten."""


class ReplicationConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When a prefix is copied to one more store node."""

    num_uses_min: float = 8.0
    """Uses within about a half-life that make it hot."""
    num_blocks_min: int = 4
    """Shorter ones are computed sooner than they are worth a copy."""
    half_life_ns: int = 30 * NANOS_PER_S
    wait_ns: int = 50 * NANOS_PER_MS
    """A source whose NIC is so far behind is overloaded."""
    nic_share: float = 0.25
    """Of each holder's NIC, what one prefix may take."""
    rest_ns: int = 5 * NANOS_PER_S
    """Before the same prefix is copied again, beside twice the time of the copy."""
    num_prefixes_max: int = 1024


class RolesConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When an instance changes pools. ttft, tbt: what a queue and a step may take at most."""

    ttft_ns: int = 5 * NANOS_PER_S
    tbt_ns: int = 100 * NANOS_PER_MS
    pressure_high: float = 0.9
    pressure_spare: float = 0.7
    """What the other pool's pressure may become by giving an instance away."""
    attained_min: float = 0.9
    sample_ns: int = 5 * NANOS_PER_S
    """Between two looks at the pools."""
    num_samples: int = 3
    num_samples_max: int = 96
    drain_ns: int = 120 * NANOS_PER_S
    """A switch that takes longer has failed."""
    rest_ns: int = 30 * NANOS_PER_S
    forgive_ns: int = 3600 * NANOS_PER_S
    """After so long without any wish to switch, patience is as at the beginning."""
    num_prefill_min: int = 1
    num_decode_min: int = 1


class ConductorConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    block_tokens: int = 128
    kv_token_bytes: int = 23_040
    """KV bytes of one token, all layers; prices loads until the first instance says what they are. The default is the
    default model's in bf16."""
    policy: PolicyName = "joint"
    threshold: float = 2.0
    """Algorithm 1: remote KV is taken if it is more than this many times longer than the local match."""
    joint: JointConfig = JointConfig()
    admission: AdmissionMode = "soft"
    admission_rule: AdmissionRule = "placement"
    fairness: Fairness = Fairness()
    calibration: Calibration = Calibration()
    replicate: bool = False
    """Whether hot prefixes are copied to more store nodes ahead of use."""
    replication: ReplicationConfig = ReplicationConfig()
    switch_roles: bool = False
    """Whether instances are moved from one pool to the other."""
    roles: RolesConfig = RolesConfig()
    rates: Rates = Rates()

    index_blocks_max: int = 10_000_000
    """About 110 bytes each, at most 250."""
    prediction_grace_ns: int = 10 * NANOS_PER_S
    """A predicted cache entry outlives its predicted first token by this much; by then events have confirmed it or
    never will."""
    peer_grace_ns: int = 5 * NANOS_PER_S
    """A lost connection may be a hiccup: until then nothing new is placed there, but bookings stay."""
    booking_grace_ns: int = 5 * NANOS_PER_S
    """A booking missing in its frontend's snapshot is released only if older: younger ones may have crossed on the
    wire."""
    settle_ns: int = 50 * NANOS_PER_MS
    """A load report shows work that was sent at least this long before it; younger work is added from the books."""
    snapshot_retry_ns: int = 2 * NANOS_PER_S
    wait_ns: int = 30 * NANOS_PER_S
    """How long a request waits for an instance to become ready."""
    num_waiting_max: int = 1024
    num_queued_max: int | None = None
    """Attempts that one instance has at once, as it refuses more: a request is turned away before that. None: not known."""
    num_answers_max: int = 16_384
    """Answers kept after an attempt ended, so that a repeated PlaceRequest cannot book again."""
    num_records_max: int = 512
