"""A trainer of your own: GRPO in plain torch, on rollouts that `gymlink serve` collects in NeMo Gym."""

import random
from pathlib import Path
from statistics import fmean

import torch
import typer
from transformers import AutoModelForCausalLM

from gymlink.client import GatewayClient
from gymlink.gym import read_rows

ROWS = "examples/environments/resources_servers/keypad/data/train.jsonl"


def policy_loss(policy, segment, advantage):
    """The clipped objective of PPO and GRPO, summed over the tokens that the policy sampled."""
    ids, start = torch.tensor([[*segment.prompt_ids, *segment.response_ids]]), len(segment.prompt_ids)
    logprobs = policy(ids).logits[0, start - 1 : -1].log_softmax(-1).gather(-1, ids[0, start:, None])[:, 0]
    ratio = (logprobs - torch.tensor(segment.response_logprobs)).exp()
    objective = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return -(objective * torch.tensor(segment.response_mask)).sum()


def train(url="http://127.0.0.1:8000", api_key="secret", model="runs/tiny", rows=ROWS, steps: int = 30):
    policy = AutoModelForCausalLM.from_pretrained(model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    tasks, folder = list(read_rows(rows)), Path("runs/own_trainer").resolve()
    with GatewayClient(url, api_key) as gateway:
        gateway.wait()
        for step in range(steps):
            policy.save_pretrained(folder)
            version = gateway.load_weights(str(folder))
            collected = gateway.collect(random.sample(tasks, 4), samples=8)
            scored = [rollout for rollout in collected.rollouts if rollout.reward is not None]
            tokens = sum(segment.trained_tokens for rollout in scored for segment in rollout.segments)
            for group in collected.groups:
                siblings = [rollout for rollout in group if rollout.reward is not None]  # one that failed moves nothing
                for rollout in siblings:
                    advantage = rollout.reward - fmean(sibling.reward for sibling in siblings)
                    for segment in rollout.segments:
                        (policy_loss(policy, segment, advantage) / tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step + 1}: reward {fmean(one.reward for one in scored):.3f}, weights {version}", flush=True)
    policy.save_pretrained(folder)


typer.run(train)
