"""What runs are made of: one file per method, each with variants behind a colon."""
