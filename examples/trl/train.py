"""The same as run.yaml, in Python: a tiny random model learns to type digits, on a CPU.

python examples/trl/train.py --max_steps 20 --output_dir runs/trl
"""

import argparse
from pathlib import Path

from trl import GRPOConfig, GRPOTrainer

from gymlink_tiny import save_tiny
from gymlink_trl import GymRollout, gym_dataset, gym_reward

HERE = Path(__file__).resolve().parent
ROWS = HERE.parent / "environments" / "resources_servers" / "keypad" / "data"


def main(max_steps: int, output_dir: Path) -> None:
    args = GRPOConfig(
        output_dir=str(output_dir),
        use_cpu=True,
        bf16=False,
        max_steps=max_steps,
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=64,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=10,
        per_device_eval_batch_size=16,
        num_generations_eval=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    with GymRollout(HERE / "gym.yaml", max_turn_tokens=8) as rollout:
        trainer = GRPOTrainer(
            model=str(save_tiny(output_dir / "tiny")),
            args=args,
            train_dataset=gym_dataset(ROWS / "train.jsonl"),
            eval_dataset=gym_dataset(ROWS / "eval.jsonl"),
            rollout_func=rollout,
            reward_funcs=gym_reward,
        )
        trainer.train()
        trainer.save_model(str(output_dir))
    print(f"{rollout.training.rollouts} rollouts, {rollout.training.failed} failed")
    print(f"Largest difference between a sampled logprob and the trainer's: {rollout.max_logprob_error:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/trl"))
    main(**vars(parser.parse_args()))
