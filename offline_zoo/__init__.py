"""Offline Zoo: forkable JAX reference implementations of offline RL agents on Atari."""
