"""What of a run does not go together, topic by topic: each rule yields the problems it sees."""
