"""What looks after a cache that is there: verify, compare, describe, and remove what killed builds left."""
