"""What README.rst and the manual say, compared with what is there."""
