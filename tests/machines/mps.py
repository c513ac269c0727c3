"""A stand-in for Apple's MPS, which has no float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from switchkd.rollout import law


class NoFloat64(TorchFunctionMode):
    """Refuses float64 on "the device" as MPS does. The CPU plays both parts; a tensor on the host carries a mark.

    On the host is what `cpu()` returns, what is made without a device, and what follows from these alone.
    """

    def __enter__(self) -> NoFloat64:
        self._known, law.WITH_FLOAT64 = law.WITH_FLOAT64, ()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        law.WITH_FLOAT64 = self._known
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        result = func(*args, **kwargs)
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        places = [each for each in (*args[1:], *kwargs.values()) if isinstance(each, torch.device | str)]
        if name in ("cpu", "to") and (name == "cpu" or "cpu" in places):
            result = torch.ops.aten.alias(result)  # on a CPU it is the same object, which the device may still use
            on_host = True
        elif name == "to" and places:
            result, on_host = torch.ops.aten.alias(result), False
        else:
            on_host = all(hasattr(each, "on_host") for each in given) if given else kwargs.get("device") is None
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and on_host:
                each.on_host = True
            elif isinstance(each, Tensor) and each.dtype == torch.float64:
                raise TypeError(f"{name}: this device has no float64")
        return result
