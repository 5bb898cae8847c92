"""Online learning: agents that act, log what they do, and learn from it."""
