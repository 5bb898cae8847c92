"""Offline BCQ: Fujimoto et al. 2019, "Benchmarking Batch Deep RL Algorithms"."""
