"""Offline C51: Bellemare et al. 2017, "A Distributional Perspective on RL"."""
