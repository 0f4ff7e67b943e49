"""Generators keyed by what they are for: the same key gives the same draws on any rank, in any order, after any resume."""

from __future__ import annotations

import hashlib

import torch


def key_seed(*key: object) -> int:
    """Returns a 63-bit seed from (seed, purpose, step, ...); keys that differ anywhere give unrelated seeds."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def keyed_generator(*key: object) -> torch.Generator:
    """Returns a CPU generator seeded by :func:`key_seed`."""
    return torch.Generator().manual_seed(key_seed(*key))
