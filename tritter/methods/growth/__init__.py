"""Neurons that grow while a model is trained: when, where, what they begin as, how they mature."""
