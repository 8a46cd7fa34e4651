"""What each parameter token of a language model knows, measured on a text and shown as one page."""
