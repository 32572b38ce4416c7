"""Scores of a model per domain, how sure they are, and the gate that keeps or rolls back."""
