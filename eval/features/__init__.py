"""What each latent of a dictionary is: where it fires, with whom, what it promotes, how well simple rules describe it."""
