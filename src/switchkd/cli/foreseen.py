"""Exceptions of other packages that are nobody's bug: what is missing, full or forbidden, and what to do about it."""

from __future__ import annotations

import sys
from textwrap import shorten
from typing import Any

_TO_THE_HUB = "check the name and your rights there (hf auth login), or leave push_to_hub out"


def foreseen(error: BaseException) -> str | None:
    """What happened and what to do, in a sentence; None for what should not happen."""
    # What has raised it is imported already, and the command line starts fast because it imports little.
    hub: Any = sys.modules.get("huggingface_hub.errors")
    torch: Any = sys.modules.get("torch")
    said = shorten(str(error), 300, placeholder=" ...") or type(error).__name__
    if (hub and isinstance(error, hub.OfflineModeIsEnabled)) or _is_of_network(error):
        return f"the hub cannot be reached: {said}; check the connection, name local files, or leave push_to_hub out"
    if hub and isinstance(error, (hub.HfHubHTTPError, hub.LocalTokenNotFoundError)):
        return f"the hub refused: {said}; {_TO_THE_HUB}"
    if torch and isinstance(error, torch.OutOfMemoryError):
        return (
            f"the device's memory is full ({said}); lower rollout_rows or per_device_train_batch_size, or set "
            f"activation_checkpointing, teacher_quantization or teacher_offload"
        )
    if isinstance(error, ImportError) and _is_foreign(error):
        return f"a package is missing or does not fit: {said}; install it, or leave out the setting that needs it"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename} cannot be read or written: {error.strerror}; check the path, its rights and the room there"
    return None


def _is_of_network(error: BaseException) -> bool:
    by_client = type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "requests")
    # A broken pipe is a reader that has left, such as head.
    lost = isinstance(error, (ConnectionError, TimeoutError)) and not isinstance(error, BrokenPipeError)
    return lost or (by_client and not hasattr(error, "response"))


def _is_foreign(error: ImportError) -> bool:
    """Whether it is not one of our own modules that lacks something."""
    return not (error.name or "").startswith("switchkd") and (error.name is not None or "install" in str(error))
