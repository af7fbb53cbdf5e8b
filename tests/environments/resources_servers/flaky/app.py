"""A server of which every so many sessions fail, after the policy has had its first turn.

A row's fields: `fail_every` (each that many sessions one fails; 0 when not given, and none does), `bonus` (added to the
reward). Sessions are counted by `fail_every`, in the order in which they begin, for as long as the server runs.
"""

from collections import Counter
from dataclasses import dataclass

from nemo_gym.openai_utils import NeMoGymResponse
from resources_servers.gymnasium import GymnasiumServer, extract_text

TURNS = 2
_begun: Counter[int] = Counter()


@dataclass
class Visit:
    fails: bool
    turns: int = 0


def share_of_letters(text: str) -> float:
    return sum("a" <= one.lower() <= "z" for one in text) / max(1, len(text))


class FlakyServer(GymnasiumServer):
    async def reset(self, metadata: dict, session_id: str | None = None) -> tuple[str | None, dict]:
        every = int(metadata.get("fail_every", 0))
        _begun[every] += 1
        self.session_state[session_id] = Visit(fails=every > 0 and _begun[every] % every == 0)
        return None, {}

    async def step(
        self, action: NeMoGymResponse, metadata: dict, session_id: str | None = None
    ) -> tuple[str | None, float, bool, bool, dict]:
        visit = self.session_state[session_id]
        if visit.fails:
            raise RuntimeError("this session fails, as its row asks")
        visit.turns += 1
        done = visit.turns == TURNS
        reward = share_of_letters(extract_text(action)) / TURNS + float(metadata.get("bonus", 0)) / TURNS
        return None if done else "again", reward, done, False, {}


if __name__ == "__main__":
    FlakyServer.run_webserver()
