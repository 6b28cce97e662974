"""Every error that this system raises on purpose.

    MooncakeError
    ├── ConfigError            a key or a value of the configuration; the message names both
    ├── ModelError             a model that is missing, unreadable, or refused at load
    ├── StoreError
    │   ├── StoreUnavailable   the node cannot be reached, or was lost during the call
    │   │   └── HandleLost     the connection that held this reservation or lease is gone, and with it the claim
    │   ├── DeadlineExceeded   no answer in time; claims the node took for the call are given back when it comes
    │   ├── AuthError          wrong cluster token
    │   ├── Damaged            what was read does not have the checksum that its writer took
    │   ├── ProtocolError      the peer broke the protocol, or says that we did
    │   └── BadArgument        the caller's fault; the message names the argument
    ├── TransportError
    │   ├── OutOfRange         outside of the registered region, or without a claim on it
    │   ├── PathLost           the path to the region broke
    │   ├── TransferTimeout    the path made no progress in time
    │   └── SegmentError       shared memory that is missing, too small, foreign, or owned by a live process
    ├── RpcError               a control stream that broke, or a peer that refused us
    │   ├── Refused            the peer does not want us, or we not it; the message names both values
    │   ├── ProtocolFault      what came, or was to go, is no valid message of the protocol
    │   └── OutboxFull         the peer does not read
    ├── TraceError             a trace that is missing, or is none; the message names file, line and reason
    ├── EventLogError          a file that is no event log, or none that this program can read
    ├── ReplayMismatch         a core that, told again what its event log says, does not do what it did
    └── ProcessError           a process of the cluster that does not come up

A miss and a refusal are values and not in this tree. Rooms above transport never let a TransportError out: the store maps
OutOfRange to BadArgument, TransferTimeout to DeadlineExceeded, PathLost to StoreUnavailable and SegmentError to StoreError.
"""

from __future__ import annotations

from collections.abc import Sequence


class MooncakeError(Exception):
    """Root of the tree: catch it to catch all."""


class ConfigError(MooncakeError):
    pass


class ModelError(MooncakeError):
    pass


class StoreError(MooncakeError):
    pass


class StoreUnavailable(StoreError):
    pass


class HandleLost(StoreUnavailable):
    pass


class DeadlineExceeded(StoreError):
    pass


class AuthError(StoreError):
    pass


class Damaged(StoreError):
    """indices: of the objects, in the batch that was read."""

    def __init__(self, detail: str, indices: Sequence[int]) -> None:
        super().__init__(detail)
        self.indices = tuple(indices)


class ProtocolError(StoreError):
    pass


class BadArgument(StoreError):
    pass


class TransportError(MooncakeError):
    pass


class OutOfRange(TransportError):
    pass


class PathLost(TransportError):
    pass


class TransferTimeout(TransportError):
    pass


class SegmentError(TransportError):
    pass


class RpcError(MooncakeError):
    pass


class Refused(RpcError):
    pass


class ProtocolFault(RpcError):
    pass


class OutboxFull(RpcError):
    pass


class TraceError(MooncakeError):
    pass


class EventLogError(MooncakeError):
    pass


class ReplayMismatch(MooncakeError):
    pass


class ProcessError(MooncakeError):
    pass
