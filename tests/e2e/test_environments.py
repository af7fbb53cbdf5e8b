"""Rollouts through a real Gym: agent servers, model server and resources servers, with a scripted policy."""

import json
import re
from pathlib import Path

import pytest

from gymlink.gym import read_rows
from gymlink.rollout import recorded_segments
from gymlink.session import Session
from gymlink.types import RolloutBatch, RolloutRequest, RolloutStatus

pytestmark = [pytest.mark.slow, pytest.mark.gym]


def collect(session: Session, path: Path, count: int) -> RolloutBatch:
    rows = list(read_rows(path, agents=session.agents))[:count]
    return session.collect([RolloutRequest(row, index) for index, row in enumerate(rows)])


def assert_exact(batch: RolloutBatch) -> None:
    """What must hold of every batch: nothing failed, nothing broke, no token lost."""
    assert batch.metrics["rollout/failed"] == 0, [rollout.detail for rollout in batch.rollouts]
    assert batch.metrics["rollout/prefix_breaks"] == 0
    for rollout in batch.rollouts:
        assert len(rollout.segments) == 1
        assert (
            rollout.trained_tokens == rollout.sampled_tokens == sum(len(turn.completion_ids) for turn in rollout.turns)
        )


def test_keypad_is_played_for_two_turns_and_scored(session, policy, environments) -> None:
    policy.reply = lambda prompt: "12ab" if "digits:" in prompt else "1234"
    batch = collect(session, environments / "resources_servers/keypad/data/train.jsonl", 6)
    assert_exact(batch)
    assert [rollout.reward for rollout in batch.rollouts] == [0.75] * 6
    assert {len(rollout.turns) for rollout in batch.rollouts} == {2}


def test_an_empty_turn_vanishes_from_gyms_history_and_the_chain_holds(session, policy, environments) -> None:
    # Gym 0.4.0 drops an assistant message without content from the next call's messages.
    policy.reply = lambda prompt: "1234" if "digits:" in prompt else ""
    batch = collect(session, environments / "resources_servers/keypad/data/train.jsonl", 2)
    assert_exact(batch)
    assert [rollout.reward for rollout in batch.rollouts] == [0.5, 0.5]


def test_a_real_tool_is_called_through_the_simple_agent(session, policy, environments) -> None:
    def reply(prompt: str) -> str:
        """Take, one after the other, what the user asks for; reads only what the model would see."""
        task = re.search(r"Bring (.*)\.", prompt)
        assert task is not None, prompt
        wanted = re.findall(r"(\d+) (\w+?)s?(?: and|,|$)", task[1])
        done = prompt.count("<tool_response>")
        if done >= len(wanted):
            return "done"
        quantity, item = wanted[done]
        call = {"name": "take", "arguments": {"item": item, "quantity": int(quantity)}}
        return f"<think>\nnext is {item}\n</think>\n\n<tool_call>\n{json.dumps(call)}\n</tool_call>"

    policy.reply = reply
    batch = collect(session, environments / "resources_servers/stockroom/data/train.jsonl", 5)
    assert_exact(batch)
    assert [rollout.reward for rollout in batch.rollouts] == [1.0] * 5
    assert all(len(rollout.turns) >= 2 for rollout in batch.rollouts)


def test_a_malformed_call_stays_text_and_ends_the_rollout(session, policy, environments) -> None:
    policy.reply = lambda prompt: "<tool_call>\n{not json\n</tool_call>"
    batch = collect(session, environments / "resources_servers/stockroom/data/train.jsonl", 2)
    assert_exact(batch)
    assert [rollout.reward for rollout in batch.rollouts] == [0.0, 0.0]


def test_gyms_own_reasoning_gym_is_rolled_out_against(session, policy, tmp_path) -> None:
    question = "Zoey commented. So who is a sage and who is a fool?"
    answers = {question: "Zoey is a fool, and Riley is a sage."}
    statements = [["lying", 1], ["or", ["telling-truth", 0], ["telling-truth", 1]]]
    row = {
        "responses_create_params": {"input": [{"role": "user", "content": question}]},
        "question": question,
        "answer": answers[question],
        "metadata": {
            "source_dataset": "knights_knaves",
            "source_index": 0,
            "statements": statements,
            "solution": [False, True],
            "names": ["Zoey", "Riley"],
            "knight_knave_terms": {"knight": "sage", "knave": "fool", "a_knight": "a sage", "a_knave": "a fool"},
            "difficulty": {"n_people": 2},
        },
        "agent_ref": {"type": "responses_api_agents", "name": "reasoning_gym_simple_agent"},
    }
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    policy.reply = lambda prompt: f"<answer>{answers[question]}</answer>"
    right = collect(session, path, 1)
    assert_exact(right)
    assert right.rollouts[0].reward == 1.0
    policy.reply = lambda prompt: "<answer>no idea</answer>"
    assert collect(session, path, 1).rollouts[0].reward == pytest.approx(0.0, abs=0.2)


def test_several_environments_in_one_batch(session, policy, environments, tmp_path) -> None:
    data = environments / "resources_servers"
    rows = [(data / f"{name}/data/train.jsonl").read_text().splitlines()[0] for name in ("keypad", "stockroom")]
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(rows) + "\n")
    policy.reply = lambda prompt: "1234"
    batch = collect(session, path, 2)
    assert_exact(batch)
    assert [rollout.reward for rollout in batch.rollouts] == [1.0, 0.0]


def test_a_prompt_too_long_for_the_policy_fails_alone(session, policy, environments) -> None:
    policy.reply = lambda prompt: "1234"
    policy.engine.max_context = 60
    try:
        rows = list(read_rows(environments / "resources_servers/keypad/data/train.jsonl", agents=session.agents))[:2]
        long = json.loads(json.dumps(rows[1]))
        long["responses_create_params"]["input"][0]["content"] = "x" * 100
        batch = session.collect([RolloutRequest(row, index) for index, row in enumerate([*rows, long])])
    finally:
        policy.engine.max_context = None
    assert [rollout.failure for rollout in batch.rollouts] == [None, None, "context_overflow"]
    assert batch.rollouts[0].status is RolloutStatus.TRUNCATED


def test_rollouts_are_written_as_they_end(session, policy, environments) -> None:
    policy.reply = lambda prompt: "1234"
    path = session.run_dir / "rollouts.jsonl"
    before = len(path.read_bytes().splitlines()) if path.exists() else 0
    collect(session, environments / "resources_servers/keypad/data/train.jsonl", 3)
    lines = [json.loads(line) for line in path.read_bytes().splitlines()[before:]]
    assert len(lines) == 3
    assert {line["agent"] for line in lines} == {"keypad_agent"}
    assert all(line["tokens_trained"] == recorded_segments(line)[0].trained_tokens for line in lines)
    assert lines[0]["output"][0]["content"][0]["text"] == "1234"
    assert "generation_token_ids" not in lines[0]["output"][0]
