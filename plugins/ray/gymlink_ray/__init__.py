"""What the plugins for trainers that run on Ray share: one Gym for a job of many processes."""
