"""Warm start: a run that begins with a saved dictionary, or with the neurons of an MLP, in place of new weights."""
