"""The configuration: schema, checks, loading."""
