"""What a layout needs and how long a step takes, before anyone pays for a node: arithmetic, nothing measured (docs/plan.md)."""
