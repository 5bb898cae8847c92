"""Offline CRR: Wang et al. 2020, "Critic Regularized Regression"."""
