"""The Conductor's settings. Every limit of its queues, memories and waits is named here, with its reason."""

from __future__ import annotations

from typing import Literal

import msgspec

from mooncake.core.types import NANOS_PER_MS, NANOS_PER_S

AdmissionMode = Literal["off", "soft", "hard"]


class Rates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes per second at which KV reaches a prefill instance, by where it lies. Uncontended; FACTS 6 measured these
    on a laptop."""

    dram_bytes_per_s: float = 10e9
    ssd_bytes_per_s: float = 2e9
    remote_bytes_per_s: float = 5e9


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When predictions of an instance are trusted enough to refuse requests by them (FACTS 5: hard gates with bad
    estimates)."""

    num_outcomes_min: int = 20
    relative_error_max: float = 0.5


class ConductorConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    block_tokens: int = 128
    kv_token_bytes: int = 23_040
    """KV bytes of one token, all layers; prices loads. The default is the default model's in bf16."""
    policy: Literal["algorithm1", "least_load"] = "algorithm1"
    threshold: float = 2.0
    """Algorithm 1: remote KV is taken if it is more than this many times longer than the local match."""
    admission: AdmissionMode = "soft"
    calibration: Calibration = Calibration()
    rates: Rates = Rates()

    index_blocks_max: int = 4_000_000
    """About 250 bytes each."""
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
    num_answers_max: int = 16_384
    """Answers kept after an attempt ended, so that a repeated PlaceRequest cannot book again."""
    num_records_max: int = 512
