"""Batches of real Gyms that are to be the same: the environments, a policy that follows a script, what is compared."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

from gymlink.config import parse_settings
from gymlink.demo import environments_root
from gymlink.engines import Engine, ScriptedEngine
from gymlink.gym import read_rows
from gymlink.session import Session
from gymlink.types import Rollout, RolloutRequest, Sampling

OURS = Path(__file__).parents[1] / "environments"
Servers = Mapping[str, Sequence[str]]
"""Folders of servers by their kind, such as "resources_servers"; from the examples, or of the tests' own."""


def link_servers(root: Path, servers: Servers) -> Path:
    """A root with these servers, for one Gym."""
    for kind, names in servers.items():
        (root / kind).mkdir()
        for name in names:
            places = (place / kind / name for place in (environments_root(), OURS))
            (root / kind / name).symlink_to(next(place for place in places if place.exists()))
    return root


def session_over(
    root: Path, servers: Servers, *, tokenizer: Any, engine: Engine, run_dir: Path, gym: Any = None, **more: Any
) -> Session:
    """A session over these servers, which lie in `root` or are Gym's own; `gym` and `more` are settings."""
    configs = [f"{kind}/{name}/configs/{name}.yaml" for kind, names in servers.items() for name in names]
    settings = {"gym": {"config_paths": configs, "root": str(root), **(gym or {})}, **more}
    return Session(
        parse_settings(settings, folder=root),
        tokenizer=tokenizer,
        engine=engine,
        sampling=Sampling(max_tokens=256),
        run_dir=run_dir,
    )


class ScriptedPolicy:
    """Says what `reply` makes of the text of each prompt; a test may set another."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.reply = reply
        self.engine = ScriptedEngine(self._script)

    def _script(self, prompt_ids: tuple[int, ...]) -> list[int]:
        said = self.reply(self._tokenizer.decode(prompt_ids))
        ids: list[int] = self._tokenizer.encode(said + "<|im_end|>", add_special_tokens=False)
        return ids


def reply(prompt: str) -> str:
    """Fetches what a stockroom's user asks for, thinking aloud; says something else to every other prompt."""
    task = re.search(r"Bring (.*)\.", prompt)
    if task is None:
        said = blake2b(prompt.encode(), digest_size=4).hexdigest()
        return f"<think>\n{said[:3]}\n</think>\n\n{said}" if said[0] > "7" else said
    wanted = re.findall(r"(\d+) (\w+?)s?(?: and|,|$)", task[1])
    done = prompt.count("<tool_response>")
    if done >= len(wanted):
        return "done"
    quantity, item = wanted[done]
    call = {"arguments": {"quantity": int(quantity), "item": item}, "name": "take"}
    return f"<think>\nnext is {item}\n</think>\n\n<tool_call>\n{json.dumps(call)}\n</tool_call>"


def rows_of(name: str, count: int) -> list[dict[str, Any]]:
    """The first training rows of one of the examples' environments."""
    return list(read_rows(environments_root() / f"resources_servers/{name}/data/train.jsonl"))[:count]


def row(agent: str, text: str, **more: Any) -> dict[str, Any]:
    """A row for one of our agents."""
    params = {"input": [{"role": "user", "content": text}]}
    return {"responses_create_params": params, "agent_ref": {"name": f"{agent}_agent"}, **more}


def collect(session: Session, rows: Iterable[Mapping[str, Any]]) -> Sequence[Rollout]:
    return session.collect([RolloutRequest(row, index) for index, row in enumerate(rows)]).rollouts


def told(rollout: Rollout) -> dict[str, Any]:
    """All of a rollout that a trainer sees, and what it was made of; without names, times and Gym's own words."""
    own = {"request", "rollout_id", "seconds", "seconds_in_model", "response", "detail"}
    return {name: value for name, value in asdict(rollout).items() if name not in own}
