"""Behaviour cloning: supervised learning of logged actions, Pomerleau 1991."""
