"""Model families, parameter maps, expansions and model loading."""
