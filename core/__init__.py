"""What every layer stands on: errors, configuration, random numbers and networks."""
