"""Growth: more parameter tokens, the same function."""
