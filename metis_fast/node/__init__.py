"""One machine's share of a run: reads its prompts, plays and judges groups, keeps them until they are trained or dropped."""
