"""Neuron growth during training: triggers, initial weights, maturity, growable modules."""
