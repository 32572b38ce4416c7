"""Discovery of model types without a table."""

from tritter.core.families.discovery.family import DiscoveredFamily

__all__ = ["DiscoveredFamily"]
