"""Offline QR-DQN: Dabney et al. 2017, "Distributional RL with Quantile Regression"."""
