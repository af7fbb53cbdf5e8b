"""A call of the policy without HTTP: the gateway's inside is asked as its chat completions ask it."""

from collections.abc import Mapping
from typing import Any

from gymlink.gateway import ROLLOUT_FIELD, PolicyService
from gymlink.gateway.chat import ChatRequest


async def chat(service: PolicyService, body: Mapping[str, Any], *, read: bool = True) -> dict[str, Any]:
    """The assistant message that a chat completion with this body is answered; `read` says whether anybody waits."""

    async def connected() -> bool:
        return read

    request = ChatRequest.read(body)
    answer = await service.ask(request.call({}), body.get(ROLLOUT_FIELD), connected)
    message: dict[str, Any] = request.body(answer)["choices"][0]["message"]
    return message
