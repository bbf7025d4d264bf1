"""Reading and writing checkpoints: every foreign format is renamed into the names of the diffusers state dict."""
