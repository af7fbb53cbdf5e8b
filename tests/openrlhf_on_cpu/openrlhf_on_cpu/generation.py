"""vLLM's engine on a CPU, with weights that follow the trainer's.

OpenRLHF sends each weight through NCCL into a buffer on a GPU, and copies it over the one that is there. Here it goes
through the store at which both ends have met anyway. And vLLM on a CPU must keep its weights as they are: it otherwise
packs them into a form of its own when it has loaded them, and drops the originals, so that none could follow.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class StoreCommunicator:
    """The one call that OpenRLHF makes of vLLM's PyNcclCommunicator, over the group's own store."""

    def __init__(self, group: Any, device: Any) -> None:
        self._group = group

    def broadcast(self, tensor: torch.Tensor, src: int, stream: None = None) -> None:
        """Fill `tensor` with that of the rank `src`."""
        if self._group.rank == src:
            self._group.broadcast_obj(tensor.detach(), src)
        else:
            tensor.copy_(self._group.broadcast_obj(None, src))


def mend_nccl(pynccl: Any) -> None:
    """OpenRLHF looks the communicator up when it makes one (utils/distributed_util.py)."""
    pynccl.PyNcclCommunicator = StoreCommunicator


def mend_layers(utils: Any) -> None:
    """A layer multiplies with the weight that it has at that moment."""

    def keep_weight(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = keep_weight


class _OnCpu(TorchFunctionMode):
    """What is made on "cuda" is made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def mend_worker(module: Any) -> None:
    """The buffer for a weight that comes in (trainer/ray/vllm_worker_wrap.py)."""
    update_weight = module.WorkerWrap.update_weight

    @functools.wraps(update_weight)
    def update_weight_on_cpu(*args: Any, **kwargs: Any) -> Any:
        with _OnCpu():
            return update_weight(*args, **kwargs)

    module.WorkerWrap.update_weight = update_weight_on_cpu
