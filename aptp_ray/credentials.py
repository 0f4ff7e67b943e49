"""Secrets in ``storage_options``: used from memory or the environment, never written out.

A value may be a reference, ``env:NAME``: it is read from the environment of each process that opens the store. A secret may
also be given as it is; where the config is written or logged, a reference of a fixed name stands in its place (the secret of
``storage_options.secret`` becomes ``env:APTP_STORAGE_OPTIONS_SECRET``). Who goes on from a written config either sets that
variable or gives the value again (``storage_options.secret=...``); otherwise the first use fails and says so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from aptp_ray.sections import ConfigError

_REFERENCE = "env:"

# Options that say where a store is and how to talk to it, not who is asking. Any other text is taken for a secret: to hide too
# much costs an environment variable, to hide too little costs a key.
_OPEN = frozenset(
    """
    account_host account_name addressing_style anon api_version auto_mkdir block_size bucket cache_type compression consistency
    default_block_size default_cache_type default_location endpoint endpoint_url host location_mode port profile project protocol
    region region_name requester_pays scheme signature_version timeout use_ssl user username version version_aware
    """.split()
)
# gcsfs: words that stand for a way to find a token.
_OPEN_TOKENS = frozenset({"anon", "browser", "cache", "cloud", "google_default"})
_SECRET_NAME = re.compile(r"pass|secret|token|key|cred|auth|sign|sas", re.IGNORECASE)
_PASSWORD_IN_URI = re.compile(r"://[^/@\s]*:[^/@\s]+@")


def masked(options: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Returns options fit to be written: every secret is replaced by a reference.

    Args:
        options: plain values, as YAML gives them.
        path: where they stand in the config, e.g. ``storage_options``; it names the references.
    """
    return {str(key): _mask(value, str(key), f"{path}.{key}") for key, value in options.items()}


def revealed(options: Mapping[str, Any] | None, path: str = "storage_options") -> dict[str, Any]:
    """Returns options fit to be used: every reference is replaced by what the environment holds.

    Args:
        options: those of a config.
        path: where they stand in it, for the message.

    Raises:
        ConfigError: if a variable is not set.
    """
    return {key: _reveal(value, f"{path}.{key}") for key, value in (options or {}).items()}


def has_password(uri: str) -> bool:
    """Tells whether a URI holds a password (``scheme://user:password@host``)."""
    return bool(_PASSWORD_IN_URI.search(uri))


def _mask(value: Any, key: str, path: str) -> Any:
    if isinstance(value, Mapping):
        return masked(value, path)
    if isinstance(value, list | tuple):
        return [_mask(item, key, f"{path}.{index}") for index, item in enumerate(value)]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        is_open = key in _OPEN or not _SECRET_NAME.search(key)
    elif isinstance(value, str):
        is_open = (
            value.startswith(_REFERENCE)
            or (key in _OPEN and not has_password(value))
            or (key == "token" and value in _OPEN_TOKENS)
        )
    else:
        is_open = False
    return value if is_open else f"{_REFERENCE}APTP_{re.sub('[^A-Za-z0-9]+', '_', path).upper()}"


def _reveal(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        return revealed(value, path)
    if isinstance(value, list | tuple):
        return [_reveal(item, f"{path}.{index}") for index, item in enumerate(value)]
    if not (isinstance(value, str) and value.startswith(_REFERENCE)):
        return value
    name = value.removeprefix(_REFERENCE)
    if name not in os.environ:
        raise ConfigError(
            f"{path} is {value!r}, but the environment variable {name} is not set here (secrets are not kept in a run "
            f"directory): set it, or give the value again with {path}=..."
        )
    return os.environ[name]
