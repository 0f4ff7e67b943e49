"""Capacity planning: how many replicas of which expert on which GPUs, and what users will feel; needs no cluster and no GPU."""
