"""Nouns and hands: what machines are, what they report, how to reach them. Knows nothing of training."""
