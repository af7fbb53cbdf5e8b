"""What TRL and transformers say on every run, or for every failure, and nobody can act on: kept from the terminal.

Each message is named exactly; everything else that they say is left alone.
"""

from __future__ import annotations

import logging
import os
import warnings

TRL_LOGGER = "trl.trainer.grpo_trainer"
"""The logger to which TRL gives its message about a row without a reward (accelerate's adapter adds no name)."""
NO_REWARD = "All reward functions returned None"


def quiet_trainer() -> None:
    """Silence what this pairing of libraries always says: for a program of gymlink's own, once, at its start."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    # TRL 1.16 calls these by the names that transformers 5.23 calls old.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* deprecated", category=FutureWarning)


class FailuresAreTold(logging.Filter):
    """Drops TRL's message about a row without a reward where a failed rollout is the reason.

    It prints the whole rollout and advises to mend the reward function; `GymRollout` says what failed, and why.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not (NO_REWARD in text and "'gym_status': 'failed'" in text)

    def install(self) -> None:
        logging.getLogger(TRL_LOGGER).addFilter(self)

    def remove(self) -> None:
        logging.getLogger(TRL_LOGGER).removeFilter(self)
