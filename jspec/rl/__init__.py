"""Reinforcement learning: prompts, rewards, advantages, losses, the update. Import what you need
from the modules."""
