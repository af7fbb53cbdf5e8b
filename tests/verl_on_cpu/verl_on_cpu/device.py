"""The platform "cpu": verl's view of a machine without an accelerator.

Ray's GPUs are logical here (`ray.init(num_gpus=N)`): verl's placement asks for them, nothing is behind them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

NAME = "cpu"


def _nothing(*_: Any, **__: Any) -> None:
    """For whatever has no meaning without a device."""


def _device_module() -> ModuleType:
    """The stand-in for `torch.cuda`: the calls that verl makes, each with the answer of a machine without a GPU."""
    module = ModuleType("verl_on_cpu_device")
    calls: dict[str, Any] = dict.fromkeys(("empty_cache", "ipc_collect", "synchronize", "set_device"), _nothing)
    calls |= dict.fromkeys(("manual_seed", "manual_seed_all"), torch.manual_seed)
    calls["reset_peak_memory_stats"] = _nothing
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        calls[name] = lambda *_, **__: 0
    calls |= {
        "mem_get_info": lambda *_, **__: (0, 0),
        "is_available": lambda: False,  # verl then skips its reports of device memory
        "device_count": lambda: 1,
        "current_device": lambda: torch.device(NAME),
        "get_device_name": lambda *_, **__: NAME,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
    }
    for name, call in calls.items():
        setattr(module, name, call)
    return module


@PlatformRegistry.register(platform=NAME)
class CpuPlatform(PlatformBase):
    """One device, "cpu", that talks gloo."""

    _module = _device_module()

    @property
    def device_name(self) -> str:
        return NAME

    @property
    def vendor_name(self) -> str:
        return NAME

    @property
    def device_module(self) -> ModuleType:
        return self._module

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return torch.device(NAME)

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        """There is one."""

    def synchronize(self, device_index: int | None = None) -> None:
        """Nothing runs behind the program's back."""

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """Settings of CUDA's allocator."""

    def empty_cache(self) -> None:
        """CUDA's cache."""

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        """Gloo; in a training worker the process group and the engines are ready when this returns.

        verl 0.9.1 composes "cpu:gloo,<device>:<this>" right before it initialises a group, and leaves a group alone
        that is there (`initialize_global_process_group_ray`). With "cpu" as the device torch refuses that string, so
        the group is made here. It is also the one call that every training worker, the critic's included, makes before
        it asks for an engine: `model.external_lib` is not imported in the critic's process, which is handed a pickled
        HFModelConfig.
        """
        from verl_on_cpu import workers

        workers.prepare()
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        """No profiler."""

    def profiler_stop(self) -> None:
        """No profiler."""

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None
