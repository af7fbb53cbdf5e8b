"""DeepSpeed without a compiler and without a port.

DeepSpeed has its own kernels for a CPU, and compiles them on first use: about a minute of a C++ compiler for a
collective over shared memory and for a fused Adam, where gloo and torch's AdamW compute the same. And OpenRLHF's
workers choose the port at which they will meet long before they bind it (trainer/ray/launcher.py): on a machine that
runs everything, some other connection may have taken it by then. So they meet in a file of Ray's session.
"""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path
from typing import Any


def mend_deepspeed(deepspeed: Any) -> None:
    """torch's AdamW and gloo in the place of compiled kernels; the first worker's address names a file."""
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    initialize, init_distributed = deepspeed.initialize, deepspeed.init_distributed

    @functools.wraps(initialize)
    def initialize_with_torch(*args: Any, config: dict[str, Any], **kwargs: Any) -> Any:
        if config.get("optimizer", {}).get("type") == "AdamW":
            config["optimizer"]["params"]["torch_adam"] = True
        return initialize(*args, config=config, **kwargs)

    @functools.wraps(init_distributed)
    def init_in_a_file(*args: Any, **kwargs: Any) -> Any:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        return init_distributed(*args, init_method=_meeting().as_uri(), rank=rank, world_size=world_size, **kwargs)

    deepspeed.initialize, deepspeed.init_distributed = initialize_with_torch, init_in_a_file


def _meeting() -> Path:
    """A file for the workers that know the same address, in the folder that Ray keeps for this run."""
    import ray

    temporary = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    session = temporary / "ray" / ray.get_runtime_context().get_session_name()
    return session / f"workers-{os.environ['MASTER_ADDR']}-{os.environ['MASTER_PORT']}"
