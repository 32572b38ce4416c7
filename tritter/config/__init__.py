"""Configuration of a run: schema, validation, and launch."""
