"""Hands: each stage looks again at its one mutable fact, takes the difference, acts on it, tells."""
