"""Whether this machine is ready: each check looks at one thing and says what it found and what would mend it."""
