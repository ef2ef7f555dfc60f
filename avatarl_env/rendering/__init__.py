"""An operation as text and as a picture."""
