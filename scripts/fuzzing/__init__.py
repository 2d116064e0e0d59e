"""The kinds of input that `scripts/fuzz.py` damages, and what must hold of each."""
