"""GRPO for a character-level language model: rewards, advantages, objectives, the learner."""
