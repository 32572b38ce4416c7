"""What a run is asked to do: its record, the rules that hold it together, and what starts it."""
