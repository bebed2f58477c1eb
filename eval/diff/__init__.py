"""Model diffing: what a crosscoder of two models says about their difference."""
