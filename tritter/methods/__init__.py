"""Methods that extend training: forgetting mitigation, growth, experts, routing."""
