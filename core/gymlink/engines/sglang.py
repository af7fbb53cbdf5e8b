"""`SglangEngine`: an SGLang server over HTTP, token in and token out (`/generate` with `input_ids`).

Written against SGLang 0.5.23. Its `ignore_eos` switches off stop ids too, so it is set only when there are none: with
some, the model's own end-of-sequence tokens end a turn beside them. Logprobs are those of the distribution that was
sampled from, at its temperature, unless the server was started with SGLANG_RETURN_ORIGINAL_LOGPROB.
"""

from __future__ import annotations

from typing import Any, ClassVar

from gymlink.engines.connection import PROBE_TIMEOUT_S, AnsweredError
from gymlink.engines.remote import RemoteEngine, Sampled, version_of
from gymlink.errors import EngineError
from gymlink.types import Sampling, TokenIds

OFF = -1
"""SGLang's `top_k` that keeps every token."""
UPDATE_TIMEOUT_S = 3600.0
"""For loading weights, which may come from a slow disk."""


class SglangEngine(RemoteEngine):
    """An `Engine` on an SGLang server; see `RemoteEngine` for the other arguments.

    Args:
        routed_experts: ask for them; the server must have been started with `--enable-return-routed-experts`. They come
            back as SGLang writes them: base64 of int32, one row for each token but the last.

    The weight version is SGLang's own: every answer tells it, and one that spans an update tells both.
    """

    name: ClassVar[str] = "SGLang"

    def __init__(self, url: str, *, routed_experts: bool = False, **connection: Any) -> None:
        super().__init__(url, **connection)
        self._routed_experts = routed_experts

    async def probe(self) -> int:
        model = await self._reach()
        info = await self._server.ask("GET", "/server_info", timeout_s=PROBE_TIMEOUT_S)
        # A prompt must be shorter than this, and SGLang keeps a few tokens of its context for itself.
        longest = info.get("max_req_input_len") if isinstance(info, dict) else None
        return self._met(longest, version_of(isinstance(model, dict) and model.get("weight_version")))

    async def _reach(self) -> Any:
        # Not /health: it generates, so it says nothing good of a server that is paused for an update.
        return await self._server.ask("GET", "/model_info", timeout_s=PROBE_TIMEOUT_S)

    async def _tell(self, version: int) -> None:
        told = {"new_version": str(version), "abort_all_requests": False}
        await self._server.ask_if_known("POST", "/update_weight_version", told)

    async def _load(self, path: str, version: int) -> None:
        """What is in flight is put back meanwhile, and then goes on from its ids, computed anew with the new weights.

        SGLang goes back to the old weights when a folder cannot be loaded.
        """
        await self._control("/pause_generation", {"mode": "retract"})
        try:
            await self._control("/update_weights_from_disk", {"model_path": path, "weight_version": str(version)})
            self.set_weight_version(version)
        finally:
            await self._control("/continue_generation", {})

    async def _sample(self, prompt: TokenIds, limit: int, sampling: Sampling, stops: list[int]) -> Sampled:
        body: dict[str, Any] = {
            "input_ids": prompt,
            "sampling_params": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k or OFF,
                "min_p": sampling.min_p,
                "repetition_penalty": 1.0,
                "max_new_tokens": limit,
                "stop_token_ids": stops,
                "ignore_eos": not stops,
            },
            "return_logprob": True,  # of the sampled tokens alone
            "return_prompt_token_ids": True,
        }
        if self._routed_experts:
            body["return_routed_experts"] = True
        return self._read(prompt, await self._server.ask("POST", "/generate", body))

    def _read(self, prompt: TokenIds, answer: Any) -> Sampled:
        meta = answer.get("meta_info") if isinstance(answer, dict) else None
        if not isinstance(meta, dict):
            raise EngineError(f"{self} answered without meta_info, so without a completion.")
        self._same_prompt(prompt, answer.get("prompt_token_ids"), meta.get("prompt_tokens"))
        triples = meta.get("output_token_logprobs")  # (logprob, id, text or null)
        logprobs = None if triples is None else [triple[0] for triple in triples]
        token_ids = answer.get("output_ids")
        if triples is not None and token_ids is not None and token_ids != [triple[1] for triple in triples]:
            raise EngineError(f"{self} gave logprobs of other ids than those that it says it sampled.")
        return Sampled(
            token_ids,
            logprobs,
            (meta.get("finish_reason") or {}).get("type"),
            meta.get("routed_experts"),
            self._versions(meta),
        )

    def _versions(self, meta: dict[str, Any]) -> tuple[int, int] | None:
        """Those of the first and the last weights; None where nobody has told the server any ("default")."""
        spans = meta.get("weight_versions") or [{"version": meta.get("weight_version")}]
        told = [str(span.get("version")) for span in spans]
        return (version_of(told[0]), version_of(told[-1])) if told[-1].isdecimal() else None

    async def _control(self, path: str, body: dict[str, Any]) -> None:
        try:
            await self._server.ask("POST", path, body, timeout_s=UPDATE_TIMEOUT_S)
        except AnsweredError as error:
            raise EngineError(f"{error} The weights are those of before.") from error
