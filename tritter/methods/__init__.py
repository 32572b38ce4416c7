"""What is added to training: against forgetting, growth, experts, routing."""
