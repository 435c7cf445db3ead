"""How jax is started here: whatever its environment variables say, or with the cause named."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax

from artifactnet_jax.backends import BackendError
from artifactnet_jax.text import brief


def first_device() -> Any:
    """The device that jax finds first.

    Raises:
        BackendError: there is none, as where JAX_PLATFORMS names a platform of another machine.
    """
    try:
        return jax.devices()[0]
    except Exception as error:
        said = os.environ.get("JAX_PLATFORMS") or os.environ.get("JAX_PLATFORM_NAME")
        cure = "see artifactnet-jax doctor, or use --backend numpy"
        if said:
            cure = f"JAX_PLATFORMS is {said!r}: unset it, or set it to cpu"
        raise BackendError(f"jax finds no device ({brief(error)}): {cure}") from error


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """Context of this thread in which JAX_DISABLE_JIT and JAX_TRANSFER_GUARD do not hold.

    They are for the debugging of other programs; here all is compiled ahead of time.
    """
    with jax.disable_jit(False), jax.transfer_guard("allow"):
        yield
