"""Regions of this process: for tests, the simulator and programs that embed a store."""

from __future__ import annotations

import itertools

from mooncake.core.errors import PathLost
from mooncake.transport.base import MappedPath, Region


class MemoryRegistration:
    def __init__(self, transport: MemoryTransport, region: Region, buffer: memoryview) -> None:
        self.region = region
        self.buffer = buffer
        self._transport = transport

    def close(self) -> None:
        self._transport.forget(self.region)


class MemoryTransport:
    """A name space of regions. Two clusters in one process use two of them."""

    def __init__(self) -> None:
        self._buffers: dict[str, memoryview] = {}
        self._names = itertools.count(1)

    def register(self, buffer: bytearray | memoryview) -> MemoryRegistration:
        """buffer: writable, contiguous."""
        view = memoryview(buffer).cast("B")
        region = Region("memory", f"memory:{next(self._names)}", view.nbytes)
        self._buffers[region.handle] = view
        return MemoryRegistration(self, region, view)

    def open(self, region: Region) -> MappedPath:
        if region.handle not in self._buffers:
            raise PathLost(f"{region.handle} is not registered")
        return MappedPath(region, self._buffers[region.handle])

    def forget(self, region: Region) -> None:
        self._buffers.pop(region.handle, None)
