"""Scoring: judges give verdicts, verdicts give rewards, rewards give advantages (ALGORITHM sections 2 and 3)."""
