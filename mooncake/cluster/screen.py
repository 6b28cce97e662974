"""What the user of `mooncake serve` sees: lines of progress, then one table. Plain text reads well in a file too."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from mooncake.cluster.supervisor import Child
from mooncake.config import Config
from mooncake.status import Phase, StatusLine


class Screen:
    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._shown: dict[str, str] = {}

    def say(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def heard(self, child: Child, line: StatusLine) -> None:
        """A status line of a child: shown when it says something new."""
        text = f"{line.stage} {line.detail}".strip()
        if line.stage is Phase.STARTING and child.num_restarts == 0:
            return
        if self._shown.get(child.spec.name) != text:
            self._shown[child.spec.name] = text
            self.say(f"  {child.spec.name:<12} {text}")

    def ready(self, config: Config, children: Sequence[Child], logs: Path) -> None:
        model = f"{config.model_name} on {config.engine}, {config.dtype}"
        rows = [("name", "role", "pid", "address")]
        rows += [(child.spec.name, child.spec.role, str(child.pid), child.spec.address) for child in children]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        self.say(f"\nmooncake {config.cluster}: {model}\n")
        for name, role, pid, address in rows:
            self.say(f"  {name:<{widths[0]}}  {role:<{widths[1]}}  {pid:>{widths[2]}}  {address}")
        self.say(f"\n  logs  {logs}\n  stop  Ctrl-C\n\n{curl_line(config)}\n")


def base_url(config: Config) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"{'https' if config.tls.cert else 'http'}://{host}:{config.port}"


def curl_line(config: Config) -> str:
    body = {
        "model": config.model_name,
        "messages": [{"role": "user", "content": "Why is the sky blue?"}],
        "stream": True,
    }
    return (
        f"curl -N {base_url(config)}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"  -d '{json.dumps(body)}'"
    )
