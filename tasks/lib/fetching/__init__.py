"""What comes from the Hugging Face Hub: models, and AgentGym-RL's lists of items."""
