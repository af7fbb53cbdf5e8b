"""From chat messages to sampled tokens and back: the gateway without HTTP.

It alone turns messages into ids and ids into messages, and it holds the truth of what was sampled, by rollout.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

from gymlink.align import ChatFormat, PromptPlan, RolloutRecord
from gymlink.engines import Engine
from gymlink.errors import AlignmentError, ContextOverflowError, EngineError
from gymlink.gateway.rollouts import OpenRollout, OpenRollouts, RolloutClosedError
from gymlink.gateway.unclaimed import Unclaimed
from gymlink.gateway.wire import ChatRequest, TokenizeRequest, WireError, assistant_message, chat_completion
from gymlink.types import Generation, Sampling, TokenIds, Turn

Connected = Callable[[], Awaitable[bool]]


@dataclass
class Totals:
    """Counted at the engine, over all rollouts: the other side of the conservation law."""

    requests: int = 0
    sampled_tokens: int = 0
    unattributed_calls: int = 0
    """Requests that named no rollout."""
    unattributed_tokens: int = 0
    """Sampled for requests that named no rollout, and claimed by none since."""
    abandoned_tokens: int = 0
    """Sampled for rollouts that had ended by the time the engine was done."""

    @property
    def attributed_tokens(self) -> int:
        """Sampled for rollouts, and theirs to account for."""
        return self.sampled_tokens - self.unattributed_tokens - self.abandoned_tokens


class PolicyService:
    """Answers chat completions for open rollouts. Used from one event loop.

    Args:
        chat_format: how messages and ids correspond for this tokenizer.
        engine: samples.
        sampling: the trainer's, for rollouts that are opened without their own; a request can only lower `max_tokens`.
        reasoning: whether earlier reasoning stays in the prompt ("keep") or leaves with a fork ("drop").
        model: the name under which the policy is listed.
        claims: whether calls that name no rollout are remembered, so that `claim` finds them.
    """

    def __init__(
        self,
        chat_format: ChatFormat,
        engine: Engine,
        sampling: Sampling,
        *,
        reasoning: Literal["keep", "drop"] = "keep",
        model: str = "policy",
        claims: bool = False,
    ) -> None:
        self.chat_format = chat_format
        self.engine = engine
        self.sampling = sampling
        self.reasoning = reasoning
        self.model = model
        self.rollouts = OpenRollouts()
        self.totals = Totals()
        self._unclaimed = Unclaimed() if claims else None

    def open(self, rollout_id: str, *, sampling: Sampling | None = None) -> OpenRollout:
        """From now on, requests that name this rollout are answered, sampled as `sampling` says, and recorded."""
        return self.rollouts.open(rollout_id, self._new(rollout_id, sampling))

    def close(self, rollout_id: str) -> OpenRollout:
        """No request that names this rollout is answered any more; what it sampled is handed over."""
        return self.rollouts.close(rollout_id)

    def claim(self, rollout: OpenRollout, prompt_ids: TokenIds, completion_ids: TokenIds) -> Turn | None:
        """The turn with these ids that a call without a rollout's id sampled; it is this rollout's from now on.

        None when there is none: it was never sampled here, is claimed already, or is forgotten.
        """
        turn = self._unclaimed.claim(prompt_ids, completion_ids) if self._unclaimed is not None else None
        if turn is not None:
            self.totals.unattributed_tokens -= len(completion_ids)
            rollout.sampled_tokens += len(completion_ids)
        return turn

    def _new(self, rollout_id: str, sampling: Sampling | None = None) -> OpenRollout:
        record = RolloutRecord(rollout_id, self.chat_format, reasoning=self.reasoning)
        return OpenRollout(record, sampling or self.sampling)

    def _find(self, rollout_id: str | None) -> OpenRollout | None:
        if rollout_id is None:
            return None
        rollout = self.rollouts.find(rollout_id)
        if rollout is None:
            raise _not_open(rollout_id)
        return rollout

    def tokenize(self, request: TokenizeRequest) -> TokenIds:
        """The prompt that a chat completion with these messages would sample from now."""
        rollout = self._find(request.rollout) or self._new("tokenize")
        return self._plan(rollout.record, request, request.tools or []).prompt_ids

    def _plan(
        self, record: RolloutRecord, request: ChatRequest | TokenizeRequest, tools: list[dict[str, Any]]
    ) -> PromptPlan:
        if tools and not self.chat_format.writes_tools:
            raise WireError(
                400,
                "The request has tools, and this tokenizer's chat template shows none to the policy. Use a model whose "
                "template writes tools, or an environment without them.",
                kind="invalid_request_error",
                param="tools",
            )
        try:
            return record.plan(request.messages, tools, template_args=request.template_args)
        except AlignmentError as error:
            raise WireError(400, str(error), kind="invalid_request_error", param="messages") from error

    async def chat(self, request: ChatRequest, connected: Connected) -> dict[str, Any]:
        """Sample one assistant message; the body of the answer.

        A request without a rollout is answered on its own and not recorded.

        Raises:
            WireError: 400 for messages that cannot be rendered and for a context overflow (with the words that Gym
                looks for), 404 for a rollout that is not open, 500 when the engine fails.
        """
        rollout = self._find(request.rollout) or self._new("unattributed")
        self.totals.requests += 1
        self.totals.unattributed_calls += request.rollout is None
        tools = request.usable_tools
        plan = self._plan(rollout.record, request, tools)
        generation = await self._generate(rollout, request, plan)
        heard = await connected()
        # From here to the new turn nothing is awaited: the counts of a rollout agree whenever another task looks.
        self._count(generation, rollout, request)
        if rollout.closed:
            raise _not_open(request.rollout)
        if not heard:
            # Nobody read this answer, so no later turn can build on it: a client that tries again samples anew.
            rollout.undelivered["undelivered"] += len(generation.token_ids)
            raise WireError(499, "The client closed the connection before the answer was ready.", kind="disconnected")
        parsed = self.chat_format.parse(
            plan.prompt_ids, generation.token_ids, tools, template_args=request.template_args
        )
        message = assistant_message(parsed, turn_key=uuid.uuid4().hex[:12])
        turn = rollout.record.add(plan, generation, message)
        if request.rollout is None and self._unclaimed is not None:
            self._unclaimed.add(turn)
        return chat_completion(request, turn, message, model=self.model)

    async def _generate(self, rollout: OpenRollout, request: ChatRequest, plan: PromptPlan) -> Generation:
        generating = self.engine.generate(
            plan.prompt_ids,
            _limited(rollout.sampling, request.token_limit),
            stop_token_ids=self.chat_format.stop_token_ids,
            rollout_id=request.rollout or uuid.uuid4().hex,
        )
        try:
            return await rollout.sample(generating)
        except RolloutClosedError as error:
            raise _not_open(request.rollout) from error
        except ContextOverflowError as error:
            rollout.overflowed = True
            raise WireError(400, str(error), kind="context_length_exceeded", param="messages") from error
        except EngineError as error:
            rollout.engine_error = str(error)
            raise WireError(500, str(error), kind="engine_error") from error

    def _count(self, generation: Generation, rollout: OpenRollout, request: ChatRequest) -> None:
        sampled = len(generation.token_ids)
        self.totals.sampled_tokens += sampled
        if request.rollout is None:
            self.totals.unattributed_tokens += sampled
        elif rollout.closed:
            self.totals.abandoned_tokens += sampled
        else:
            rollout.sampled_tokens += sampled


def _limited(sampling: Sampling, limit: int | None) -> Sampling:
    limits = [one for one in (limit, sampling.max_tokens) if one is not None]
    return dataclasses.replace(sampling, max_tokens=min(limits, default=None))


def _not_open(rollout_id: str | None) -> WireError:
    message = f"The rollout {rollout_id!r} is not open: it has ended, or its deadline has passed."
    return WireError(404, message, kind="not_found_error", param="rollout")
