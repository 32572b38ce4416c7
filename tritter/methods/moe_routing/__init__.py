"""Routers of mixtures of experts: options, losses, statistics; the trainings that open new ones."""
