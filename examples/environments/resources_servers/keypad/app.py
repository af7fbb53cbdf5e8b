"""A door keypad: the agent types for a few turns, and every digit counts.

A turn is worth (digits / characters typed) / turns, where spaces do not count and fewer than four characters count as
four. So an episode is worth between 0 and 1, and a policy that types at random can tell better from worse at once.

A row's fields: `turns` (how often the agent types; 2 when not given).
"""

from dataclasses import dataclass

from nemo_gym.openai_utils import NeMoGymResponse
from resources_servers.gymnasium import GymnasiumServer, extract_text

DEFAULT_TURNS = 2
FEWEST_CHARACTERS = 4


@dataclass
class Door:
    """What one session has done so far. Gym keeps one such state for each session, by session id."""

    digits: int = 0
    turns: int = 0


def count(text: str) -> tuple[int, int]:
    """How many digits (0 to 9, ASCII) and how many characters, spaces aside, were typed."""
    typed = "".join(text.split())
    return sum(character in "0123456789" for character in typed), len(typed)


class KeypadServer(GymnasiumServer):
    async def reset(self, metadata: dict, session_id: str | None = None) -> tuple[str | None, dict]:
        """Start an episode. Returns (observation, info); None adds nothing to the row's own message."""
        self.session_state[session_id] = Door()
        return None, {}

    async def step(
        self, action: NeMoGymResponse, metadata: dict, session_id: str | None = None
    ) -> tuple[str | None, float, bool, bool, dict]:
        """Score what was typed. Returns (observation, reward, terminated, truncated, info)."""
        turns = max(1, int(metadata.get("turns", DEFAULT_TURNS)))
        door = self.session_state.setdefault(session_id, Door())
        digits, characters = count(extract_text(action))
        door.digits += digits
        door.turns += 1

        reward = digits / max(FEWEST_CHARACTERS, characters) / turns
        done = door.turns >= turns
        observation = None if done else f"digits: {door.digits}. type digits"
        return observation, reward, done, False, {"digits": door.digits, "turns": door.turns}


if __name__ == "__main__":
    KeypadServer.run_webserver()
