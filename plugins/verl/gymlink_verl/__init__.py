"""Rollouts from NeMo Gym in verl's own trainers: `+gymlink=gym` on the command line of `verl.trainer.main_ppo`."""
