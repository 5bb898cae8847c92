"""Formats of logged play, and what makes it: readers, writers, demo logs."""
