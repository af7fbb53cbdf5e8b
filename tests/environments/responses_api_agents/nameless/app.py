"""An agent of two turns that makes requests of its own, so that the policy never learns which rollout they are for.

It scores by itself: the share of characters that are letters. With `invents` in a row, ids that the policy never
sampled are on the last item of its response.
"""

from nemo_gym.base_resources_server import BaseRunRequest, BaseVerifyResponse
from nemo_gym.base_responses_api_agent import BaseResponsesAPIAgentConfig, SimpleResponsesAPIAgent
from nemo_gym.config_types import ModelServerRef
from nemo_gym.openai_utils import (
    NeMoGymEasyInputMessage,
    NeMoGymResponse,
    NeMoGymResponseCreateParamsNonStreaming,
)
from nemo_gym.server_utils import get_response_json, raise_for_status
from pydantic import ConfigDict

TURNS = 2


class RunRequest(BaseRunRequest):
    model_config = ConfigDict(extra="allow")


class RunResponse(BaseVerifyResponse):
    model_config = ConfigDict(extra="allow")


def text_of(response: NeMoGymResponse) -> str:
    return "".join(part.text for item in response.output if item.type == "message" for part in item.content)


class NamelessConfig(BaseResponsesAPIAgentConfig):
    model_server: ModelServerRef


class NamelessAgent(SimpleResponsesAPIAgent):
    config: NamelessConfig

    async def responses(self, body: NeMoGymResponseCreateParamsNonStreaming) -> NeMoGymResponse:
        """One call of the policy."""
        answer = await self.server_client.post(
            server_name=self.config.model_server.name, url_path="/v1/responses", json=body
        )
        await raise_for_status(answer)
        return NeMoGymResponse.model_validate(await get_response_json(answer))

    async def run(self, body: RunRequest) -> RunResponse:
        task, said, text = list(body.responses_create_params.input), [], ""
        for turn in range(1, TURNS + 1):
            response = await self.responses(NeMoGymResponseCreateParamsNonStreaming(input=[*task, *said]))
            text += text_of(response)
            said.extend(response.output)
            if turn < TURNS:
                said.append(NeMoGymEasyInputMessage(role="user", content="again"))
        if body.model_dump().get("invents"):
            said[-1].generation_token_ids[-1] += 1
        letters = sum("a" <= one.lower() <= "z" for one in text)
        return RunResponse(
            responses_create_params=body.responses_create_params,
            response=response.model_copy(update={"output": said}),
            reward=letters / max(1, len(text)),
        )


if __name__ == "__main__":
    NamelessAgent.run_webserver()
