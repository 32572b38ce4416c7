"""Discovery of model types without a table."""

from tritter.core.families.discovery.family import DiscoveredFamily, discover

__all__ = ["DiscoveredFamily", "discover"]
