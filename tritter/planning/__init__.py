"""Growth planning: reachable shapes, their costs, and the result of a budget."""
