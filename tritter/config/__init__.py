"""What a run is asked to do: schema, validation, and the way from the command line to a record."""
