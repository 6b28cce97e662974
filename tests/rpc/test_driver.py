"""The event log that a driver keeps: there up to the last event, however the process ends."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec

from mooncake.config import Config, RoleConfig
from mooncake.core.event_log import encode_commands, read_log
from mooncake.rpc.driver import CoreDriver, open_event_log


class EchoCore:
    def handle(self, event: Any, now: int) -> list[Any]:
        return [event]

    def deadline(self) -> int | None:
        return None


class Settings(msgspec.Struct):
    size: int


def test_a_killed_process_leaves_its_last_event_in_the_log(tmp_path: Path) -> None:
    async def handle_without_closing() -> None:
        config = Config(event_log=str(tmp_path))
        role = RoleConfig("conductor", "c0", "", "", "", "")
        driver = CoreDriver(EchoCore(), lambda command: None, "tick", log=open_event_log(config, role, Settings(3)))
        driver.handle("first")
        driver.handle("last")
        assert [entry.commands for entry in _entries(tmp_path)] == [
            encode_commands(["first"]),
            encode_commands(["last"]),
        ]
        driver.close()

    asyncio.run(handle_without_closing())


def _entries(folder: Path) -> list[Any]:
    [path] = folder.iterdir()
    with path.open("rb") as file:
        header, entries = read_log(file)
        assert (header.core, header.settings) == ("conductor", {"size": 3})
        return list(entries)
