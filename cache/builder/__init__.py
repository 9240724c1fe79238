"""The offline stage: from a YAML to units, from units to a sealed cache, by one worker or many."""
