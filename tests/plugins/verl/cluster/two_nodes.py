"""A job on two Ray nodes of one machine, with a process of verl's on each: what each of them sees and gets.

python two_nodes.py FOLDER
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gymlink.demo import environments_root

OTHER = "127.0.0.2"
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1}
ROLLOUTS = 4


class Policy:
    """In the place of verl's server client: it always says the same."""

    def __init__(self, said: list[int]) -> None:
        self._said = said
        self.rollouts: list[str] = []

    async def generate(self, request_id: str, **_: Any) -> Any:
        self.rollouts.append(request_id)
        return SimpleNamespace(
            token_ids=self._said,
            log_probs=[-0.5] * len(self._said),
            stop_reason="stop",
            extra_fields={},
            routed_experts=None,
        )


class Process:
    """What verl's agent loop worker is: a process on some node, with a tokenizer and a client of its servers."""

    def __init__(self, config: Any, reply: str) -> None:
        from gymlink_tiny import make_tokenizer

        tokenizer = make_tokenizer()
        self._policy = Policy(tokenizer.encode(f"{reply}<|im_end|>", add_special_tokens=False))
        self._loop: Any = SimpleNamespace(config=config, tokenizer=tokenizer, server_manager=self._policy)

    async def play(self) -> dict[str, Any]:
        from gymlink_verl.loop import Station

        station = await Station.of(self._loop)
        rows = (environments_root() / "resources_servers/keypad/data/train.jsonl").read_text().splitlines()
        fields = [{"index": index, "gym_row": row, "uid": "u"} for index, row in enumerate(rows[:ROLLOUTS])]
        rollouts = await asyncio.gather(*(station.collect(SAMPLING, one) for one in fields))
        front: str = (await station.job.actor.hosted.remote()).head_url
        return {
            "node": ray.util.get_node_ip_address(),
            "front": front,
            "gateway": station._worker._gateway.url,  # type: ignore[union-attr]
            "listens": _listening(),
            "served": self._policy.rollouts,
            "rollouts": [
                {
                    "id": rollout.rollout_id,
                    "reward": rollout.reward,
                    "detail": rollout.detail,
                    "parents": [turn.parent for turn in rollout.turns],
                    "lost": rollout.sampled_tokens - rollout.trained_tokens,
                }
                for rollout in rollouts
            ],
        }


def _listening() -> list[str]:
    connections = psutil.Process().net_connections(kind="inet")
    return [f"{one.laddr.ip}:{one.laddr.port}" for one in connections if one.status == psutil.CONN_LISTEN]


@contextlib.contextmanager
def second_node() -> Iterator[None]:
    """One that has the address `OTHER`: all of 127/8 is this machine's on Linux."""
    address = ray.get_runtime_context().gcs_address
    ray_program = str(Path(sys.executable).with_name("ray"))
    node = subprocess.Popen(
        [ray_program, "start", f"--address={address}", f"--node-ip-address={OTHER}", "--num-cpus=1", "--block"],
        env=os.environ,
    )
    try:
        deadline = time.monotonic() + 120
        while len(addresses()) < 2:
            if node.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the second node did not come up: {node.poll()}")
            time.sleep(0.2)
        yield
    finally:
        node.terminate()
        node.wait(60)


def addresses() -> dict[str, str]:
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def main(folder: Path) -> None:
    from gymlink_verl.job import job_of
    from gymlink_verl.train import compose

    overrides = [f"gymlink.gym_config={folder}/gym.yaml", f"gymlink.run_dir={folder}/gym"]
    config = compose(["+gymlink=gym", *overrides, "data.max_prompt_length=200", "data.max_response_length=200"])
    ray.init(address="local", num_cpus=1, include_dashboard=False)
    own = ray.get_runtime_context().get_node_id()
    job_of(config.gymlink)  # before the other node is there
    with second_node():
        [other] = set(addresses()) - {own}
        processes = [
            ray.remote(Process)
            .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
            .remote(config, reply)
            for node, reply in ((own, "1234"), (other, "12ab"))
        ]
        told = ray.get([process.play.remote() for process in processes], timeout=240)
        told = {"address": addresses()[own], "processes": told}
        (folder / "told.tmp").write_text(json.dumps(told))
        (folder / "told.tmp").rename(folder / "told.json")
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
