"""Build data, network, optimizer settings and recipe from the configuration."""
