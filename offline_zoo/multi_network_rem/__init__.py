"""Offline REM over separate networks: Agarwal et al. 2020, "Optimistic Perspective"."""
