"""Hydra configurations of lightning_prune; installed as `lightning_prune.conf`."""
