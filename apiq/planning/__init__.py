"""What a run will need, told before anything is loaded: counted from config.json, timed on one random block."""
