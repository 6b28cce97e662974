"""Mooncake: disaggregated, KVCache-centric serving of large language models."""

__version__ = "0.1.0"
