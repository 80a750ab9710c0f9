"""A Ray cluster as the place where a stage's work is done: joining it, or starting one on this machine."""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from megatron_instruct.errors import ConfigError, MissingPackageError

_SECONDS = 5
"""In which a machine of the cluster takes a connection."""


@contextlib.contextmanager
def ray_cluster(address: str | None) -> Iterator[Any]:
    """Yield the module ray, joined to the cluster at `address`, or by default to RAY_ADDRESS's, else to one of this machine's cores.

    What was joined here is left at the end. Raises MissingPackageError, and ConfigError where no cluster answers.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingPackageError("ray", extra="cluster", purpose="executor=ray") from error
    if ray.is_initialized():
        yield ray
        return
    # Ray 2.60 takes no address for the cluster that was last started on this machine, and tries for minutes where that one was killed
    place = address or os.environ.get("RAY_ADDRESS") or "local"
    # Ray 2.60: leave CUDA_VISIBLE_DEVICES alone where no GPU is claimed
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        _connect(place)
        ray.init(address=place, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"ray_address={place!r}: no Ray cluster answers there ({error}).") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _connect(place: str) -> None:
    """Raise ConnectionError where nothing listens at HOST:PORT, which Ray 2.60 tries for minutes. Other addresses are Ray's to judge."""
    where = urlsplit(place if "://" in place else f"//{place}")
    if where.hostname and where.port:
        try:
            socket.create_connection((where.hostname, where.port), timeout=_SECONDS).close()
        except OSError as error:  # no such host, no route to it, too slow
            raise ConnectionError(error) from error
