"""An agent that drives its calls by itself: chat completions of its own, of which it hands back the last one's text.

Neither the rollout's id nor any token id is in what it sends and returns. NeMo Gym 0.6 and newer knows its calls by
their path. Three turns, of which the last begins anew; the reward is the share of characters that are letters.
"""

from nemo_gym.base_resources_server import BaseRunRequest, BaseVerifyResponse
from nemo_gym.base_responses_api_agent import BaseResponsesAPIAgentConfig, SimpleResponsesAPIAgent
from nemo_gym.config_types import ModelServerRef
from nemo_gym.openai_utils import NeMoGymResponse, NeMoGymResponseCreateParamsNonStreaming
from nemo_gym.server_utils import get_response_json, raise_for_status
from pydantic import ConfigDict

TURNS = 3


class RunRequest(BaseRunRequest):
    model_config = ConfigDict(extra="allow")


class RunResponse(BaseVerifyResponse):
    model_config = ConfigDict(extra="allow")


class SecretiveConfig(BaseResponsesAPIAgentConfig):
    model_server: ModelServerRef


class SecretiveAgent(SimpleResponsesAPIAgent):
    config: SecretiveConfig

    async def responses(self, body: NeMoGymResponseCreateParamsNonStreaming) -> NeMoGymResponse:
        raise NotImplementedError

    async def _ask(self, path: str, messages: list[dict]) -> str:
        answer = await self.server_client.post(
            server_name=self.config.model_server.name, url_path=path, json={"messages": messages}
        )
        await raise_for_status(answer)
        return (await get_response_json(answer))["choices"][0]["message"]["content"]

    async def run(self, body: RunRequest) -> RunResponse:
        path = self.url_path_for_run("/v1/chat/completions", body)
        task = {"role": "user", "content": body.responses_create_params.input[0].content}
        messages, texts = [task], []
        for turn in range(1, TURNS + 1):
            texts.append(await self._ask(path, messages))
            said = {"role": "assistant", "content": texts[-1]}
            again = {"role": "user", "content": "again"}
            messages = [*messages, said, again] if turn < TURNS - 1 else [task, {**again, "content": "once more"}]
        letters, length = (sum(map(count, texts)) for count in (lambda text: sum(map(str.isalpha, text)), len))
        message = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed"}
        part = {"type": "output_text", "text": texts[-1], "annotations": []}
        response = {"id": "resp_1", "created_at": 0, "object": "response", "model": "policy", "tools": []}
        response |= {"output": [{**message, "content": [part]}], "tool_choice": "auto", "parallel_tool_calls": True}
        return RunResponse(
            responses_create_params=body.responses_create_params,
            response=NeMoGymResponse.model_validate(response),
            reward=letters / max(1, length),
        )


if __name__ == "__main__":
    SecretiveAgent.run_webserver()
