"""Commands that evaluate, compare, convert and describe dictionaries: options in, tables and paths out."""
