"""A book that is read page by page: each answer of the agent turns a page, for as many turns as the row says.

A row's fields: `turns`, and `characters`, the length of a page. The text is the reference of the language that every
Python carries. Reading to the end is worth 1.
"""

from pydoc_data.topics import topics

from nemo_gym.openai_utils import NeMoGymResponse
from resources_servers.gymnasium import GymnasiumServer

BOOK = "\n".join(topics.values())


class PagesServer(GymnasiumServer):
    async def reset(self, metadata: dict, session_id: str | None = None) -> tuple[str | None, dict]:  # noqa: ARG002
        """Start at the first page. Returns (observation, info); None adds nothing to the row's own message."""
        self.session_state[session_id] = 0
        return None, {}

    async def step(
        self,
        action: NeMoGymResponse,  # noqa: ARG002
        metadata: dict,
        session_id: str | None = None,
    ) -> tuple[str | None, float, bool, bool, dict]:
        """Turn the page. Returns (observation, reward, terminated, truncated, info)."""
        page = self.session_state[session_id] = self.session_state[session_id] + 1
        if page >= metadata["turns"]:
            return None, 1.0, True, False, {}
        start = page * metadata["characters"]
        return BOOK[start : start + metadata["characters"]], 0.0, False, False, {}


if __name__ == "__main__":
    PagesServer.run_webserver()
