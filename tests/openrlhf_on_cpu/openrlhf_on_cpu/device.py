"""Stands in for the GPU that OpenRLHF takes for granted: `torch.cuda`, its device mesh, and flash attention.

OpenRLHF asks `torch.cuda.current_device()` where its tensors belong and calls `set_device`, `synchronize` and
`current_stream` without asking whether there is a GPU; it names the device "cuda" for the mesh of its processes
(utils/deepspeed/deepspeed.py); and it imports flash attention's padding helpers, plain Python that stands beside a CUDA
extension, wherever it imports a model (models/ring_attn_utils.py).
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from openrlhf_on_cpu.imports import after_import


class _CurrentDevice(str):
    """`tensor.to(...)` takes it for "cpu"; within f"cuda:{...}" (NaiveReplayBuffer) it is the number that stands there.

    The replay buffer only holds the device so named, for a method that OpenRLHF never calls.
    """

    __slots__ = ()

    def __format__(self, specification: str) -> str:
        return "0"


def mend_torch(torch: Any) -> None:
    """The calls of `torch.cuda` that fail without a GPU, and the mesh."""
    for name in ("set_device", "synchronize", "current_stream"):
        setattr(torch.cuda, name, lambda *_, **__: None)  # one function each: torch.compile tells calls apart by it
    torch.cuda.current_device = lambda: _CurrentDevice("cpu")
    after_import("torch.distributed.device_mesh", _mend_mesh)


def _mend_mesh(module: Any) -> None:
    make = module.init_device_mesh

    def init_device_mesh(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return make("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    module.init_device_mesh = init_device_mesh


def hide_flash_attention() -> None:
    """An empty CUDA extension, so that the Python around it can be imported; nothing here calls into it."""
    extension = ModuleType("flash_attn_2_cuda")
    extension.__spec__ = ModuleSpec(extension.__name__, loader=None)
    sys.modules.setdefault(extension.__name__, extension)
    # Without its fused loss OpenRLHF computes log-probabilities with plain torch (models/utils.py).
    sys.modules.setdefault("flash_attn.ops.triton.cross_entropy", None)  # type: ignore[arg-type]
