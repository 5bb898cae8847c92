"""Offline REM: Agarwal et al. 2020, "An Optimistic Perspective on Offline RL"."""
