"""What is kept of a training, so that it goes on after a stop, a kill or a collapse."""
