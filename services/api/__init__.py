"""Orders over HTTP, for programs and for people."""
