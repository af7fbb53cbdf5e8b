"""`VllmEngine`: a stock `vllm serve` over HTTP, token in and token out.

Written against vLLM 0.29. `/inference/v1/generate` is used where the server has it: ids go to the engine as they are,
and nothing is detokenized. Else `/v1/completions` with an id list and `return_token_ids`. Every sampling parameter is
sent, or the server would fill in those of the model's `generation_config.json`; `seed` never is.

Logprobs are of the sampled token alone, and what they mean is the server's choice (`--logprobs-mode`): by default they
are of the model's own distribution, which at temperature 1 with top_p, top_k and min_p off is the one that was sampled
from. With other sampling, start the server with `--logprobs-mode processed_logprobs`.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar, Literal

from gymlink.engines.connection import PROBE_TIMEOUT_S, AnsweredError
from gymlink.engines.remote import RemoteEngine, Sampled, version_of
from gymlink.errors import EngineDownError, EngineError
from gymlink.types import Sampling, TokenIds

Endpoint = Literal["generate", "completions"]

GENERATE = "/inference/v1/generate"
COMPLETIONS = "/v1/completions"
UPDATE_TIMEOUT_S = 3600.0
"""For loading weights, which may come from a slow disk."""
DYING_S = 3.0
"""How long vLLM takes to end after a reload that failed; seen with 0.29: about 2 s."""


class VllmEngine(RemoteEngine):
    """An `Engine` on a `vllm serve`; see `RemoteEngine` for the other arguments.

    Args:
        model: the name under which the server has the policy, an adapter for instance; its first one when not given.
        endpoint: which of the two to use; found out when not given.

    `load_weights` needs the server's control endpoints: start it with `VLLM_SERVER_DEV_MODE=1`. Routed experts come
    back when it was started with `--enable-return-routed-experts`: base64 of a `.npy` file, as vLLM writes it.
    """

    name: ClassVar[str] = "vLLM"

    def __init__(
        self, url: str, *, model: str | None = None, endpoint: Endpoint | None = None, **connection: Any
    ) -> None:
        super().__init__(url, **connection)
        self._model = model
        self._endpoint = endpoint
        self._doubt: str | None = None

    async def probe(self) -> int:
        server = self._server
        await self._reach()
        asleep = await server.ask_if_known("GET", "/is_sleeping")
        if asleep and asleep.get("is_sleeping"):
            raise EngineDownError(f"{self} is asleep: it answers nothing until it is woken (POST /wake_up).")
        context = self._find_model(await server.ask("GET", "/v1/models", timeout_s=PROBE_TIMEOUT_S))
        told = await server.ask_if_known("GET", "/weight_info")
        if self._endpoint is None:
            self._endpoint = await self._find_endpoint()
        return self._met(context, version_of(told and told.get("weight_version")))

    async def _reach(self) -> None:
        await self._server.ask_if_known("GET", "/health")

    async def _tell(self, version: int) -> None:
        await self._server.ask_if_known("POST", "/update_weight_version", {"new_version": str(version)})

    async def _load(self, path: str, version: int) -> None:
        """What is in flight is held back meanwhile, and then goes on from its ids, computed anew with the new weights.

        vLLM 0.29 ends itself when a folder cannot be loaded.
        """
        await self._control("/pause?mode=keep")
        try:
            self._doubt = f"{self} failed to load weights from {path!r}, and may have any: load some, or start it anew."
            await self._control("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}})
            await self._control("/reset_prefix_cache?reset_running_requests=true")
            await self._control("/update_weight_version", {"new_version": str(version)})
            self.set_weight_version(version)
            await self._control("/resume")
        except AnsweredError as error:
            raise await self._unloaded(error) from error

    def set_weight_version(self, version: int) -> None:
        super().set_weight_version(version)
        self._doubt = None

    async def _sample(self, prompt: TokenIds, limit: int, sampling: Sampling, stops: list[int]) -> Sampled:
        self._believe()
        params: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,  # 0 is off here too
            "min_p": sampling.min_p,
            "repetition_penalty": 1.0,
            "max_tokens": limit,
            "stop_token_ids": stops,
            "ignore_eos": True,  # the stop ids say it all
            "logprobs": 0,  # of the sampled token alone
        }
        named = {} if self._model is None else {"model": self._model}
        if self._endpoint == "completions":
            body = {**named, **params, "prompt": prompt, "return_token_ids": True, "return_tokens_as_token_ids": True}
            answer = await self._server.ask("POST", COMPLETIONS, body)
        else:
            body = {**named, "token_ids": prompt, "sampling_params": {**params, "detokenize": False}}
            answer = await self._server.ask("POST", GENERATE, body)
        self._believe()
        return self._read(prompt, answer)

    def _read(self, prompt: TokenIds, answer: Any) -> Sampled:
        choice = self._choice(answer)
        used = choice.get("prompt_token_ids")
        if used is None and self._endpoint == "completions":
            raise EngineError(f"{self} answered without prompt_token_ids: it is too old to know return_token_ids.")
        self._same_prompt(prompt, used, (answer.get("usage") or {}).get("prompt_tokens"))
        told = choice.get("logprobs") or {}
        content = told.get("content")  # one object for each token; completions have one list instead
        logprobs = told.get("token_logprobs") if content is None else [one.get("logprob") for one in content]
        return Sampled(choice.get("token_ids"), logprobs, choice.get("finish_reason"), choice.get("routed_experts"))

    def _choice(self, answer: Any) -> dict[str, Any]:
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise EngineError(f"{self} answered without a choice, so without a completion.")
        return choices[0]

    def _find_model(self, answer: Any) -> int | None:
        """The context length of the model that is asked; an adapter's is that of the model below it."""
        cards = answer.get("data", []) if isinstance(answer, dict) else []
        served = {card.get("id"): card.get("max_model_len") for card in cards}
        if self._model is not None and self._model not in served:
            known = ", ".join(map(repr, served)) or "none"
            raise EngineError(f"{self} serves no model {self._model!r}; it serves: {known}.")
        limits = [limit for limit in (served.get(self._model), *served.values()) if limit is not None]
        return limits[0] if limits else None

    async def _find_endpoint(self) -> Endpoint:
        """A path that takes POST only answers 405 to GET where it exists, and 404 where it does not."""
        try:
            await self._server.ask("GET", GENERATE, timeout_s=PROBE_TIMEOUT_S)
        except AnsweredError as error:
            if error.status == 404:  # noqa: PLR2004
                return "completions"
            if error.status != 405:  # noqa: PLR2004
                raise
        return "generate"

    async def _control(self, path: str, body: Any = None) -> None:
        try:
            answer = await self._server.ask("POST", path, body, timeout_s=UPDATE_TIMEOUT_S)
        except AnsweredError as error:
            if error.status == 404:  # noqa: PLR2004
                raise EngineError(
                    f"{self} has no {path.split('?', maxsplit=1)[0]}: start it with VLLM_SERVER_DEV_MODE=1, or update "
                    "its weights as your trainer does."
                ) from error
            raise
        if isinstance(answer, dict) and answer.get("success") is False:
            raise AnsweredError(f"{self} answered {path} with {answer}", status=200, said=str(answer))

    async def _unloaded(self, error: AnsweredError) -> EngineError:
        """Why an update failed, and whether the server outlived it; what it holds back goes on, and is not believed."""
        await asyncio.sleep(DYING_S)
        try:
            await self._control("/resume")
        except EngineDownError as down:
            return EngineDownError(f"{self._doubt} {error} It has died since: {down}")
        return EngineError(f"{self._doubt} {error}")

    def _believe(self) -> None:
        if self._doubt:
            raise EngineError(self._doubt)
