"""HTML pages, rendered from the JSON that a command wrote."""
