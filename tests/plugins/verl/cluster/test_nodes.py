"""A job on two nodes: one Gym, one front, and on each node a process whose gateway the front reaches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.gym]
OTHER = "127.0.0.2"


def test_each_node_is_served_by_its_own_policy_at_its_own_address(
    drive: Callable[..., Any], keypad: dict[str, Any]
) -> None:
    driver = drive("two_nodes", gym=keypad)
    told = driver.told
    first, second = told["processes"]
    assert [first["node"], second["node"]] == [told["address"], OTHER]
    assert first["front"] == second["front"], "one Gym"
    assert first["front"].startswith(f"http://{told['address']}:")
    for process in (first, second):
        scheme, _, listens = process["gateway"].partition("//")
        assert scheme == "http:"
        assert listens.startswith(f"{process['node']}:")
        port = listens.rpartition(":")[2]
        assert [one for one in process["listens"] if one.endswith(f":{port}")] == [listens], "there, and only there"
    assert not any(one.startswith("127.0.0.1:") for one in [first["gateway"], second["gateway"]])
    for number, (process, reward) in enumerate(((first, 1.0), (second, 0.5))):
        rollouts = process["rollouts"]
        assert [rollout["reward"] for rollout in rollouts] == [reward] * 4, rollouts
        assert all(rollout["parents"] == [None, 0] and rollout["lost"] == 0 for rollout in rollouts)
        assert sorted(process["served"]) == sorted([rollout["id"] for rollout in rollouts] * 2), number
    owners = [{rollout["id"].split(".")[0] for rollout in process["rollouts"]} for process in (first, second)]
    assert sorted(map(sorted, owners)) == [["0"], ["1"]]
    assert driver.process.wait(60) == 0, driver.said
    assert driver.left(30) == []
