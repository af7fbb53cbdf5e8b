"""Every error that gymlink raises on purpose, named by the boundary it was met at.

    GymlinkError
    ├── ConfigError              a setting, a file or a row that cannot work; the command line exits with 2
    ├── GymError                 NeMo Gym: its interpreter, its servers, its answers
    │   ├── GymStartError        the servers did not come up
    │   └── GymRequestError      a request to a running server failed
    ├── AlignmentError           messages and token ids cannot be brought together
    ├── EngineError              the policy did not generate
    │   ├── ContextOverflowError the prompt leaves no room for a token
    │   └── EngineDownError      it cannot be reached or has died: another replica may answer
    ├── GatewayError             a gateway in another program did not do what was asked of it
    ├── RolloutError             a batch cannot be used
    └── PluginError              a trainer, or its plugin, cannot be used as asked

A rollout that fails is data (`gymlink.types.Rollout.status`), not an exception: these are for what
stops a run. A message says what happened, with the value, why, and what mends it.
"""

from __future__ import annotations

from typing import Any


class GymlinkError(Exception):
    """Root of the tree: `except GymlinkError` catches all that gymlink raises on purpose.

    Errors travel between processes, whatever their constructors take: they are pickled by message and attributes.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[GymlinkError], args: tuple[Any, ...], attributes: dict[str, Any]) -> GymlinkError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


class ConfigError(GymlinkError):
    """A setting, a file or a row cannot work. Nothing was started or written; exit status 2."""


class GymError(GymlinkError):
    """NeMo Gym did not do what was asked of it."""


class GymStartError(GymError):
    """Gym's servers did not come up. The message ends with the last lines of the failing server's log."""


class GymRequestError(GymError):
    """A request to a Gym server failed.

    Attributes:
        status: HTTP status, or None when no answer came.
        kind: short name under which the failed rollout is counted: "http", "connection", "timeout" or "answer".
    """

    def __init__(self, message: str, *, kind: str, status: int | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status


class AlignmentError(GymlinkError):
    """Messages cannot be rendered to token ids for this tokenizer, or ids cannot be attributed."""


class EngineError(GymlinkError):
    """The policy engine did not generate."""


class ContextOverflowError(EngineError):
    """The prompt leaves no room for even one generated token.

    Attributes:
        prompt_tokens: length of the prompt.
        max_context: tokens that the policy can hold, prompt and completion together.
    """

    def __init__(self, prompt_tokens: int, max_context: int) -> None:
        # Gym recognises an overflow by the words "context length" (responses_api_models/vllm_model/app.py).
        super().__init__(
            f"This model's maximum context length is {max_context} tokens, and the messages are "
            f"{prompt_tokens} tokens: there is no room for a generated token. Shorten the task or raise the limit."
        )
        self.prompt_tokens = prompt_tokens
        self.max_context = max_context


class EngineDownError(EngineError):
    """The engine cannot be reached, has died, or does not answer: the same call may succeed on another replica."""


class GatewayError(GymlinkError):
    """The gateway of a `gymlink serve` cannot be reached, does not know the secret, or failed."""


class RolloutError(GymlinkError):
    """A batch of rollouts cannot be used, for instance because too many of them failed."""


class PluginError(GymlinkError):
    """A trainer or its plugin cannot be used as asked; says what to install or to change."""
