"""Forgetting mitigation in other libraries' trainers; `import tritter` does not load it."""
