"""What gymlink has to know of TRL's own fields before TRL is imported."""

from __future__ import annotations

from typing import Final

OPTIONAL_PATHS: Final = ("model_name_or_path", "resume_from_checkpoint", "deepspeed")
"""Fields that may be a path: relative to the run file's folder when it is there."""
