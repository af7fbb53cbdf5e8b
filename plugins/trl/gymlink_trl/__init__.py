"""gymlink's plugin for TRL: NeMo Gym rollouts in TRL's own GRPOTrainer."""
