#!/usr/bin/env bash
# The same as run.yaml, with verl's own launch command. What is added for gymlink is the first block.
#
# bash examples/verl/train.sh [any setting of verl's]
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
rows="$(dirname "$here")/environments/resources_servers/keypad/data"
runs="$(dirname "$(dirname "$here")")/runs"

exec python -m verl.trainer.main_ppo \
    +gymlink=gym \
    gymlink.gym_config="$here/gym.yaml" \
    gymlink.max_turn_tokens=8 \
    \
    data.train_files="$rows/train.jsonl" \
    data.val_files="$rows/eval.jsonl" \
    data.train_batch_size=4 \
    data.max_prompt_length=64 \
    data.max_response_length=64 \
    algorithm.adv_estimator=grpo \
    actor_rollout_ref.model.path="$runs/tiny" \
    actor_rollout_ref.actor.ppo_mini_batch_size=4 \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.optim.lr=1.0e-2 \
    actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
    actor_rollout_ref.rollout.agent.num_workers=1 \
    trainer.n_gpus_per_node=1 \
    trainer.total_training_steps=20 \
    trainer.total_epochs=100 \
    trainer.val_before_train=False \
    trainer.test_freq=10 \
    trainer.save_freq=-1 \
    trainer.resume_mode=disable \
    trainer.logger=[console] \
    trainer.default_local_dir="$runs/verl" \
    hydra.run.dir="$runs/verl/hydra" \
    "$@"
