"""The file that OpenRLHF's `--train.agent_func_path` names, which carries the whole configuration of gymlink.

OpenRLHF runs it by its path in each of its rollout actors. Those may be on any node of a Ray cluster that was there
before the job, so neither the folder nor the environment of the launch command is known to them: what the file says is
absolute.
"""

from __future__ import annotations

from pathlib import Path

from gymlink.config import load_settings
from gymlink_openrlhf.options import one_branch

AGENT_FILE = "agent.py"
"""In the run's folder."""
TEXT = '''\
"""Rollouts from NeMo Gym for OpenRLHF: name this file as --train.agent_func_path. Written by gymlink."""

from gymlink_openrlhf import executor_for

AgentExecutor = executor_for(gym_config={gym_config!r}, run_dir={run_dir!r})
'''


def write_agent(gym_config: Path, run_dir: Path) -> Path:
    """Check `gym_config`, and write the file into `run_dir`, which is made; the file's absolute path.

    Raises:
        ConfigError: `gym_config` cannot be read or cannot work with OpenRLHF. Nothing was written.
    """
    one_branch(load_settings(gym_config))
    run_dir = run_dir.expanduser().absolute()
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / AGENT_FILE
    text = TEXT.format(gym_config=str(gym_config.expanduser().absolute()), run_dir=str(run_dir))
    path.write_text(text, encoding="utf-8")
    return path
