"""From chat messages to sampled tokens and back: the gateway without HTTP.

It alone turns messages into ids and ids into messages, and it holds the truth of what was sampled, by rollout.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from gymlink.align import ChatFormat, PendingPlan, PromptPlan, RolloutRecord
from gymlink.engines import Engine
from gymlink.errors import AlignmentError, ContextOverflowError, EngineError
from gymlink.gateway.call import Answer, Call, Thread, assistant_message, new_key
from gymlink.gateway.pause import Gate
from gymlink.gateway.recognise import not_open
from gymlink.gateway.rollouts import OpenRollout, OpenRollouts, RolloutClosedError
from gymlink.gateway.strangers import Strangers
from gymlink.gateway.unclaimed import Unclaimed
from gymlink.gateway.wire import OVERFLOW, WireError, hung_up, invalid
from gymlink.types import CallIds, DropReason, Generation, Sampling, TokenIds, Turn

POLICY = "policy"
"""The name under which the policy is listed, when no other is given."""

HOLD_S = 30.0

LONG_TEXT = 16_384
"""Characters above which a text is rendered and encoded in a thread: some 10 ms of a tokenizer's time."""

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
    """Answers calls of the policy. Used from one event loop.

    Args:
        chat_format: how messages and ids correspond for this tokenizer.
        engine: samples.
        sampling: the trainer's, for rollouts that are opened without their own; a request can only lower `max_tokens`.
        reasoning: whether earlier reasoning stays in the prompt ("keep") or leaves with a fork ("drop").
        model: the name under which the policy is listed.
        claims: whether what is sampled for calls that name no rollout can be claimed.
        hold_s: how long a call waits while the policy is paused, before it is answered 429.
    """

    def __init__(
        self,
        chat_format: ChatFormat,
        engine: Engine,
        sampling: Sampling,
        *,
        reasoning: Literal["keep", "drop"] = "keep",
        model: str = POLICY,
        claims: bool = False,
        hold_s: float = HOLD_S,
    ) -> None:
        self.chat_format = chat_format
        self.engine = engine
        self.sampling = sampling
        self.reasoning = reasoning
        self.model = model
        self.rollouts = OpenRollouts()
        self.totals = Totals()
        self._strangers = Strangers(lambda name: self._new(name, stranger=True))
        self._unclaimed = Unclaimed() if claims else None
        self._gate = Gate(hold_s)

    def open(self, rollout_id: str, *, sampling: Sampling | None = None) -> OpenRollout:
        """From now on, requests that name this rollout are answered, sampled as `sampling` says, and recorded."""
        return self.rollouts.open(rollout_id, self._new(rollout_id, sampling))

    def close(self, rollout_id: str) -> OpenRollout:
        """No request that names this rollout is answered any more; what it sampled is handed over."""
        return self.rollouts.close(rollout_id)

    def claim(self, rollout: OpenRollout, ids: CallIds) -> Turn | None:
        """The turn with these ids that a call without a rollout's id sampled; it is this rollout's from now on.

        It holds no prompt: what it extends is the claimant's to tell. None when there is none: it was never sampled
        here, is claimed already, or is forgotten.
        """
        turn = self._unclaimed.claim(ids) if self._unclaimed is not None else None
        if turn is not None:
            self.totals.unattributed_tokens -= len(turn.completion_ids)
            rollout.sampled_tokens += len(turn.completion_ids)
        return turn

    @property
    def encoder_differences(self) -> int:
        """Texts that a faster encoder than the tokenizer's own wrote otherwise; after one it is not used."""
        encoder = getattr(self.chat_format, "encoder", None)
        return 0 if encoder is None else int(encoder.differences)

    @property
    def paused(self) -> bool:
        """Whether no generation may begin."""
        return self._gate.closed

    @property
    def in_flight(self) -> int:
        """Generations that have begun and not ended."""
        return self._gate.inside

    def pause(self) -> None:
        """Let no generation begin: calls are held, for `hold_s` at most. Those in flight end normally."""
        self._gate.close()

    async def drain(self, timeout_s: float) -> int:
        """Wait until no generation is in flight; how many are, when `timeout_s` has passed."""
        return await self._gate.drain(timeout_s)

    def resume(self, weight_version: int | None = None) -> None:
        """Let generations begin again. An engine that counts versions by what it is told gets the new one."""
        if weight_version is not None and (tell := getattr(self.engine, "set_weight_version", None)) is not None:
            tell(weight_version)
        self._gate.open()

    def _new(self, rollout_id: str, sampling: Sampling | None = None, *, stranger: bool = False) -> OpenRollout:
        record = RolloutRecord(rollout_id, self.chat_format, reasoning=self.reasoning)
        return OpenRollout(record, sampling or self.sampling, stranger=stranger)

    def threads(self, rollout_id: str | None) -> Mapping[str, Thread]:
        """The answers of a rollout that a call may go on from, by key; none without a rollout.

        Raises:
            WireError: 404 for a rollout that is not open.
        """
        return {} if rollout_id is None else self._find(rollout_id).threads

    def _find(self, rollout_id: str) -> OpenRollout:
        rollout = self.rollouts.find(rollout_id)
        if rollout is None:
            raise not_open(rollout_id)
        return rollout

    def _owner(self, call: Call, rollout_id: str | None) -> OpenRollout:
        return self._strangers.find(call.messages) if rollout_id is None else self._find(rollout_id)

    async def prompt_ids(self, call: Call, rollout_id: str | None) -> TokenIds:
        """The prompt that this call would sample from now. Raises `WireError` as `ask`."""
        return (await self._plan(self._owner(call, rollout_id).record, call)).prompt_ids

    async def ask(self, call: Call, rollout_id: str | None, connected: Connected) -> Answer:
        """Sample one assistant message. Without a rollout it is remembered for its conversation, and trained by nobody.

        Raises:
            WireError: 400 for a call that cannot be answered, and for a context overflow (with the words that Gym
                looks for), 404 for a rollout that is not open, 429 when the policy stays paused, 500 when the engine
                fails.
        """
        rollout = self._owner(call, rollout_id)
        self.totals.requests += 1
        self.totals.unattributed_calls += rollout.stranger
        plan = await self._plan(rollout.record, call)
        if rollout.closed:
            raise not_open(rollout_id)
        if call.thread is None:
            call = dataclasses.replace(call, messages=())  # what the engine takes long for keeps no request in memory
        generation = await self._generate(rollout, call, plan, connected)
        heard = await connected()
        # From here to the new turn nothing is awaited: the counts of a rollout agree whenever another task looks.
        self._count(generation, rollout)
        if rollout.closed:
            raise not_open(rollout_id)
        if not heard:
            # Nobody read this answer, so no later turn can build on it: a client that tries again samples anew.
            rollout.undelivered[DropReason.UNDELIVERED] += len(generation.token_ids)
            raise hung_up()
        return self._answer(rollout, call, plan, generation)

    async def _plan(self, record: RolloutRecord, call: Call) -> PromptPlan:
        if call.tools and not self.chat_format.writes_tools:
            raise invalid(
                "The request has tools, and this tokenizer's chat template shows none to the policy. Use a model whose "
                "template writes tools, or an environment without them.",
                "tools",
            )
        try:
            plan: PromptPlan | PendingPlan = record.begin(
                call.messages,
                call.tools,
                template_args=call.template_args,
                required_prefix=call.required_prefix,
                check=call.check,
            )
            while isinstance(plan, PendingPlan):
                is_long = plan.characters > LONG_TEXT  # other calls are answered meanwhile
                plan = await asyncio.to_thread(record.write, plan) if is_long else record.write(plan)
        except AlignmentError as error:
            raise invalid(str(error), "messages") from error
        except RecursionError as error:
            raise invalid("The request is nested too deeply to be rendered.", "messages") from error
        _check_prefix(plan.prompt_ids, call.required_prefix)
        return plan

    async def _generate(self, rollout: OpenRollout, call: Call, plan: PromptPlan, connected: Connected) -> Generation:
        try:
            return await rollout.sample(self._sampled(rollout, call, plan, connected))
        except RolloutClosedError as error:
            raise not_open(rollout.record.rollout_id) from error
        except ContextOverflowError as error:
            rollout.overflowed = True
            raise WireError(400, str(error), kind=OVERFLOW, param="messages") from error
        except EngineError as error:
            rollout.engine_error = str(error)
            raise WireError(500, str(error), kind="engine_error") from error

    async def _sampled(self, rollout: OpenRollout, call: Call, plan: PromptPlan, connected: Connected) -> Generation:
        """What the engine samples, once the gate is open."""
        held = await self._gate.enter()
        started = time.perf_counter()
        try:
            if held and not await connected():
                raise hung_up()
            return await self.engine.generate(
                plan.prompt_ids,
                _limited(rollout.sampling, call.token_limit),
                stop_token_ids=self.chat_format.stop_token_ids,
                rollout_id=rollout.record.rollout_id,
            )
        finally:
            self._gate.leave()
            rollout.seconds_in_model += time.perf_counter() - started

    def _answer(self, rollout: OpenRollout, call: Call, plan: PromptPlan, generation: Generation) -> Answer:
        key = new_key()
        parsed = self.chat_format.parse(
            plan.prompt_ids, generation.token_ids, call.tools, template_args=call.template_args
        )
        message = assistant_message(parsed, key)
        turn = rollout.record.add(plan, generation, message)
        if rollout.stranger:
            self._strangers.grew(rollout, turn)
            if self._unclaimed is not None:
                self._unclaimed.add(turn)
        else:
            rollout.remember(key, call, plan, turn, message)
        return Answer.of(turn, parsed, message, key=key, model=self.model)

    def _count(self, generation: Generation, rollout: OpenRollout) -> None:
        sampled = len(generation.token_ids)
        self.totals.sampled_tokens += sampled
        if rollout.stranger:
            self.totals.unattributed_tokens += sampled
        elif rollout.closed:
            self.totals.abandoned_tokens += sampled
        else:
            rollout.sampled_tokens += sampled


def _limited(sampling: Sampling, limit: int | None) -> Sampling:
    limits = [one for one in (limit, sampling.max_tokens) if one is not None]
    return dataclasses.replace(sampling, max_tokens=min(limits, default=None))


def _check_prefix(prompt_ids: TokenIds, required: TokenIds | None) -> None:
    """Whoever asks for a prefix builds on it: a prompt that does not start with it is refused, never sampled from."""
    if required is None or prompt_ids.startswith(required):
        return
    pairs = enumerate(zip(required, prompt_ids, strict=False))
    where = next((at for at, (wanted, got) in pairs if wanted != got), min(len(required), len(prompt_ids)))
    got = f"the id {prompt_ids[where]}" if where < len(prompt_ids) else "nothing more"
    raise invalid(
        f"The prompt of these messages does not start with required_prefix_token_ids ({len(required)} ids): at "
        f"position {where} it has {got}, where {required[where]} is required. Send the ids of a turn whose messages "
        "these continue, or none.",
        "required_prefix_token_ids",
    )
