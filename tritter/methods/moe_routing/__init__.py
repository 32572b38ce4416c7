"""Routers of MoE models: options, losses, statistics, and training of appended experts."""
