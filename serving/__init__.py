"""Serving the exported models: a client, the project's own local server, and deployment files."""
