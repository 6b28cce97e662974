"""The releases of vLLM that the connector was tested with. Its connector interface changes between releases, and a connector
that misunderstands it gives wrong tokens; so others are refused."""

from __future__ import annotations

from mooncake.core.errors import ConfigError

SUPPORTED = ("0.32.0",)


def check_version(found: str) -> None:
    """found: such as 0.32.0 or 0.32.0+cpu. Raises ConfigError."""
    if found.partition("+")[0] not in SUPPORTED:
        raise ConfigError(f"vllm = {found}: this release supports vLLM {', '.join(SUPPORTED)}")
