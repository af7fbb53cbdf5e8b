#!/usr/bin/env bash
# The same as run.yaml, with OpenRLHF's own launch command. What is added for gymlink is the first block.
#
# bash examples/openrlhf/train.sh [any flag of OpenRLHF's]
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
rows="$(dirname "$here")/environments/resources_servers/keypad/data"
runs="$(dirname "$(dirname "$here")")/runs"
gym="$runs/openrlhf/gym"

agent="$(gymlink path openrlhf --gym "$here/gym.yaml" --run-dir "$gym")"
prompts="$(gymlink prompts openrlhf "$rows/train.jsonl" --output "$gym/prompts.jsonl")"
eval_prompts="$(gymlink prompts openrlhf "$rows/eval.jsonl" --output "$gym/eval-prompts.jsonl" --eval)"

exec python -m openrlhf.cli.train_ppo_ray \
    --train.agent_func_path "$agent" \
    --data.prompt_dataset "$prompts" \
    --data.input_key input \
    --data.label_key label \
    --eval.dataset "$eval_prompts" \
    \
    --actor.model_name_or_path "$runs/tiny" \
    --ckpt.output_dir "$runs/openrlhf/model" \
    --ckpt.path "$runs/openrlhf/checkpoints" \
    --data.max_len 128 \
    --rollout.batch_size 4 \
    --rollout.n_samples_per_prompt 8 \
    --rollout.max_new_tokens 8 \
    --rollout.micro_batch_size 32 \
    --train.batch_size 32 \
    --train.micro_batch_size 32 \
    --train.num_episodes 2 \
    --algo.advantage.estimator group_norm \
    --algo.advantage.is_correction_level token \
    --algo.kl.init_coef 0 \
    --actor.num_gpus_per_node 1 \
    --actor.adam.lr 5.0e-3 \
    --actor.lr_scheduler constant \
    --vllm.num_engines 1 \
    --vllm.gpu_memory_utilization 0.1 \
    --vllm.enforce_eager \
    --ds.zero_stage 0 \
    --eval.steps 16 \
    --eval.temperature 1.0 \
    --eval.n_samples_per_prompt 1 \
    "$@"
