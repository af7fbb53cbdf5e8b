"""A server that keeps SGLang 0.5.23's HTTP contract as its source states it, with ids at random for a policy.

No SGLang runs on the machines of these tests. Its published kernels are built for CUDA (`sglang-kernel` 0.4.10), and
since 0.5.23 it imports them on a CPU too:

    $ python -m sglang.launch_server --model-path tiny --device cpu --attention-backend torch_native \\
          --sampling-backend pytorch --grammar-backend none --dtype float32
    ...
    [sgl_kernel] CRITICAL: Could not load any common_ops library!
    - Compute capability: None
    - Expected variant: CPU/No GPU detected (using precise math)
    - ImportError: libcuda.so.1: cannot open shared object file: No such file or directory
    - ModuleNotFoundError: No module named 'common_ops'

and without that package: `sglang/kernels/ops/kvcache/cache_move.py`, "No module named 'sgl_kernel'". What is written
down here comes from these files of its wheel:

    sglang/srt/managers/io_struct.py              GenerateReqInput, the fields of a request
    sglang/api/v1/api_types.py                    SamplingParams, which rejects unknown keys
    sglang/srt/sampling/sampling_params.py        what is checked of them, and top_k -1
    sglang/srt/managers/tokenizer_manager.py      meta_info, its logprobs, prompt_token_ids; refusals; pausing
    sglang/srt/managers/schedule_batch.py         what ends a generation, and that ignore_eos ignores stop ids too
    sglang/srt/managers/utils.py, tp_worker.py    how long a prompt may be
    sglang/srt/utils/weight_versions.py           weight_versions
    sglang/srt/entrypoints/http_server.py         the paths, and the form of errors
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

from aiohttp import web

_REQUEST_FIELDS = """
rid session_id text input_ids input_embeds image_data video_data audio_data mm_hashes mm_content_hashes
use_audio_in_video video_config sampling_params watermark return_logprob logprob_start_len top_logprobs_num
token_ids_logprob return_sampling_mask sampling_logprobs_mode return_text_in_logprobs
return_flat_raw_top_logprobs return_flat_raw_output_top_logprobs return_flat_raw_top_logprobs_b64 stream
log_metrics return_hidden_states return_routed_experts routed_experts_start_len return_indexer_topk modalities
session_params lora_path lora_id custom_logit_processor positional_embed_overrides bootstrap_host bootstrap_port
bootstrap_room bootstrap_pair_key decode_tp_size routed_dp_rank data_parallel_rank disagg_prefill_dp_rank
routing_key conversation_id http_worker_ipc background require_reasoning max_thinking_tokens priority extra_key
cache_salt kv_hints no_logs custom_labels return_bytes return_entropy return_prompt_token_ids
external_trace_header received_time need_wait_for_mm_inputs num_items_assigned encoder_urls max_dynamic_patch
min_dynamic_patch image_max_dynamic_patch video_max_dynamic_patch images_config mm_processor_kwargs
multi_item_delimiter_indices token_indices_to_pool
"""
REQUEST_FIELDS = frozenset(_REQUEST_FIELDS.split())
_SAMPLING_FIELDS = """
max_new_tokens stop stop_token_ids stop_regex temperature top_p top_k min_p frequency_penalty presence_penalty
repetition_penalty min_new_tokens n json_schema regex ebnf structural_tag ignore_eos skip_special_tokens
spaces_between_special_tokens no_stop_trim stream_interval logit_bias sampling_seed custom_params beam_width
watermark choice
"""
SAMPLING_FIELDS = frozenset(_SAMPLING_FIELDS.split())
EOS = 2


class RefusedError(ValueError):
    """What SGLang answers with 400."""


class SglangContract:
    """The server. `asked` keeps the bodies of /generate; `steps_s` is how long it takes for a token."""

    def __init__(self, *, context: int = 128, vocabulary: int = 64, weights: str = "default") -> None:
        self.context = context
        self.vocabulary = vocabulary
        self.version = weights
        self.steps_s = 0.0
        self.asked: list[dict[str, Any]] = []
        self.controlled: list[tuple[str, Any]] = []
        self.running_now = 0
        self.folders = {"/models/new"}
        self._random = random.Random(0)
        self._go = asyncio.Event()
        self._go.set()

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes(
            [
                web.get("/model_info", self.model_info),
                web.get("/server_info", self.server_info),
                web.post("/generate", self.generate),
                web.post("/pause_generation", self.pause),
                web.post("/continue_generation", self.go_on),
                web.post("/update_weights_from_disk", self.update),
                web.post("/update_weight_version", self.name_version),
            ]
        )
        return app

    async def model_info(self, _: web.Request) -> web.Response:
        return web.json_response({"model_path": "tiny", "is_generation": True, "weight_version": self.version})

    async def server_info(self, _: web.Request) -> web.Response:
        return web.json_response(
            {"max_req_input_len": self._longest, "max_total_num_tokens": 4096, "version": "0.5.23"}
        )

    @property
    def _longest(self) -> int:
        """`max_req_input_len`: the context less one, and five less than that. A prompt must be shorter."""
        return self.context - 1 - 5

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked.append(body)
        try:
            self._check(body)
        except RefusedError as error:
            return web.json_response({"error": {"message": str(error)}}, status=400)
        await self._go.wait()  # SGLang's tokenizer manager holds back what comes during a pause
        self.running_now += 1
        try:
            return web.json_response(await self._sample(body))
        finally:
            self.running_now -= 1

    def _check(self, body: dict[str, Any]) -> None:
        if unknown := body.keys() - REQUEST_FIELDS:
            raise RefusedError(f"no field of GenerateReqInput: {sorted(unknown)}")  # which SGLang only ignores
        params = body["sampling_params"]
        if unknown := params.keys() - SAMPLING_FIELDS:
            raise RefusedError(f"unknown field `{min(unknown)}`")
        ids = body["input_ids"]
        if not ids or any(type(one) is not int for one in ids):
            raise RefusedError("input_ids must be integers")
        if any(not 0 <= one < self.vocabulary for one in ids):
            raise RefusedError(f"The input_ids {ids} contains values greater than the vocab size ({self.vocabulary}).")
        if not params["temperature"] >= 0.0:
            raise RefusedError(f"temperature must be a non-negative finite number, got {params['temperature']}.")
        if params["top_k"] < 1 and params["top_k"] != -1:
            raise RefusedError(f"top_k must be -1 (disable) or at least 1, got {params['top_k']}.")
        if len(ids) >= self.context:
            raise RefusedError(
                f"The input ({len(ids)} tokens) is longer than the model's context length ({self.context} tokens)."
            )
        if len(ids) >= self._longest:
            raise RefusedError(
                f"Input length ({len(ids)} tokens) exceeds the maximum allowed length ({self._longest} tokens). "
                "Use a shorter input or enable --allow-auto-truncate."
            )

    async def _sample(self, body: dict[str, Any]) -> dict[str, Any]:
        params, prompt = body["sampling_params"], body["input_ids"]
        stops = {EOS, *params["stop_token_ids"]}
        limit = min(params["max_new_tokens"], self.context - 1 - len(prompt) - 1)
        ids: list[int] = []
        spans: list[dict[str, Any]] = []
        finish: dict[str, Any] = {"type": "length", "length": params["max_new_tokens"]}
        while len(ids) < limit:
            await asyncio.sleep(self.steps_s)
            await self._go.wait()
            ids.append(self._random.randrange(self.vocabulary))
            if spans and spans[-1]["version"] == self.version:
                spans[-1]["end"] = len(ids)
            else:
                spans.append({"version": self.version, "start": len(ids) - 1, "end": len(ids)})
            if not params["ignore_eos"] and ids[-1] in stops:
                finish = {"type": "stop", "matched": ids[-1]}
                break
        meta: dict[str, Any] = {
            "id": "c3e0d5a1",
            "finish_reason": finish,
            "prompt_tokens": len(prompt),
            "weight_version": self.version,
            "num_retractions": 0,
            "reasoning_tokens": 0,
            "completion_tokens": len(ids),
            "cached_tokens": 0,
        }
        if body.get("return_logprob"):
            meta["input_token_logprobs"] = []
            meta["output_token_logprobs"] = [[logprob_of(token), token, None] for token in ids]
            meta["output_token_logprobs_length"] = len(ids)
        if len(spans) > 1:
            meta |= {"weight_versions": spans, "weight_version": spans[-1]["version"]}
        if body.get("return_routed_experts"):
            meta["routed_experts"] = "AAAAAAEAAAA="
        answer = {"text": "", "output_ids": ids, "meta_info": meta}
        if body.get("return_prompt_token_ids"):
            answer["prompt_token_ids"] = prompt
        return answer

    async def pause(self, request: web.Request) -> web.Response:
        self._go.clear()
        return await self._done(request, {"message": "Generation paused successfully.", "status": "ok"})

    async def go_on(self, request: web.Request) -> web.Response:
        self._go.set()
        return await self._done(request, {"message": "Generation continued successfully.", "status": "ok"})

    async def update(self, request: web.Request) -> web.Response:
        body = await request.json()
        found = body["model_path"] in self.folders
        if found:
            self.version = body.get("weight_version", self.version)
        message = "Succeeded to update model weights." if found else "Failed to update weights: no such folder."
        done = {"success": found, "message": message, "num_paused_requests": 0}
        return await self._done(request, done, 200 if found else 400)

    async def name_version(self, request: web.Request) -> web.Response:
        self.version = (await request.json())["new_version"]
        return await self._done(request, {"success": True, "new_version": self.version})

    async def _done(self, request: web.Request, answer: dict[str, Any], status: int = 200) -> web.Response:
        self.controlled.append((request.path, await request.json()))
        return web.json_response(answer, status=status)


def logprob_of(token: int) -> float:
    return -(token + 1) / 8
