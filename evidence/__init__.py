"""Evidence that the claims hold: every row measured, with its bar."""
