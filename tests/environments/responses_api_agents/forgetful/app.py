"""An agent of four turns that may replace its history by a summary after the second, and scores by itself.

A row's fields: `forget_every` (each that many rollouts one forgets; 0 when not given, and none does), `bonus` (added to
the reward), `pause_s` (before each turn but the first). Rollouts are counted by `forget_every`, in the order in which
they begin.
"""

import asyncio
from collections import Counter

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

TURNS = 4
FORGETS_AFTER = 2
_begun: Counter[int] = Counter()


class RunRequest(BaseRunRequest):
    model_config = ConfigDict(extra="allow")


class RunResponse(BaseVerifyResponse):
    model_config = ConfigDict(extra="allow")


def share_of_letters(text: str) -> float:
    return sum("a" <= one.lower() <= "z" for one in text) / max(1, len(text))


def text_of(response: NeMoGymResponse) -> str:
    return "".join(part.text for item in response.output if item.type == "message" for part in item.content)


def forgets(every: int) -> bool:
    _begun[every] += 1
    return every > 0 and _begun[every] % every == 0


def user(text: str) -> NeMoGymEasyInputMessage:
    return NeMoGymEasyInputMessage(role="user", content=text)


class ForgetfulConfig(BaseResponsesAPIAgentConfig):
    model_server: ModelServerRef


class ForgetfulAgent(SimpleResponsesAPIAgent):
    config: ForgetfulConfig

    async def responses(self, body: NeMoGymResponseCreateParamsNonStreaming) -> NeMoGymResponse:
        """One call of the policy."""
        answer = await self.server_client.post(
            server_name=self.config.model_server.name, url_path="/v1/responses", json=body
        )
        await raise_for_status(answer)
        return NeMoGymResponse.model_validate(await get_response_json(answer))

    async def run(self, body: RunRequest) -> RunResponse:
        row = body.model_dump()
        forgetting = forgets(int(row.get("forget_every", 0)))
        params = body.responses_create_params
        history, said, shares = list(params.input), [], []
        for turn in range(1, TURNS + 1):
            await asyncio.sleep(float(row.get("pause_s", 0)) if turn > 1 else 0)
            response = await self.responses(params.model_copy(update={"input": [*history, *said]}))
            shares.append(share_of_letters(text_of(response)))
            said.extend(response.output)
            if turn == FORGETS_AFTER and forgetting:
                history, said = [user(f"you wrote {round(100 * sum(shares) / turn)} % letters. go on")], []
            elif turn < TURNS:
                said.append(user("again"))
        return RunResponse(
            responses_create_params=params,
            response=response.model_copy(update={"output": said}),
            reward=sum(shares) / TURNS + float(row.get("bonus", 0)),
        )


if __name__ == "__main__":
    ForgetfulAgent.run_webserver()
