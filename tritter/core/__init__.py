"""The heart: families, parameter maps, expansions and the models that they are for."""
