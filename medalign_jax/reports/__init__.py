"""Clinical sentences from a recording's metadata: columns and values, phrases, templates."""
