"""Offline CQL: Kumar et al. 2020, "Conservative Q-Learning for Offline RL"."""
