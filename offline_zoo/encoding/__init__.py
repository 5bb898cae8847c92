"""Frames as dictionaries of tiles: the store, its encoder, and what is kept between runs."""
