"""Digests of contents: xxh3-128, as 32 hexadecimal digits."""

import json
from typing import Any

import xxhash

DIGEST_BYTES = 16
DIGEST_LENGTH = 2 * DIGEST_BYTES
Hasher = xxhash.xxh3_128


def digest_bytes(buffer: bytes | bytearray | memoryview) -> str:
    """The digest of a contiguous buffer's bytes."""
    return xxhash.xxh3_128_hexdigest(buffer)


def digest_json(value: Any) -> str:
    """The digest of a JSON value, whatever the order of its keys."""
    return digest_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())
